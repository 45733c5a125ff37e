"""Reconstruction and sparsity of a code on held-out activations, as shipped and at a given l0."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rsae_triton.common.checks import check_data, check_finite, check_number
from rsae_triton.common.errors import ConfigError, ShapeError

CHUNK = 2048
# A feature active on more than this fraction of the tokens is called dense.
DENSE, DENSE_HALF = 0.1, 0.5


class Codec(Protocol):
    """Anything that encodes and decodes: an SAE, or one behind a threshold."""

    @property
    def W_dec(self) -> Tensor: ...  # noqa: N802

    def encode(self, x: Tensor) -> Tensor: ...

    def decode(self, feature_acts: Tensor, x: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Reconstruction:
    """Means over tokens, in the units the SAE works in.

    mse: ||x - x_hat||^2. fvu: mse over the variance of x around its mean. cosine: of x and x_hat. l0: active
    features. l1: sum of |z| * ||W_dec row||. alive_fraction: features active on at least one of the n_tokens;
    dead_features: how many are not. dense_features: active on more than 10 % of the tokens; dense_features_half: on
    more than half. negative: share of the active codes that are below zero. size_p5, size_p50, size_p95: quantiles of
    the active codes' |z| * ||W_dec row||, 0 where there are none.
    """

    mse: float
    fvu: float
    cosine: float
    l0: float
    l1: float
    alive_fraction: float
    n_tokens: int
    dead_features: int
    dense_features: int
    dense_features_half: int
    negative: float = 0.0
    size_p5: float = 0.0
    size_p50: float = 0.0
    size_p95: float = 0.0


class Measured(NamedTuple):
    """Scores, and what they are means of: squared_error [n_tokens] float64 (||x - x_hat||^2 of each token), frequency
    [d_sae] float64 (the fraction of tokens a feature is active on)."""

    scores: Reconstruction
    squared_error: Tensor
    frequency: Tensor


class Thresholded:
    """An SAE whose code is also zero where |z| * ||W_dec row|| <= `tau`: less of the same code, for equal l0."""

    def __init__(self, sae: Codec, tau: float) -> None:
        self.sae, self.tau = sae, tau

    @property
    def W_dec(self) -> Tensor:  # noqa: N802
        return self.sae.W_dec

    def encode(self, x: Tensor) -> Tensor:
        z = self.sae.encode(x)
        return z * (strength(z, self.W_dec) > self.tau)

    def decode(self, feature_acts: Tensor, x: Tensor | None = None) -> Tensor:
        return self.sae.decode(feature_acts, x)


def strength(z: Tensor, W_dec: Tensor) -> Tensor:
    """|z| * ||W_dec row||: how far a feature moves the reconstruction, whatever its decoder's norm."""
    return z.abs() * W_dec.norm(dim=1)


def check_activations(sae: Codec, x: Tensor) -> Tensor:
    """x itself, if it is [n_tokens >= 1, d_in] for this SAE and finite (ShapeError, ConfigError, NumericsError)."""
    if not isinstance(getattr(sae, "W_dec", None), Tensor) or not hasattr(sae, "encode"):
        raise ConfigError(f"sae is a {type(sae).__name__}; give an SAE of this package, such as load_teacher returns")
    check_data("activations", x)
    d_in = sae.W_dec.shape[1]
    if x.dim() != 2 or x.shape[1] != d_in:
        raise ShapeError(f"activations have shape {tuple(x.shape)}; give [n_tokens, d_in={d_in}]")
    if len(x) == 0:
        raise ShapeError("there are no activations to evaluate on; give at least one token")
    check_finite("activations", x, "drop those rows before evaluating")
    return x


def reconstruction(sae: Codec, x: Tensor) -> Reconstruction:
    """Scores the code of x [n_tokens, d_in]; sums in float64.

    Raises:
        ShapeError, NumericsError: activations that do not fit or are not finite.
    """
    return measure(sae, x).scores


@torch.no_grad()
def measure(sae: Codec, x: Tensor, progress: Callable[[int], None] | None = None) -> Measured:
    """As `reconstruction`, with the error of every token and the frequency of every feature.

    Args:
        progress: called with the number of tokens done.
    """
    x = check_activations(sae, x)
    total = dict.fromkeys(("cosine", "l0", "l1", "negative"), 0.0)
    active = torch.zeros(sae.W_dec.shape[0], dtype=torch.long, device=sae.W_dec.device)
    errors, sizes = [], []
    for chunk in x.split(CHUNK):
        rows = chunk.to(device=sae.W_dec.device, dtype=sae.W_dec.dtype)
        z = sae.encode(rows)
        x_hat = sae.decode(z, rows)
        nonzero = z != 0
        active += nonzero.sum(0)
        errors.append((rows - x_hat).double().square().sum(1).cpu())
        total["cosine"] += float(torch.cosine_similarity(rows, x_hat, dim=1).double().sum())
        total["l0"] += float(nonzero.sum())
        size = strength(z, sae.W_dec)
        total["l1"] += float(size.double().sum())
        total["negative"] += float((z < 0).sum())
        sizes.append(size[nonzero].float().cpu())
        if progress is not None:
            progress(len(rows))
    active_codes = total.pop("negative") / max(total["l0"], 1), torch.cat(sizes).sort().values
    squared_error = torch.cat(errors)
    frequency = active.double().cpu() / len(x)
    mse = float(squared_error.mean())
    if not math.isfinite(mse) and isinstance(of := getattr(sae, "sae", sae), torch.nn.Module):
        for name, weight in of.named_parameters():
            check_finite(f"sae.{name}", weight, "its scores mean nothing; fetch or train it again")
    variance = float((x.double() - x.double().mean(0)).square().sum(1).mean())
    scores = Reconstruction(
        **{name: value / len(x) for name, value in total.items()},
        mse=mse,
        fvu=mse / variance if variance > 0 else float("nan"),
        alive_fraction=float((frequency > 0).double().mean()),
        n_tokens=len(x),
        dead_features=int((frequency == 0).sum()),
        dense_features=int((frequency > DENSE).sum()),
        dense_features_half=int((frequency > DENSE_HALF).sum()),
        negative=active_codes[0],
        **{f"size_p{q}": _quantile(active_codes[1], q / 100) for q in (5, 50, 95)},
    )
    return Measured(scores, squared_error, frequency)


def _quantile(ranked: Tensor, q: float) -> float:
    """Of sorted values: the one at this share of them; `torch.quantile` takes no more than 16 million."""
    return float(ranked[round(q * (len(ranked) - 1))]) if len(ranked) else 0.0


@torch.no_grad()
def at_l0(sae: Codec, x: Tensor, l0: float) -> Thresholded:
    """The code with its threshold raised until its mean l0 on x is `l0` (exactly, up to ties).

    A code that is sparser than that already is returned as it is (tau = 0): nothing can be added to it.
    """
    check_number("l0", l0, above=0)
    x = check_activations(sae, x)
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
