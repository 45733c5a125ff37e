"""Rational functions in powers of s = t - centre, and the centre that makes one a safe Pade form.

r = P(s) / Q(s) with Q = 1 + sum_{1<=j<=q} b_j s^j = 1 + B. The gate evaluates P / (1 + |B|), so B must not be negative.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np


def horner(coefficients: np.ndarray, s: Any) -> Any:
    """Returns sum_k coefficients[k] * s**k in the dtype of s (numpy array, torch tensor or number)."""
    value = s * 0.0 + float(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * s + float(coefficient)
    return value


def powers(s: np.ndarray, count: int) -> np.ndarray:
    """s^0 .. s^(count-1), [n, count]."""
    return np.vander(s, count, increasing=True)


def safe_pade(a: np.ndarray, b: np.ndarray, centre: float, t: Any) -> Any:
    """Returns P(s) / (1 + |B(s)|) with s = t - centre, in the dtype of t. a: [p+1]. b: [q], of s^1 .. s^q."""
    s = t - centre
    numerator = horner(a, s)
    return numerator / (1.0 + abs(s * horner(b, s))) if len(b) else numerator


def shifted(coefficients: np.ndarray, by: float) -> np.ndarray:
    """Coefficients of x -> p(x + by): a Taylor shift by repeated synthetic division, in extended precision."""
    c = np.array(coefficients, dtype=np.longdouble)
    for i in range(len(c) - 1):
        for k in range(len(c) - 2, i - 1, -1):
            c[k] += np.longdouble(by) * c[k + 1]
    return c


@dataclass(frozen=True)
class Rational:
    """P(s) / Q(s) with s = t - centre; Q may be negative somewhere. a: [p+1]; d: [q+1] with d[0] = 1."""

    a: np.ndarray
    d: np.ndarray
    centre: float

    def numerator(self, t: np.ndarray) -> np.ndarray:
        return horner(self.a, t - self.centre)

    def denominator(self, t: np.ndarray) -> np.ndarray:
        return horner(self.d, t - self.centre)

    def __call__(self, t: np.ndarray) -> np.ndarray:
        return self.numerator(t) / self.denominator(t)

    def recentred(self, centre: float) -> "Rational":
        """The same function in powers of t - centre, normalised so that Q(centre) = 1."""
        by = float(centre) - self.centre
        a, d = shifted(self.a, by), shifted(self.d, by)
        return Rational((a / d[0]).astype(np.float64), (d / d[0]).astype(np.float64), float(centre))

    def poles(self) -> np.ndarray:
        """The complex roots of Q in t. Leading coefficients of negligible relative size are dropped."""
        # In units u = s * scale where Q's coefficients have similar size, which suits companion matrices.
        used = np.flatnonzero(self.d)
        d = self.d[: used[-1] + 1]
        if len(d) < 2:
            return np.empty(0, complex)
        scale = abs(d[-1]) ** (1.0 / (len(d) - 1))
        scaled = d / scale ** np.arange(len(d))
        return np.polynomial.polynomial.polyroots(scaled) / scale + self.centre

    def lowest(self, points: np.ndarray) -> float:
        """The minimiser of Q over the interval that `points` [n] (sorted) spans, to the last bit."""
        if not np.any(self.d[1:]):
            return float(points[len(points) // 2])
        slope = self.d[1:] * np.arange(1, len(self.d))
        slopes = horner(slope, points - self.centre)
        i = int(np.argmin(self.denominator(points)))
        # Near a flat minimum Q is constant up to rounding, but the sign of its slope still tells on which side we are.
        falling, rising = np.flatnonzero(slopes[: i + 1] < 0), np.flatnonzero(slopes[i:] > 0)
        if len(falling) == 0 or len(rising) == 0:
            return float(points[0] if len(falling) == 0 else points[-1])
        low, high = points[falling[-1]], points[i + rising[0]]
        for _ in range(80):
            middle = 0.5 * (low + high)
            if horner(slope, middle - self.centre) < 0:
                low = middle
            else:
                high = middle
        return float(0.5 * (low + high))

    def lowest_anywhere(self) -> float | None:
        """The minimiser of Q over the whole real line; None unless Q > 0 on all of it and grows at both ends."""
        used = np.flatnonzero(self.d)
        d = self.d[: used[-1] + 1]
        poles = self.poles()
        if len(d) < 3 or len(d) % 2 == 0 or d[-1] <= 0 or np.any(np.abs(poles.imag) <= 1e-9 * np.abs(poles)):
            return None
        slope = d[1:] * np.arange(1, len(d))
        flat = Rational(np.ones(1), slope / slope[0], self.centre).poles() if slope[0] else np.array([self.centre])
        flat = flat.real[np.abs(flat.imag) <= 1e-6 * (1 + np.abs(flat.real))]
        if len(flat) == 0:
            return None
        at = float(flat[np.argmin(self.denominator(flat))])
        for _ in range(4):  # Newton on the slope, about the present point so that nothing cancels
            moved = shifted(d, at - self.centre)
            if moved[2] <= 0:
                return None
            at -= float(moved[1] / (2 * moved[2]))
        return at


def unit_influence(r: Rational, points: np.ndarray, count: int, *, safe: bool = False) -> np.ndarray:
    """s_k = 1 / max |s^k / Q| over points, k < count: then a_k / s_k is the most that term k adds to r.

    safe: use 1 + |B| for Q.
    """
    s, q = points - r.centre, r.denominator(points)
    size = 1.0 + np.abs(q - 1.0) if safe else np.abs(q)
    return 1.0 / np.max(powers(np.abs(s), count) / size[:, None], axis=0)


def float32_error(a: np.ndarray, b: np.ndarray, centre: float) -> float:
    """max |r in float32 - r in float64| of the safe form, over 4001 points of [-1, 1] that float32 represents
    exactly."""
    t = np.linspace(-1.0, 1.0, 4001).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.abs(safe_pade(a, b, centre, t) - safe_pade(a, b, centre, t.astype(np.float64)))
    return float(np.max(error)) if np.all(np.isfinite(error)) else float("inf")
