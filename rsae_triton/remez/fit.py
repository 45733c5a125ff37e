"""`fit_gate`: fits a certified rational gate to a target."""

import time
from collections.abc import Sequence

import numpy as np

from rsae_triton.common.checks import check_number
from rsae_triton.common.errors import ConfigError, ConvergenceError
from rsae_triton.remez.bound import program_bound
from rsae_triton.remez.extrema import Peaks, alternation, find_peaks, near_poles
from rsae_triton.remez.gatefit import GateFit
from rsae_triton.remez.least_squares import checked_samples, density, solve_squares
from rsae_triton.remez.minimax import solve
from rsae_triton.remez.problem import MAX_DEGREE, Problem, Target, Weight, make_problem, parse_degree
from rsae_triton.remez.rational import Rational, float32_error, safe_pade, unit_influence
from rsae_triton.remez.relaxed import kinks, solve_relaxed
from rsae_triton.remez.table import shipped_gate

METHODS = ("minimax", "least_squares", "relaxed_remez")
ALMOST = 0.9995  # where the alternation proves less than this share, a linear program is tried too
REQUIRED = 0.999  # a minimax fit with a lower bound below this share of its error is refused
AUTO_TOL = 1e-3
SINGLE = 3e-6  # a float32 evaluation error up to this is no reason to choose another centre


def fit_gate(
    target: Target,
    degree: str | Sequence[int],
    *,
    theta: float = 0.0,
    margin: float = 0.0,
    weight: Weight | None = None,
    method: str = "minimax",
    points: int = 4001,
    tol: float | None = None,
    samples: np.ndarray | None = None,
    table: bool = True,
) -> GateFit:
    """Fits the best rational gate of type `degree` = (p, q) to a target on [-1, 1], with a certificate.

    "minimax" is differential correction (Barrodale, Powell & Roberts 1972) with exchange. Its lower bound is de la
    Vallee-Poussin's or, where the error alternates too little, comes from an infeasible linear program. It holds for
    all rationals of type (p, q), q rounded down to even, that have no pole in [-1, 1].

    An odd q is fitted as q - 1, with b_q = 0: an odd denominator has a real root, and the centre that makes the safe
    Pade form exact is then often an end of [-1, 1], where powers of s are useless in float32.

    Args:
        target: "relu" max(t, 0); "step" H(t - theta); "jumprelu" t * H(t - theta); "ramp" (see `problem.ramp`: from 0
            at -1 smoothly to 1 at 0, then 1); or a vectorised callable.
        degree: (p, q) or "p,q", each 0 to 12, or "auto": a search up to (12, 12), see `tol`.
        theta, margin: |t - theta| < margin is left out of the fit (but has no poles either). A jump needs margin > 0
            for "minimax".
        weight: a function of t, or [points] values on the even grid; "minimax" minimises max weight * |error|,
            "least_squares" the sum of weight * error^2.
        method: "minimax"; "least_squares"; or "relaxed_remez", the published initialiser (Adam on a penalty at fixed
            nodes), kept for comparison: its error is far from optimal, it takes seconds, and it has no certificate.
        points: size of the even grid; extrema are refined between its points.
        tol: return the first of the types (1,0), (3,2), (5,4), ... up to `degree` with error <= tol ("minimax") or mse
            <= tol ("least_squares"); 1e-3 where degree is "auto".
        samples: pre-activations t, any shape, clipped to [-1, 1]; "least_squares" fits them instead of the grid, and
            `mse` is computed on them.
        table: if the package ships a fit for exactly these arguments, return it instead of fitting again.

    Raises:
        ConfigError: an argument that cannot be used, or a tol that no type up to `degree` reaches.
        NumericsError: a target, weight or samples that are not finite.
        ConvergenceError: "minimax" ended with lower_bound < 0.999 * error; the message gives the best bracket.
    """
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}; use one of {', '.join(METHODS)}")
    auto = isinstance(degree, str) and degree == "auto"
    limit = (MAX_DEGREE, MAX_DEGREE) if auto else parse_degree(degree)
    problem = make_problem(target, theta, margin, weight, points)
    if method == "minimax" and not problem.solvable:
        raise ConfigError(
            f"{target} jumps at theta={theta}: no rational comes closer than half the jump with margin=0; "
            "give the half-width of the gap to leave out, for example margin=0.02"
        )
    if samples is not None:
        samples = checked_samples(samples)
    if tol is None and auto:
        tol = AUTO_TOL
    table = table and method == "minimax" and weight is None and samples is None and points == 4001

    def one(p: int, q: int) -> GateFit:
        found = shipped_gate(target, (p, q), theta=theta, margin=margin) if isinstance(target, str) and table else None
        try:
            return found or _fit(problem, p, q, method, points, samples, weight is not None)
        except np.linalg.LinAlgError as error:
            raise ConvergenceError(
                f"type ({p}, {q}) cannot be fitted in float64 with margin={margin:g} ({error}); choose a wider margin"
            ) from error

    if tol is None:
        return one(*limit)
    check_number("tol", tol, above=0)
    reached: list[float] = []
    refused: ConvergenceError | None = None
    for p, q in ladder(*limit):
        try:
            fit = one(p, q)
        except ConvergenceError as error:  # no certified fit of this type; the next may have one
            refused = error
            continue
        reached.append(fit.error if method == "minimax" else fit.mse)
        if reached[-1] <= tol:
            return fit
    if not reached and refused is not None:
        raise refused
    raise ConfigError(f"no type up to {limit} reaches tol={tol:g}; the best has {min(reached):.6g}; raise either")


def ladder(p: int, q: int) -> list[tuple[int, int]]:
    """The types tried for a `tol`: (k + 1, k) for even k as far as (p, q) allows, then (p, q) itself."""
    steps = [(min(k + 1, p), k) for k in range(0, q + 1, 2)]
    return list(dict.fromkeys([*steps, (p, q)]))


def _fit(
    problem: Problem, p: int, q: int, method: str, points: int, samples: np.ndarray | None, weighted: bool
) -> GateFit:
    started = time.perf_counter()
    fitted = q if method == "relaxed_remez" else q - q % 2
    extra = np.empty(0)
    if method == "minimax":
        solution = solve(problem, p, fitted)
        r, n_lps = solution.r, solution.n_lps
        if np.max(np.abs(r(problem.grid))) <= 1e-9 * solution.error:  # r keeps one sign where the target has both
            r = Rational(np.zeros(p + 1), np.eye(1, fitted + 1)[0], 0.0)
    elif method == "least_squares":
        r, n_lps = solve_squares(problem, p, fitted, *density(problem, samples, points))
    else:
        r, n_lps = solve_relaxed(problem, p, q), 0
        extra = kinks(r, problem)
    hull = np.union1d(problem.grid, problem.gap)
    if method != "relaxed_remez":
        r = centred(r, hull)

    def gate(t: np.ndarray) -> np.ndarray:
        return safe_pade(r.a, r.d[1:], r.centre, t)

    peaks = find_peaks(problem, gate, np.union1d(near_poles(r, problem), extra))
    bound, reference, certificate = 0.0, np.empty(0), "none"
    # otherwise the safe form is not a rational function and no theorem applies
    if np.all(r.denominator(hull) >= 1.0 - 1e-9):
        bound, reference, certificate = certify(problem, r, peaks, with_program=method == "minimax")
    if method == "minimax" and certificate != "rounding" and bound < REQUIRED * peaks.largest:
        raise ConvergenceError(
            f"no optimal rational of type ({p}, {q}) for {problem.name} was found: the least error lies in "
            f"[{bound:.6g}, {peaks.largest:.6g}]; use another degree (p near q or above) or a wider margin"
        )
    t = problem.inside(np.linspace(-1.0, 1.0, points)) if samples is None else samples
    b, scales = np.zeros(q), unit_influence(r, hull, q + 1, safe=True)[1:]
    b[:fitted] = r.d[1:]
    return GateFit(
        a=r.a,
        b=b,
        centre=r.centre,
        degree=(p, q),
        target=problem.name,
        theta=problem.theta,
        margin=problem.margin,
        error=peaks.largest,
        lower_bound=bound,
        reference=reference,
        mse=float(np.mean((problem.value(t) - gate(t)) ** 2)),
        numerator_scale=unit_influence(r, hull, p + 1, safe=True),
        denominator_scale=scales,
        n_lps=n_lps,
        seconds=time.perf_counter() - started,
        method=method,
        certificate=certificate,
        weighted=weighted,
        problem=problem,
    )


def centred(r: Rational, hull: np.ndarray) -> Rational:
    """Rewrites r about the lowest point of Q on the real line, where B = Q - 1 >= 0 and so the safe Pade form is exact.

    Where Q has zeros or no minimum outside [-1, 1], or where powers about that minimum are too large for float32, the
    lowest point on [-1, 1] is used instead.
    """
    if not np.any(r.d[1:]):
        return r.recentred(0.0)  # a polynomial: powers about the middle are best conditioned
    here, anywhere = r.lowest(hull), r.lowest_anywhere()
    near = _about(r, here, stationary=-1.0 < here < 1.0)
    if anywhere is None or abs(anywhere) < 1.0:
        return near
    far = _about(r, anywhere, stationary=True)
    errors = [float32_error(one.a, one.d[1:], one.centre) for one in (near, far)]
    return far if errors[1] <= max(errors[0], SINGLE) else near


def _about(r: Rational, centre: float, *, stationary: bool) -> Rational:
    r = r.recentred(centre)
    d = r.d.copy()
    if stationary:
        d[1] = 0.0  # b_1 is zero up to rounding, and a nonzero value would make B change sign
    return Rational(r.a, d, centre)


def _needed(r: Rational) -> int:
    """How many alternating points prove that r = P / Q is best among all P1 / Q1 of its type (p, q) with Q1 > 0.

    P1 Q - P Q1 would have a zero between any two of the points, and its degree is at most max(p + deg Q, q + deg P).
    That makes p + q + 2 points, or fewer if r is of a smaller type itself (its defect).
    """
    p, q = len(r.a) - 1, len(r.d) - 1
    if not np.any(r.a):
        return p + 2
    return max(p + int(np.flatnonzero(r.d)[-1]), q + int(np.flatnonzero(r.a)[-1])) + 2


def certify(problem: Problem, r: Rational, peaks: Peaks, *, with_program: bool) -> tuple[float, np.ndarray, str]:
    """Returns (lower bound, reference points, kind of proof), given the errors `peaks` of the function as evaluated."""
    chosen = alternation(peaks, _needed(r))
    bound = 0.0 if chosen is None else float(np.min(np.abs(peaks.error[chosen])))
    reference = np.empty(0) if chosen is None else peaks.t[chosen]
    if peaks.largest <= problem.rounding:
        return bound, reference, "rounding"
    if with_program and bound < ALMOST * peaks.largest:
        top = peaks.t[np.abs(peaks.error) > 0.9 * peaks.largest]
        # Q may vanish at a peak itself, so the points beside it are used for the proof
        steps = np.geomspace(1e-6, 1e-2, 20)
        beside = problem.inside((top[:, None] + np.concatenate([-steps, steps])).ravel())
        points = np.concatenate([problem.grid[::10], peaks.t, beside])
        proved, support = program_bound(problem, r, np.unique(points))
        if proved > bound:
            return proved, support, "program"
    return bound, reference, "none" if chosen is None else "alternation"
