"""Normalisations that some SAEs apply to every token before encoding, and undo after decoding.

    none                    x
    layer_norm              (x - mean) / (std + 1e-5), std unbiased; undone as x_hat * std + mean
    constant_norm_rescale   x * sqrt(d_in) / ||x||; undone as x_hat * ||x|| / sqrt(d_in)

These are as in SAELens 6 (`SAE._setup_activation_normalization`) and, for layer_norm, openai/sparse_autoencoder
(`model.LN`), including that the epsilon is added on the way in and not on the way out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MODES = ("none", "layer_norm", "constant_norm_rescale")
_EPSILON = 1e-5


class Affine(NamedTuple):
    """apply: (x - shift) / divisor; undo: x_hat * scale + shift. Each is [..., 1] or a number."""

    shift: Tensor | float = 0.0
    divisor: Tensor | float = 1.0
    scale: Tensor | float = 1.0

    def apply(self, x: Tensor) -> Tensor:
        return x if isinstance(self.divisor, float) else ((x - self.shift) / self.divisor).to(x.dtype)

    def undo(self, x_hat: Tensor) -> Tensor:
        return x_hat if isinstance(self.scale, float) else (x_hat * self.scale + self.shift).to(x_hat.dtype)

    def target(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Returns what x_hat is compared with before it is undone, and the factor of the difference; None and None
        without a normalisation. The target is not what is encoded, because the epsilons differ (see the module)."""
        if isinstance(self.scale, float):
            return None, None
        return ((x - self.shift) / self.scale.clamp_min(torch.finfo(self.scale.dtype).tiny)).to(x.dtype), self.scale


def normalize(x: Tensor, mode: str) -> Affine:
    """Returns the normalisation of every token of x [..., d_in], in at least float32."""
    if mode == "none":
        return Affine()
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if mode == "layer_norm":
        std = wide.std(dim=-1, keepdim=True)
        return Affine(wide.mean(dim=-1, keepdim=True), std + _EPSILON, std)
    scale = wide.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny) / x.shape[-1] ** 0.5
    return Affine(0.0, scale, scale)
