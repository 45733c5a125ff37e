"""`fit_gate`: from a target to a certified rational gate."""

import time
from collections.abc import Sequence

import numpy as np

from rsae_triton.errors import ConfigError
from rsae_triton.remez.extrema import alternation, find_peaks, near_poles
from rsae_triton.remez.gatefit import GateFit
from rsae_triton.remez.minimax import solve
from rsae_triton.remez.problem import MAX_DEGREE, Problem, Target, Weight, make_problem
from rsae_triton.remez.rational import Rational, safe_pade, unit_influence


def parse_degree(degree: str | Sequence[int]) -> tuple[int, int]:
    """(p, q) from a pair or from text like "9,8". Raises ConfigError unless 0 <= p, q <= 12."""
    parts = degree.split(",") if isinstance(degree, str) else list(degree)
    try:
        p, q = (int(part) for part in parts)
        exact = all(int(part) == float(part) for part in parts)
    except (TypeError, ValueError):
        exact, p, q = False, -1, -1
    if not exact or not (0 <= p <= MAX_DEGREE and 0 <= q <= MAX_DEGREE):
        raise ConfigError(f"degree must be a pair p,q of whole numbers from 0 to {MAX_DEGREE}; got {degree!r}")
    return p, q


def centred(r: Rational, hull: np.ndarray) -> Rational:
    """r about the point that makes Q >= 1 wherever it is evaluated: the lowest point of Q on [-1, 1]."""
    if not np.any(r.d[1:]):
        return r.recentred(0.0)  # a polynomial: powers about the middle are the best conditioned
    centre = r.lowest(hull)
    r = r.recentred(centre)
    if -1.0 < centre < 1.0:
        d = r.d.copy()
        d[1] = 0.0  # a stationary point: what is left of b_1 is rounding, and would make B change sign
        r = Rational(r.a, d, centre)
    return r


def fit_gate(
    target: Target, degree: str | Sequence[int], *, theta: float = 0.0, margin: float = 0.0,
    weight: Weight | None = None, method: str = "minimax", points: int = 4001, tol: float | None = None,
    samples: np.ndarray | None = None,
) -> GateFit:
    """Fits a rational gate of type (p, q) to a target on [-1, 1]."""
    started = time.perf_counter()
    p, q = parse_degree(degree)
    problem = make_problem(target, theta, margin, weight, points)
    if method != "minimax":
        raise ConfigError(f"unknown method {method!r}; use minimax")
    solution = solve(problem, p, q - q % 2)
    return finished(problem, solution.r, q, method, points, samples, solution.n_lps, started)


def finished(
    problem: Problem, r: Rational, q: int, method: str, points: int, samples: np.ndarray | None, n_lps: int,
    started: float,
) -> GateFit:
    """The GateFit of r: centred, measured and certified in the form in which it will be evaluated."""
    hull = np.union1d(problem.grid, problem.gap)
    r = centred(r, hull)
    p, q_even = len(r.a) - 1, len(r.d) - 1
    r = Rational(r.a, np.concatenate([r.d, np.zeros(q - q_even)]), r.centre)

    def gate(t: np.ndarray) -> np.ndarray:
        return safe_pade(r.a, r.d[1:], r.centre, t)

    peaks = find_peaks(problem, gate, near_poles(r, problem))
    chosen = alternation(peaks, p + q_even + 2)
    even = problem.inside(np.linspace(-1.0, 1.0, points)) if samples is None else samples
    return GateFit(
        a=r.a, b=r.d[1:], centre=r.centre, degree=(p, q), target=problem.name, theta=problem.theta,
        margin=problem.margin, error=peaks.largest,
        lower_bound=0.0 if chosen is None else float(np.min(np.abs(peaks.error[chosen]))),
        reference=np.empty(0) if chosen is None else peaks.t[chosen],
        mse=float(np.mean((problem.value(even) - gate(even)) ** 2)),
        numerator_scale=unit_influence(r, hull, p + 1), denominator_scale=unit_influence(r, hull, q + 1)[1:],
        n_lps=n_lps, seconds=time.perf_counter() - started, method=method,
        problem=problem, certificate="none" if chosen is None else "alternation",
    )
