"""Describes what is approximated: a target on [-1, 1], the gap around its jump, and the grid of points.

All functions of this package work on the scaled pre-activation t = (h - theta) / C_in in [-1, 1].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rsae_triton.common.checks import check_integer, check_number, shown
from rsae_triton.common.errors import ConfigError, NumericsError, first_line

Target = str | Callable[[np.ndarray], np.ndarray]
Weight = Callable[[np.ndarray], np.ndarray] | np.ndarray
TARGETS = ("relu", "step", "jumprelu", "ramp")
MAX_DEGREE = 12
MAX_POINTS = 10**7


@dataclass(frozen=True)
class Problem:
    """The weighted minimax problem: minimise the maximum over the domain of weight(t) * |value(t) - r(t)|.

    pieces: the closed intervals of the domain, in order. breaks: where the target or its slope jumps. grid: points of
    the domain, sorted, [n]. gap: points of [-1, 1] outside the domain; r has no poles there, and is otherwise free.
    """

    name: str
    value: Callable[[np.ndarray], np.ndarray]
    weight: Callable[[np.ndarray], np.ndarray]
    theta: float
    margin: float
    pieces: tuple[tuple[float, float], ...]
    breaks: tuple[float, ...]
    grid: np.ndarray
    gap: np.ndarray

    @property
    def solvable(self) -> bool:
        """False for a jump without a gap: the best possible error is then half the jump, and many rationals reach
        it."""
        jumps = self.name == "step" or (self.name == "jumprelu" and self.theta != 0.0)
        return not jumps or self.margin > 0

    @property
    def rounding(self) -> float:
        """Errors up to this are rounding of float64 sums: there is nothing left to gain or to prove."""
        return 1e-12 * float(np.max(self.weight(self.grid) * (np.abs(self.value(self.grid)) + 1e-3)))

    def inside(self, t: np.ndarray) -> np.ndarray:
        """The points of t that lie in the domain, sorted, without duplicates."""
        t = np.unique(t)
        keep = np.zeros(t.shape, bool)
        for low, high in self.pieces:
            keep |= (t >= low) & (t <= high)
        return t[keep]

    def outside(self, t: np.ndarray) -> np.ndarray:
        """The points of t that lie in the gap, sorted, without duplicates."""
        if len(self.pieces) < 2:
            return np.empty(0)
        return np.unique(t[(t > self.pieces[0][1]) & (t < self.pieces[1][0])])


def parse_degree(degree: str | Sequence[int]) -> tuple[int, int]:
    """(p, q) from a pair or from text like "9,8". Raises ConfigError unless 0 <= p, q <= 12."""
    try:
        # Indexed, so that a set, which has no order, is refused.
        parts = degree.split(",") if isinstance(degree, str) else [degree[i] for i in range(len(degree))]
        p, q = (int(part) for part in parts)
        exact = all(int(part) == float(part) and not isinstance(part, bool) for part in parts)
    except (TypeError, ValueError, OverflowError, LookupError):
        exact, p, q = False, -1, -1
    if not exact or not (0 <= p <= MAX_DEGREE and 0 <= q <= MAX_DEGREE):
        raise ConfigError(f"degree is {shown(degree)}; give whole numbers p,q from 0 to {MAX_DEGREE}, such as 9,8")
    return p, q


def ramp(t: np.ndarray) -> np.ndarray:
    """0 up to -1, 1 from 0 on, and between them the smooth rational step 1/2 + u / (1 + u^2) with u = 2 t + 1.

    This is a gate whose slope lies entirely below its threshold at 0, so that amplitudes above it are unchanged.
    """
    u = np.clip(2.0 * t + 1.0, -1.0, 1.0)
    return 0.5 + u / (1.0 + u * u)


def _builtin(name: str, theta: float) -> Callable[[np.ndarray], np.ndarray]:
    if name == "relu":
        return lambda t: np.maximum(t, 0.0)
    if name == "step":
        return lambda t: np.where(t > theta, 1.0, 0.0)
    if name == "ramp":
        return ramp
    return lambda t: np.where(t > theta, t, 0.0)


def _checked(function: Callable[[np.ndarray], np.ndarray], what: str) -> Callable[[np.ndarray], np.ndarray]:
    def value(t: np.ndarray) -> np.ndarray:
        try:
            given = np.asarray(function(t))
            if np.iscomplexobj(given):
                raise TypeError("complex numbers")
            result = given.astype(np.float64)
        except Exception as error:  # the caller's function can raise anything
            reason = first_line(error)
            raise ConfigError(
                f"{what} must be a function of a numpy array that gives one of numbers; it failed: {reason}"
            ) from error
        if result.shape != t.shape:
            raise ConfigError(f"{what} must be vectorised: it gave shape {result.shape} for shape {t.shape}")
        if not np.all(np.isfinite(result)):
            raise NumericsError(f"{what} is not finite at t = {t[~np.isfinite(result)].flat[0]:.6g}")
        return result

    return value


def _weight_function(weight: Weight | None, points: int) -> Callable[[np.ndarray], np.ndarray]:
    if weight is None:
        return np.ones_like
    if callable(weight):
        return _checked(weight, "weight")
    try:
        values = np.asarray(weight, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"weight is a {type(weight).__name__}; give a function of t, or numbers ({error})") from error
    if values.shape != (points,):
        raise ConfigError(f"an array weight needs shape ({points},), one value a grid point; got {values.shape}")
    grid = np.linspace(-1.0, 1.0, points)
    return _checked(lambda t: np.interp(t, grid, values), "weight")


def around(centre: float, nearest: float, count: int = 60) -> np.ndarray:
    """Points that cluster geometrically at `centre` from both sides, [2 * count + 1], not clipped.

    The extrema of a best approximant cluster at a singularity at a geometric rate (Stahl 1993), so an even grid alone
    misses most of them.
    """
    steps = np.geomspace(nearest, 2.0, count)
    return np.concatenate([centre - steps, [centre], centre + steps])


def make_problem(
    target: Target, theta: float = 0.0, margin: float = 0.0, weight: Weight | None = None, points: int = 4001
) -> Problem:
    """Checks the arguments of `fit_gate` and builds the grid.

    Raises:
        ConfigError: an unknown target, a gap that leaves no domain on one side, or a weight that is negative or nowhere
            positive.
        NumericsError: target or weight is not finite.
    """
    check_number("theta", theta)
    check_number("margin", margin, least=0)
    check_integer("points", points, 101, MAX_POINTS)
    theta, margin = float(theta), float(margin)
    if isinstance(target, str):
        if target not in TARGETS:
            raise ConfigError(f"unknown target {target!r}; use one of {', '.join(TARGETS)} or a callable")
        if target in ("relu", "ramp") and theta != 0.0:
            raise ConfigError(f"{target} has its kink at 0: theta must be 0, got {theta}; use jumprelu for a threshold")
        name, value = target, _builtin(target, theta)
    elif callable(target):
        name, value = getattr(target, "__name__", type(target).__name__), target
    else:
        raise ConfigError(f"target must be a name or a callable; got {type(target).__name__}")
    if abs(theta) > 1.0:
        raise ConfigError(f"theta must lie in [-1, 1], the scaled pre-activation's range; got {theta}")
    if abs(theta) + margin >= 1.0:
        raise ConfigError(f"theta={theta} with margin={margin} leaves no domain on one side of the gap in [-1, 1]")

    low, high = theta - margin, theta + margin
    pieces = ((-1.0, low), (high, 1.0)) if margin > 0 else ((-1.0, 1.0),)
    breaks = (theta,)
    problem = Problem(
        name,
        _checked(value, "target"),
        _weight_function(weight, points),
        theta,
        margin,
        pieces,
        breaks,
        np.empty(0),
        np.empty(0),
    )
    # The edges of a gap are ordinary interval ends: extrema come no closer than a fraction of the margin.
    clusters = [around(edge, max(margin * 1e-3, 1e-10)) for edge in {low, high}]
    laid = np.concatenate([np.linspace(-1.0, 1.0, points), *clusters, np.cos(np.linspace(0, np.pi, 301))])
    gap = (
        problem.outside(np.concatenate([np.linspace(low, high, 41), around(theta, margin * 1e-3, 20)]))
        if margin > 0
        else np.empty(0)
    )
    grid = problem.inside(laid)
    weights = problem.weight(grid)
    if np.any(weights < 0) or not np.any(weights > 0):
        raise ConfigError("weight must be >= 0 and somewhere > 0 on the domain")
    return Problem(name, problem.value, problem.weight, theta, margin, pieces, breaks, grid, gap)
