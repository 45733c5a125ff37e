"""Steering: runs a language model with some features of an SAE amplified, set to a value or switched off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from rsae_triton.common.checks import check_flag, check_integer, check_number, shown
from rsae_triton.common.errors import ConfigError, ShapeError
from rsae_triton.integrations.splicing import replaced
from rsae_triton.sae.base import SparseAutoencoder, check_sae


@contextmanager
def steer(
    model: Any,
    sae: SparseAutoencoder,
    strengths: Mapping[int, float],
    *,
    mode: Literal["add", "set"] = "add",
    hook_name: str | None = None,
    keep_first: bool = True,
) -> Iterator[None]:
    """While the context is open, `model` runs with features of `sae` changed at every token.

        with rt.steer(host, sae, {303: 4.0}):
            print(host.complete("The weather today"))

    The activations are not replaced by their reconstruction: only the chosen decoder rows are added to them.

    Args:
        model: the host that `load_host` returns, a TransformerLens model, or a Hugging Face model.
        strengths: feature -> number, in the units of that feature's activations.
        mode: "add" adds number * decoder row; "set" makes the feature's activation that number (0 switches it off).
        hook_name: the place, as for `splice`; the one in the SAE's metadata when None.
        keep_first: leave the first token of a sequence unchanged: it is BOS, whose norm is far outside what SAEs are
            trained on.

    Raises:
        ConfigError: no such feature or place, or the model ran without computing that place.
        ShapeError: activations there have another width.
    """
    check_sae("sae", sae)
    check_flag("keep_first", keep_first)
    if mode not in ("add", "set"):
        raise ConfigError(f"mode is {mode!r}; choose add or set")
    if not isinstance(strengths, Mapping) or not strengths:
        raise ConfigError(f"strengths is {shown(strengths)}; give features and numbers, such as {{303: 4.0}}")
    for index, value in strengths.items():
        check_integer("a feature", index, 0, sae.d_sae - 1)
        check_number(f"the strength of feature {index}", value)
    count = [0]
    chosen = torch.tensor(list(strengths), device=sae.W_dec.device)
    wanted = torch.tensor([float(one) for one in strengths.values()], device=sae.W_dec.device)

    def replace(x: Tensor) -> Tensor:
        count[0] += 1
        heads = x.shape
        flat = x.flatten(2) if x.dim() > 3 else x
        if flat.shape[-1] != sae.d_in:
            raise ShapeError(f"activations there have shape {tuple(heads)}, but the SAE has d_in={sae.d_in}")
        units = sae.units or 1.0
        own = flat.to(device=sae.W_dec.device, dtype=sae.W_dec.dtype) * units
        with torch.no_grad():
            change = wanted.expand(*own.shape[:-1], -1)
            if mode == "set":
                change = change - sae.encode(own)[..., chosen].float()
            # If the SAE normalises every token, its decoder rows are in units of that token's scale.
            scale = torch.as_tensor(sae.normalization(own).scale)
            added = (change.to(own.dtype) @ sae.W_dec[chosen]) * scale / units
        added = added.to(device=x.device, dtype=x.dtype)
        if keep_first and added.dim() > 2 and added.shape[1] > 1:  # while generating, later tokens arrive one at a time
            added[:, 0] = 0
        return (flat + added).reshape(heads)

    with replaced(model, sae, hook_name, replace, count):
        yield
