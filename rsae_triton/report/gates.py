"""The scalar functions h -> z of a teacher and a Rational SAE on a grid, and the distribution of pre-activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.rational import FusedRationalSAE

GRID = 401
BAND = (0.1, 0.5, 0.9)
_SAMPLE = 8_000_000


@dataclass(frozen=True)
class Band:
    """10 %, 50 % and 90 % quantiles over features of the gate's value, each [GRID]."""

    low: np.ndarray
    median: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class GatePicture:
    """The data of the gate's figure.

    Attributes:
        h: [GRID] where the gates are evaluated. edges [n + 1], teacher_count, rsae_count [n]: histograms of real
            pre-activations. teacher, init, rsae: the shipped gates. rational: r of the learned gate, without the zeros
            below the threshold.
    """

    h: np.ndarray
    edges: np.ndarray
    teacher_count: np.ndarray
    rsae_count: np.ndarray
    teacher: Band
    init: Band
    rsae: Band
    rational: Band


def thresholds(sae: SparseAutoencoder) -> np.ndarray | None:
    """theta_f, the pre-activation above which a feature is active, [d_sae]; None if there is no such number."""
    if isinstance(sae, FusedRationalSAE):
        return sae.gate.threshold.detach().float().cpu().numpy() if sae.gate.form == "gated" else None
    theta = getattr(sae, "threshold", None)
    if isinstance(theta, Tensor):
        return theta.detach().float().cpu().numpy()
    return np.zeros(sae.d_sae, dtype=np.float32) if sae.architecture == "standard" else None


@torch.no_grad()
def gate_picture(
    teacher: SparseAutoencoder,
    init: FusedRationalSAE,
    rsae: FusedRationalSAE,
    x: Tensor,
    alive: np.ndarray,
    bins: int = 300,
) -> GatePicture:
    """Evaluates the gates over the range of the pre-activations of x [n_tokens, d_in].

    Args:
        alive: bool [d_sae], the features that the bands are quantiles of (all of them if none is alive).
    """
    n = max(1, min(len(x), _SAMPLE // max(1, teacher.d_sae)))
    rows = x[:n].to(device=teacher.W_dec.device, dtype=teacher.W_dec.dtype)
    before, code = teacher.hidden_pre(rows).float().cpu(), teacher.encode(rows).float().cpu()
    after = rsae.hidden_pre(x[:n].to(device=rsae.W_dec.device, dtype=rsae.W_dec.dtype)).float().cpu()
    active = before[code != 0]
    # From the inactive bulk on the left to nine tenths of the active tokens on the right: where the gates can differ.
    low = float(np.quantile(before.numpy()[:: max(1, n // 256)], 0.001))
    high = float(np.quantile(active.numpy(), 0.9)) if len(active) else float(before.max())
    low, high = min(low, -0.25 * abs(high)), max(high, low + 1e-3)
    edges = np.linspace(low, high, bins + 1)
    h = np.linspace(low, high, GRID)
    features = torch.from_numpy(alive) if alive.any() else torch.ones(len(alive), dtype=torch.bool)
    return GatePicture(
        h,
        edges,
        np.histogram(before.numpy(), edges)[0],
        np.histogram(after.numpy(), edges)[0],
        _teacher_band(teacher, h, features, before, code),
        _band(lambda v: init.gate(v.to(init.gate.threshold.device)), h, init.d_sae, features),
        _band(lambda v: rsae.gate(v.to(rsae.gate.threshold.device)), h, rsae.d_sae, features),
        _band(lambda v: rsae.gate(v.to(rsae.gate.threshold.device), hard=False), h, rsae.d_sae, features),
    )


def _band(gate: Callable[[Tensor], Tensor], h: np.ndarray, d_sae: int, features: Tensor) -> Band:
    quantiles = []
    # A few grid points at a time; all of them at once would take several arrays of GRID * d_sae floats.
    for part in torch.from_numpy(h).float().split(32):
        values = gate(part[:, None].expand(-1, d_sae).contiguous()).float().cpu()[:, features]
        quantiles.append(np.quantile(values.numpy(), BAND, axis=1, method="nearest"))
    return Band(*np.concatenate(quantiles, axis=1))


def _teacher_band(teacher: SparseAutoencoder, h: np.ndarray, features: Tensor, before: Tensor, code: Tensor) -> Band:
    theta = thresholds(teacher)
    if isinstance(teacher, FusedRationalSAE):
        return _band(lambda v: teacher.gate(v.to(teacher.gate.threshold.device)), h, teacher.d_sae, features)
    if theta is not None:
        limit = torch.from_numpy(theta)
        return _band(lambda v: v.relu() * (v > limit), h, teacher.d_sae, features)
    # TopK is not a function of h alone. Its mean code at each h is shown, which rises where features begin to be kept.
    step = h[1] - h[0]
    edges = np.append(h - step / 2, h[-1] + step / 2)
    count = np.histogram(before.numpy(), edges)[0]
    total = np.histogram(before.numpy(), edges, weights=code.numpy())[0]
    mean = np.divide(total, count, out=np.full(len(h), np.nan), where=count > 0)
    return Band(mean, mean, mean)
