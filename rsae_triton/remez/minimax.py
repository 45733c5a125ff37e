"""The minimax solver: differential correction on a growing set of points, started from clustered poles."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice, product

import numpy as np

from rsae_triton.common.errors import ConvergenceError
from rsae_triton.remez.correction import correct
from rsae_triton.remez.extrema import alternation, find_peaks, near_poles
from rsae_triton.remez.problem import Problem
from rsae_triton.remez.rational import Rational, powers, unit_influence

CLOSE = 1e-6  # stop where the alternation proves the error optimal to this relative accuracy
STEPS = 60  # differential-correction steps from one start; 8 to 20 are usual
# Points outside [-1, 1] where some attempts keep Q positive too: poles there are allowed but can mislead the search.
FAR = 1.0 + np.geomspace(1e-3, 1e4, 40)
FAR = np.concatenate([-FAR[::-1], FAR])

ENOUGH = 250  # linear programs after which no further start is tried
NEAR = 0.999  # no further start is tried once the bracket is this narrow


@dataclass(frozen=True)
class Solution:
    """r, its largest error on the domain, and the lower bound that its alternation proves (0: none).

    rounding: errors up to this need no proof.
    """

    r: Rational
    error: float
    bound: float
    n_lps: int
    rounding: float

    @property
    def optimal(self) -> bool:
        return self.error <= max(self.bound * (1 + 10 * CLOSE), self.rounding)


def poles_at(distances: np.ndarray, problem: Problem, p: int, q: int) -> Rational:
    """Fits P by least squares for Q = prod (1 + (t - theta)^2 / distances^2); len(distances) <= q / 2."""
    d = np.ones(1)
    for distance in distances:
        d = np.convolve(d, [1.0, 0.0, distance**-2])
    d = np.concatenate([d, np.zeros(q + 1 - len(d))])
    r = Rational(np.zeros(p + 1), d, problem.theta)
    t = problem.grid
    scales = unit_influence(r, t, p + 1)
    columns = powers(t - r.centre, p + 1) * scales / r.denominator(t)[:, None]
    weight = problem.weight(t)
    a = np.linalg.lstsq(columns * weight[:, None], problem.value(t) * weight, rcond=None)[0]
    return Rational(a * scales, d, problem.theta)


def starts(problem: Problem, p: int, q: int) -> Iterator[Rational]:
    """Yields starting points, the usual one first: poles in pairs above and below theta.

    With a gap they are spaced geometrically from the margin to 1, like Zolotarev's; without one they are tapered
    towards a kink (Stahl 1993). Then come fewer poles, and poles far away for smooth targets.
    """
    fitting = min(q, p + 1) // 2
    for pairs in dict.fromkeys([fitting, (fitting + 1) // 2, q // 2, 0]):
        k = np.arange(pairs) + 0.5
        if problem.margin > 0:
            yield poles_at(problem.margin ** (k / max(pairs, 1)), problem, p, q)
        else:
            yield poles_at(np.exp(3 * (np.sqrt(k) - np.sqrt(pairs))), problem, p, q)
        if pairs:
            yield poles_at(np.linspace(1.0, 2.0, pairs), problem, p, q)


def _first_points(problem: Problem, count: int) -> np.ndarray:
    """Chebyshev points of each piece, which are dense at its ends, where the extrema are."""
    lobes = 0.5 * (1 - np.cos(np.linspace(0, np.pi, count)))
    return problem.inside(np.concatenate([low + (high - low) * lobes for low, high in problem.pieces]))


def _descend(problem: Problem, r: Rational, far: np.ndarray, patience: int = 4) -> Solution:
    p, q = len(r.a) - 1, len(r.d) - 1
    hull = np.union1d(problem.grid, problem.gap)
    active = _first_points(problem, 3 * (p + q + 2))
    guards = np.union1d(problem.gap[::4], far)
    rounding = problem.rounding
    best, n_lps, idle = Solution(r, np.inf, 0.0, 0, rounding), 0, 0
    for _ in range(STEPS):
        peaks = find_peaks(problem, r, near_poles(r, problem))
        chosen = alternation(peaks, p + q + 2)
        bound = 0.0 if chosen is None else float(np.min(np.abs(peaks.error[chosen])))
        idle = 0 if peaks.largest < best.error * (1 - CLOSE) else idle + 1
        if peaks.largest < best.error:
            best = replace(best, r=r, error=peaks.largest)
        best = replace(best, bound=max(bound, best.bound), n_lps=n_lps)
        if best.optimal or idle >= patience:
            break
        active = problem.inside(np.concatenate([active, peaks.t]))
        try:
            step = correct(problem, r, active, guards, far)
        except ConvergenceError:
            n_lps += 1  # counted although it has no answer, or many of these would never end the search
            break
        n_lps, guards, r = n_lps + step.n_lps, step.guards, step.r
        centre = r.lowest(hull)
        if -1 < centre < 1:
            r = r.recentred(centre)
    return replace(best, n_lps=n_lps)


def _attempts(problem: Problem, p: int, q: int, spent: int) -> Iterator[Solution]:
    attempts = product((np.empty(0), FAR), starts(problem, p, q))
    for far, start in islice(attempts, 2):
        yield _descend(problem, start, far)
    # Only types with q far above p get here, where poles wander. The next smaller type, padded with zeros, is a
    # feasible start; it also ensures that more coefficients are never worse.
    for p_less, q_less in ((p, q - 2), (p - 1, q)):
        if p_less >= 0 and q_less >= 0:
            less = solve(problem, p_less, q_less, spent)
            spent += less.n_lps
            a, d = np.zeros(p + 1), np.zeros(q + 1)
            a[: p_less + 1], d[: q_less + 1] = less.r.a, less.r.d
            found = _descend(problem, Rational(a, d, less.r.centre), np.empty(0), patience=15)
            yield replace(found, n_lps=found.n_lps + less.n_lps)
    for far, start in attempts:
        yield _descend(problem, start, far)


def solve(problem: Problem, p: int, q: int, spent: int = 0) -> Solution:
    """Finds the best rational of type (p, q) with Q > 0 on [-1, 1], the gap included.

    spent: linear programs already solved by the caller, counted against the limit. Raises ConvergenceError if no start
    works.
    """
    best, n_lps = None, 0
    for tries, found in enumerate(_attempts(problem, p, q, spent), start=1):
        n_lps += found.n_lps
        if best is None or found.error < best.error:
            best = found if best is None else replace(found, bound=max(found.bound, best.bound))
        # The first two starts may run to full accuracy; later ones only help if nothing has been proved yet.
        if found.optimal or spent + n_lps > ENOUGH or (tries >= 2 and best.error * NEAR <= best.bound):
            break
    if best is None or not np.isfinite(best.error):
        raise ConvergenceError(f"no start of type ({p}, {q}) led to a finite error")
    return replace(best, n_lps=n_lps)
