"""Differential correction: the globally convergent half of the minimax solver.

Cheney & Loeb 1961; Barrodale, Powell & Roberts 1972. Each step solves the linear program
    minimise y  subject to  |f Q - P| - D Q <= y Q_old  at the active points,
where D is the largest error now; Q > 0 at active and gap points keeps poles out.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from rsae_triton.common.errors import ConvergenceError
from rsae_triton.remez.problem import Problem
from rsae_triton.remez.rational import Rational
from rsae_triton.remez.tangent import tangent

KEEP = 0.25  # a step may shrink Q at no point below this share of its old value: DC needs only > 0
GROW = 3.0  # ... nor let it grow beyond this many times, or the program can be unbounded


@dataclass(frozen=True)
class Correction:
    """One step: the new function, the predicted gain y (<= 0), the number of LPs solved, and the points newly
    guarded."""

    r: Rational
    gain: float
    n_lps: int
    guards: np.ndarray


def linear_program(*arguments: Any, **options: Any) -> Any:
    """scipy's `linprog`, imported on first use because the import takes half a second."""
    from scipy.optimize import linprog

    return linprog(*arguments, **options)


def correct(problem: Problem, r: Rational, active: np.ndarray, guards: np.ndarray, far: np.ndarray) -> Correction:
    """Makes one differential-correction step from r on the points `active` [n]; at `guards` [m] only Q is kept
    positive.

    far: points beyond [-1, 1], possibly none, where Q is kept positive as well as on [-1, 1].

    Raises ConvergenceError when the linear program has no answer.
    """

    hull = np.union1d(problem.grid, problem.gap)
    weight = problem.weight(active)
    error = weight * (problem.value(active) - r(active))
    size = float(np.max(np.abs(error)))
    coordinates = tangent(r, active, weight, hull, size)
    hull = np.union1d(hull, far)
    d, q = coordinates.directions(active)
    d, e = d * weight[:, None] / size, (error / size)[:, None]
    _, q_hull = coordinates.directions(hull)
    # P and Q share a common scale. It is fixed by a mean of 1 of Q / Q_old at the active points. With Q(centre) = 1
    # instead, the program gains by growing Q everywhere else and runs into a double root at the centre.
    mean = np.mean(q, axis=0)
    q, q_hull = q - mean, q_hull - mean
    for n_lps in range(1, 13):
        q_guard = coordinates.directions(guards)[1] - mean
        stretch = np.concatenate([q, q_guard, -mean[None]])  # the last row is Q at the centre
        rows = np.concatenate([e * q - d - q, d - e * q - q, -stretch, q])
        y = np.concatenate([np.full(2 * len(active), -1.0), np.zeros(len(stretch) + len(active))])
        keep, grow = np.full(len(stretch), 1 - KEEP), np.full(len(active), GROW)
        bound = np.concatenate([1 - e[:, 0], 1 + e[:, 0], keep, grow])
        cost = np.zeros(rows.shape[1] + 1)
        cost[-1] = 1.0
        if not np.all(np.isfinite(rows)):
            raise ConvergenceError(f"powers of s overflow; largest error so far {size:.6g}")
        answer = linear_program(
            cost,
            A_ub=np.column_stack([rows, y]),
            b_ub=bound,
            bounds=[(None, None)] * len(cost),
            method="highs-ds",
        )
        if answer.x is None:
            raise ConvergenceError(
                f"the linear program of differential correction has no answer ({answer.message}); "
                f"largest error so far {size:.6g}"
            )
        u = answer.x[:-1]
        ratio = 1.0 + q_hull @ u
        moved = coordinates.moved(u / (1.0 - mean @ u))
        between = _under_poles(moved)
        if not len(far):
            between = between[np.abs(between) <= 1.0]
        ratio_between = (1.0 - mean @ u) * moved.denominator(between) / r.denominator(between)
        if min(np.min(ratio), np.min(ratio_between, initial=1.0)) > 0.5 * KEEP:
            return Correction(moved, float(answer.x[-1]), n_lps, guards)
        padded = np.concatenate([[np.inf], ratio, [np.inf]])
        dips = (padded[1:-1] <= padded[:-2]) & (padded[1:-1] < padded[2:]) & (ratio < KEEP)
        guards = np.unique(np.concatenate([guards, hull[dips], between[ratio_between < KEEP]]))
    return Correction(r, 0.0, n_lps, guards)


def _under_poles(r: Rational) -> np.ndarray:
    """Points where Q can dip below zero between any grid's points: under its complex roots, between its real ones."""
    real = np.sort(r.poles().real)
    points = np.concatenate([real, 0.5 * (real[1:] + real[:-1])])
    return np.unique(points)
