"""Reconstruction and sparsity of a code on held-out activations, as shipped and at a given l0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..base import SparseAutoencoder
from ..errors import ConfigError, NumericsError, ShapeError

CHUNK = 2048


class Codec(Protocol):
    """Anything that encodes and decodes: an SAE, or one behind a threshold."""

    @property
    def W_dec(self) -> Tensor: ...  # noqa: N802

    def encode(self, x: Tensor) -> Tensor: ...

    def decode(self, feature_acts: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Reconstruction:
    """Means over tokens, in the units the SAE works in.

    mse: ||x - x_hat||^2. fvu: mse over the variance of x around its mean. cosine: of x and x_hat. l0: active
    features. l1: sum of |z| * ||W_dec row||. alive_fraction: features active on at least one of the n_tokens.
    """

    mse: float
    fvu: float
    cosine: float
    l0: float
    l1: float
    alive_fraction: float
    n_tokens: int


class Thresholded:
    """An SAE whose code is also zero where |z| * ||W_dec row|| <= `tau`: less of the same code, for equal l0."""

    def __init__(self, sae: SparseAutoencoder, tau: float) -> None:
        self.sae, self.tau = sae, tau

    @property
    def W_dec(self) -> Tensor:  # noqa: N802
        return self.sae.W_dec

    def encode(self, x: Tensor) -> Tensor:
        z = self.sae.encode(x)
        return z * (strength(z, self.W_dec) > self.tau)

    def decode(self, feature_acts: Tensor) -> Tensor:
        return self.sae.decode(feature_acts)


def strength(z: Tensor, W_dec: Tensor) -> Tensor:
    """|z| * ||W_dec row||: how far a feature moves the reconstruction, whatever its decoder's norm."""
    return z.abs() * W_dec.norm(dim=1)


def _check(sae: Codec, x: Tensor) -> Tensor:
    d_in = sae.W_dec.shape[1]
    if x.dim() != 2 or x.shape[1] != d_in:
        raise ShapeError(f"activations have shape {tuple(x.shape)}; give [n_tokens, d_in={d_in}]")
    if len(x) == 0:
        raise ShapeError("there are no activations to evaluate on; give at least one token")
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).any(1).sum())
        raise NumericsError(f"{bad} of {len(x)} activations hold NaN or infinity; drop them before evaluating")
    return x


@torch.no_grad()
def reconstruction(sae: Codec, x: Tensor) -> Reconstruction:
    """Scores the code of x [n_tokens, d_in]; sums in float64.

    Raises:
        ShapeError, NumericsError: activations that do not fit or are not finite.
    """
    x = _check(sae, x)
    total = dict.fromkeys(("mse", "cosine", "l0", "l1"), 0.0)
    active = torch.zeros(sae.W_dec.shape[0], dtype=torch.bool, device=sae.W_dec.device)
    for chunk in x.split(CHUNK):
        rows = chunk.to(device=sae.W_dec.device, dtype=sae.W_dec.dtype)
        z = sae.encode(rows)
        x_hat = sae.decode(z)
        nonzero = z != 0
        active |= nonzero.any(0)
        total["mse"] += float((rows - x_hat).double().square().sum())
        total["cosine"] += float(torch.cosine_similarity(rows, x_hat, dim=1).double().sum())
        total["l0"] += float(nonzero.sum())
        total["l1"] += float(strength(z, sae.W_dec).double().sum())
    mean = {name: value / len(x) for name, value in total.items()}
    variance = float((x.double() - x.double().mean(0)).square().sum(1).mean())
    return Reconstruction(
        **mean,
        fvu=mean["mse"] / variance if variance > 0 else float("nan"),
        alive_fraction=float(active.float().mean()),
        n_tokens=len(x),
    )


@torch.no_grad()
def at_l0(sae: SparseAutoencoder, x: Tensor, l0: float) -> Thresholded:
    """The code with its threshold raised until its mean l0 on x is `l0` (exactly, up to ties).

    A code that is sparser than that already is returned as it is (tau = 0): nothing can be added to it.
    """
    if not l0 > 0:
        raise ConfigError(f"l0 is {l0}; give a positive number of features per token")
    x = _check(sae, x)
    strengths = []
    for chunk in x.split(CHUNK):
        z = sae.encode(chunk.to(device=sae.W_dec.device, dtype=sae.W_dec.dtype))
        value = strength(z, sae.W_dec)
        strengths.append(value[value > 0])
    kept = round(l0 * len(x))
    ranked = torch.cat(strengths)
    if len(ranked) <= kept:
        return Thresholded(sae, 0.0)
    return Thresholded(sae, float(ranked.kthvalue(len(ranked) - kept).values))
