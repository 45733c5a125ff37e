"""What stage 1 looks at: a sample of the activations, with the teacher's pre-activations and codes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rsae_triton.common.checks import check_data, check_finite
from rsae_triton.common.errors import ShapeError
from rsae_triton.sae.base import SparseAutoencoder


class Sample(NamedTuple):
    """What stage 1 looks at: activations x [n, d_in], the teacher's h and z [n, d_sae], its thresholds [d_sae]."""

    x: Tensor
    h: Tensor
    z: Tensor
    thresholds: Tensor


def sample(activations: Tensor | Any, teacher: SparseAutoencoder, n_tokens: int, seed: int) -> Tensor:
    """n_tokens rows to calibrate on, in the teacher's dtype and on its device."""
    if not isinstance(activations, Tensor) and not hasattr(activations, "tensor"):
        raise ShapeError(f"activations is a {type(activations).__name__}; give a torch.Tensor or an ActivationStore")
    x = activations if isinstance(activations, Tensor) else activations.tensor()
    check_data("activations", x)
    if x.dim() != 2 or x.shape[1] != teacher.d_in:
        raise ShapeError(f"activations have shape {tuple(x.shape)}; the teacher takes [n, d_in={teacher.d_in}]")
    if len(x) == 0:
        raise ShapeError("there are no activations to calibrate on; give at least a few hundred tokens")
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:n_tokens]
    x = x[chosen.to(x.device)].to(device=teacher.W_enc.device, dtype=teacher.W_enc.dtype)
    check_finite("the sample of the activations", x, "drop those rows first")
    return x
