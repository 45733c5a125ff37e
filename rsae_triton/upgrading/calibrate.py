"""Second half of stage 1: fits the rational's coefficients to the teacher's gate on real pre-activations.

A minimax fit is equally good everywhere on [-1, 1], but nearly all of a teacher's pre-activations lie in a narrow
inactive bulk, where d_sae small errors add up to a large one. So the coefficients are refined by weighted least squares
on a histogram of the pre-activations, starting from the minimax fit. The histogram gives the same result as all the
values and takes a tenth of a second.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rsae_triton.common.errors import NumericsError
from rsae_triton.remez import GateFit

BINS = 500
LADDER = ((3, 2), (5, 4), (7, 6), (9, 8))
"""Degrees that "auto" tries, smallest first."""
HISTOGRAM_TOKENS = 2048
"""How many tokens of the sample a gate is fitted to."""


@dataclass(frozen=True)
class Histogram:
    """A histogram of pre-activations: bin means v [n], total weights [n], and the teacher's mean output in each bin
    [n]."""

    value: np.ndarray
    weight: np.ndarray
    target: np.ndarray


def histogram(value: np.ndarray, target: np.ndarray, active: np.ndarray, weight: np.ndarray | None = None) -> Histogram:
    """Bins samples by value; half of the bins go to the active ones, however few they are.

    Args:
        value: [n] pre-activations. target: [n] the teacher's output for each. active: [n] bool.
        weight: [n] weight of each squared error; ones when None.
    """
    weight = np.ones_like(value) if weight is None else weight
    total, points, targets = [], [], []
    for part in (~active, active):
        v, w, y = value[part], weight[part], target[part]
        if len(v) == 0:
            continue
        edges = np.unique(np.quantile(v[:: max(1, len(v) // 200_000)], np.linspace(0, 1, BINS // 2 + 1)))
        index = np.clip(np.searchsorted(edges, v, side="right") - 1, 0, max(len(edges) - 2, 0))
        mass = np.bincount(index, w)
        seen = mass > 0
        total.append(mass[seen])
        points.append((np.bincount(index, w * v)[seen]) / mass[seen])
        targets.append((np.bincount(index, w * y)[seen]) / mass[seen])
    if not total:
        raise NumericsError("there are no pre-activations to calibrate on; give at least one token")
    return Histogram(np.concatenate(points), np.concatenate(total), np.concatenate(targets))


@dataclass(frozen=True)
class Calibration:
    """Refined coefficients a [p+1] and b [q], and the code's relative error before and after refinement."""

    a: np.ndarray
    b: np.ndarray
    relative_error: float
    initial_relative_error: float


def calibrate(fit: GateFit, data: Histogram, input_scale: float, *, tail: bool) -> Calibration:
    """Fits C * (r(v / C) + tail) to the targets by weighted least squares, starting from the fit's coefficients.

    Args:
        fit: the start; its centre and unit-influence scales are kept. data: what to fit. input_scale: C.
        tail: continue with slope one beyond v = C (for a direct gate whose domain is clamped).
    """
    from scipy.optimize import least_squares  # imported here because it takes half a second

    t = data.value / input_scale
    s = np.clip(t, -1, 1) - fit.centre
    target = data.target / input_scale - (np.maximum(t - 1, 0) if tail else 0)
    root = np.sqrt(data.weight)
    p, q = fit.degree
    powers = s[:, None] ** np.arange(max(p, q) + 1)
    numerator, denominator = powers[:, : p + 1] * fit.numerator_scale, powers[:, 1 : q + 1] * fit.denominator_scale

    def parts(parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        B = denominator @ parameters[p + 1 :]
        Q = 1 + np.abs(B)
        return numerator @ parameters[: p + 1] / Q, Q, np.sign(B)

    def residual(parameters: np.ndarray) -> np.ndarray:
        return root * (parts(parameters)[0] - target)

    def jacobian(parameters: np.ndarray) -> np.ndarray:
        r, Q, sign = parts(parameters)
        left, right = numerator / Q[:, None], -(r * sign / Q)[:, None] * denominator
        return root[:, None] * np.hstack([left, right])

    start = np.concatenate([fit.a / fit.numerator_scale, fit.b / fit.denominator_scale])
    if not np.isfinite(residual(start)).all():
        raise NumericsError(
            f"the gate overflows on these pre-activations (up to {np.abs(data.value).max():.2g}); use other units"
        )
    found = least_squares(residual, start, jacobian, method="trf", xtol=1e-12, ftol=1e-12, gtol=1e-14, max_nfev=300)
    norm = np.sqrt(np.sum(data.weight * (data.target / input_scale) ** 2))

    def relative(parameters: np.ndarray) -> float:
        return float(np.linalg.norm(residual(parameters)) / norm) if norm > 0 else float("inf")

    best = found.x if found.cost <= 0.5 * np.sum(residual(start) ** 2) else start
    return Calibration(
        best[: p + 1] * fit.numerator_scale,
        best[p + 1 :] * fit.denominator_scale,
        relative(best),
        relative(start),
    )
