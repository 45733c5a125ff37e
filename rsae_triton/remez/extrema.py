"""Finds where the error peaks on the continuous domain, and the lower bound that its alternation proves."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rsae_triton.remez.problem import Problem
from rsae_triton.remez.rational import Rational

FALLEN = 1e-6  # a relative fall of the error by this much is not rounding, down to errors of about 1e-9


@dataclass(frozen=True)
class Peaks:
    """Signed weighted errors at their local extrema. t, error: [k], sorted by t. largest: max |error|."""

    t: np.ndarray
    error: np.ndarray

    @property
    def largest(self) -> float:
        return float(np.max(np.abs(self.error)))


def near_poles(r: Rational, problem: Problem) -> np.ndarray:
    """Points of the domain beside every pole of r. A pole near the real line makes a spike as wide as its imaginary
    part, which an even grid can miss."""
    poles = r.poles()
    poles = poles[(np.abs(poles.real) < 1.5) & (np.abs(poles.imag) < 0.1)]
    offsets = np.concatenate([-np.geomspace(0.1, 30, 15), [0.0], np.geomspace(0.1, 30, 15)])
    return problem.inside((poles.real[:, None] + np.abs(poles.imag)[:, None] * offsets).ravel())


def bracket(size: np.ndarray, top: np.ndarray, steps: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Returns indices (low, high) around each maximum `top` of `size` [n] between which the true maximum lies.

    The neighbouring points are not enough. Where two points nearly coincide, rounding decides which has the larger
    error, and the maximum may lie beyond both. So each end moves outward until the error has fallen by `FALLEN`, which
    is more than rounding, or `steps` times.
    """
    low, high = np.maximum(top - 1, 0), np.minimum(top + 1, len(size) - 1)
    enough = size[top] * (1 - FALLEN)
    for _ in range(steps):
        low = np.where(size[low] > enough, np.maximum(low - 1, 0), low)
        high = np.where(size[high] > enough, np.minimum(high + 1, len(size) - 1), high)
    return low, high


def find_peaks(problem: Problem, r: Callable[[np.ndarray], np.ndarray], extra: np.ndarray, zooms: int = 5) -> Peaks:
    """Finds the local maxima of |weight * (value - r)| over the continuous domain: on the grid, then between its
    points.

    Each maximum on the grid is replaced by the best of 17 points of its `bracket`, `zooms` times; each zoom
    narrows the bracket eightfold.
    """

    def error(t: np.ndarray) -> np.ndarray:
        return problem.weight(t) * (problem.value(t) - r(t))

    grid = np.union1d(problem.grid, extra) if len(extra) else problem.grid
    times, errors = [], []
    for low_end, high_end in problem.pieces:
        t = grid[(grid >= low_end) & (grid <= high_end)]
        size = np.abs(error(t))
        padded = np.concatenate([[-1.0], size, [-1.0]])
        top = np.flatnonzero((padded[1:-1] >= padded[:-2]) & (padded[1:-1] > padded[2:]))
        low, high = (t[end] for end in bracket(size, top))
        for _ in range(zooms):
            ladder = low[:, None] + (high - low)[:, None] * np.linspace(0.0, 1.0, 17)
            ladder = np.clip(ladder, low_end, high_end)
            best = np.argmax(np.abs(error(ladder.ravel())).reshape(ladder.shape), axis=1)
            rows = np.arange(len(top))
            low, high = ladder[rows, np.maximum(best - 1, 0)], ladder[rows, np.minimum(best + 1, 16)]
            peak = ladder[rows, best]
        # The bracket's grid point itself stays a candidate, because zooming may step off a kink.
        found = np.where(np.abs(error(peak)) >= size[top], peak, t[top])
        times.append(found)
        errors.append(error(found))
    return Peaks(np.concatenate(times), np.concatenate(errors))


def alternation(peaks: Peaks, count: int) -> np.ndarray | None:
    """Picks `count` peaks of alternating sign whose smallest |error| is as large as possible; None if fewer alternate.

    Returns their indices. First the largest of each run of one sign is taken. Then, while there are too many, the
    smallest is dropped: alone if at an end, else together with its smaller neighbour.
    """
    kept: list[int] = []
    for i, e in enumerate(peaks.error):
        if e == 0.0:
            continue
        if kept and (peaks.error[kept[-1]] > 0) == (e > 0):
            if abs(e) > abs(peaks.error[kept[-1]]):
                kept[-1] = i
        else:
            kept.append(i)
    while len(kept) > count:
        size = np.abs(peaks.error[kept])
        if len(kept) == count + 1:
            kept.pop(0 if size[0] < size[-1] else -1)
            continue
        i = int(np.argmin(size))
        if i in (0, len(kept) - 1):
            kept.pop(i)
        else:
            j = i - 1 if size[i - 1] < size[i + 1] else i
            del kept[j : j + 2]
    return np.array(kept) if len(kept) == count else None
