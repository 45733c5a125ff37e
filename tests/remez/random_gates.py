"""The random draw of the acceptance test, shared with benchmarks/bench_gates.py, and gates given as callables."""

from collections.abc import Callable, Iterator

import numpy as np
from scipy.special import erf


def gelu(t: np.ndarray) -> np.ndarray:
    """GELU for pre-activations up to 6, scaled to [-1, 1]."""
    return 0.5 * t * (1 + erf(6 * t / np.sqrt(2)))


def silu(t: np.ndarray) -> np.ndarray:
    return t / (1 + np.exp(-8 * t))


def tanh_shrink(t: np.ndarray) -> np.ndarray:
    return 4 * t - np.tanh(4 * t)


def soft_threshold(t: np.ndarray) -> np.ndarray:
    """Two-sided: a kink at -1/4 and one at 1/4."""
    return np.sign(t) * np.maximum(np.abs(t) - 0.25, 0.0)


def shifted_relu(t: np.ndarray) -> np.ndarray:
    """Soft threshold of codes that are not negative: max(t - 1/4, 0)."""
    return np.maximum(t - 0.25, 0.0)


CALLABLES: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
    gelu,
    silu,
    tanh_shrink,
    soft_threshold,
    shifted_relu,
    np.exp,
)
NAMED = ("relu", "step", "jumprelu")
Draw = tuple[str | Callable[[np.ndarray], np.ndarray], tuple[int, int], float, float]


def draws(n: int, seed: int) -> Iterator[Draw]:
    """n times (target, degree, theta, margin): theta in [0, .6], margin in [.01, .1], any type up to (9, 8).

    Half of the targets are named ones. relu has no threshold: its theta is 0; the gap is left out for all.
    """
    rng = np.random.default_rng(seed)
    for _ in range(n):
        named = rng.uniform() < 0.5
        i = int(rng.integers(12))
        target = NAMED[i % 3] if named else CALLABLES[i % 6]
        degree = int(rng.integers(0, 10)), int(rng.integers(0, 9))
        theta, margin = float(rng.uniform(0, 0.6)), float(rng.uniform(0.01, 0.1))
        yield target, degree, 0.0 if target == "relu" else theta, margin


def value(target: str | Callable[[np.ndarray], np.ndarray], theta: float, t: np.ndarray) -> np.ndarray:
    """The target at t, written anew: nothing of the package."""
    if callable(target):
        return target(t)
    x = np.clip(t + 1, 0, 1)  # the ramp's own variable; its step in powers of x, not of 2 t + 1
    ramp = x**2 / (x**2 + (1 - x) ** 2)
    return {"relu": np.maximum(t, 0), "step": 1.0 * (t > theta), "jumprelu": t * (t > theta), "ramp": ramp}[target]


def denominator_dip(b: np.ndarray, centre: float, t: np.ndarray) -> float:
    """min B over t, relative to 1 + the sum of its terms' sizes there: 0 or above where Q = 1 + B >= 1."""
    s, terms = t - centre, np.concatenate([[0.0], b])
    size = 1 + np.polynomial.polynomial.polyval(np.abs(s), np.abs(terms))
    return float(np.min(np.polynomial.polynomial.polyval(s, terms) / size))
