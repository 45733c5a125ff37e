"""The rows that a transcoder is trained and scored on: input and target beside each other, in one tensor or store."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rsae_triton.activations.pairs import PairedStore
from rsae_triton.common.checks import check_data
from rsae_triton.common.errors import ConfigError, ShapeError
from rsae_triton.sae.base import SparseAutoencoder


def side_by_side(sae: SparseAutoencoder, activations: Any, targets: Tensor | None) -> Any:
    """Returns rows for `sae`: the activations as they are, or for a transcoder input and target beside each other.

    Raises:
        ConfigError: a transcoder without targets, or targets for an SAE.
        ShapeError: activations and targets do not pair up.
    """
    transcoder = sae.row_width != sae.d_in
    paired = isinstance(activations, PairedStore)
    if not transcoder:
        if targets is not None or paired:
            raise ConfigError(
                f"a {type(sae).__name__} reconstructs what it reads; targets and paired stores are for transcoders"
            )
        return activations
    if paired:
        if targets is not None:
            raise ConfigError("a PairedStore holds the targets already; leave targets out")
        return activations
    if targets is None:
        if isinstance(activations, Tensor) and activations.dim() == 2 and activations.shape[1] == sae.row_width:
            return activations
        raise ConfigError(
            "a transcoder reads one place and writes another: give targets=, the activations where it writes, or a "
            "PairedStore (rsae_triton.activations.extract_pairs)"
        )
    if not isinstance(activations, Tensor):
        raise ShapeError(f"with targets, activations is a tensor too, not a {type(activations).__name__}")
    for name, one in (("activations", activations), ("targets", targets)):
        check_data(name, one)
    if activations.dim() != 2 or targets.dim() != 2 or len(activations) != len(targets):
        raise ShapeError(
            f"activations have shape {tuple(activations.shape)}, targets {tuple(targets.shape)}; give [n, d_in] and "
            "[n, d_out], row by row of the same tokens"
        )
    d_out = sae.row_width - sae.d_in
    if activations.shape[1] != sae.d_in or targets.shape[1] != d_out:
        raise ShapeError(
            f"activations have width {activations.shape[1]}, targets {targets.shape[1]}; the transcoder has "
            f"d_in={sae.d_in}, d_out={d_out}"
        )
    return torch.cat([activations, targets.to(activations)], dim=1)
