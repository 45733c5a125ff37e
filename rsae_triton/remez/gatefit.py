"""`GateFit`, the result of a fit: the coefficients in the form in which they are evaluated, and the certificate."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rsae_triton.common.errors import FormatError, NumericsError
from rsae_triton.remez.problem import Problem
from rsae_triton.remez.rational import Rational, float32_error, safe_pade

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOT_SAVED = "problem"  # it holds functions; `plot` rebuilds it for named targets
NUMBERS = ("centre", "theta", "margin", "error", "lower_bound", "mse", "n_lps", "seconds")
ARRAYS = ("a", "b", "reference", "numerator_scale", "denominator_scale")


@dataclass(frozen=True, eq=False, repr=False)
class GateFit:
    """A fitted gate r(t) = P(s) / (1 + |B(s)|) with s = t - centre, for t in [-1, 1].

    Attributes:
        a: [p+1], coefficients of s^0 .. s^p. b: [q], of s^1 .. s^q.
        centre: the minimiser of Q = 1 + B, so B >= 0 (not for method "relaxed_remez": its centre is 0 and its B changes
            sign).
        error: max |target - r| (times the weight) over the continuous domain, with r evaluated in this form in float64.
        lower_bound: no rational of this degree is closer to the target. reference: [n] points that prove it.
        certificate: "alternation", "program", "rounding" or "none": what proves lower_bound; "none" is never a minimax
            fit.
        mse: mean squared error over the fit's `samples` if it had any, else over the even grid in the domain.
        numerator_scale [p+1], denominator_scale [q]: s_k = 1 / max |s^k / Q|; train a / numerator_scale.
        weighted: whether error and lower_bound include a weight. problem: what was fitted; None for a fit read from a
            file.
        n_lps, seconds: linear programs and time that the fit took (for a shipped gate, when the table was made).
    """

    a: np.ndarray
    b: np.ndarray
    centre: float
    degree: tuple[int, int]
    target: str
    theta: float
    margin: float
    error: float
    lower_bound: float
    reference: np.ndarray
    mse: float
    numerator_scale: np.ndarray
    denominator_scale: np.ndarray
    n_lps: int
    seconds: float
    method: str
    certificate: str = "alternation"
    weighted: bool = False
    problem: Problem | None = None

    def __call__(self, t: Any) -> Any:
        """Returns r(t) in the dtype of t (array or tensor of any shape), for t in [-1, 1]; t is not clipped."""
        return safe_pade(self.a, self.b, self.centre, t)

    @property
    def ratio(self) -> float:
        """lower_bound / error: 1 is optimal. Also 1 where the target is met up to rounding."""
        return self.lower_bound / self.error if self.error > 0 else 1.0

    @property
    def float32_error(self) -> float:
        """The largest change on [-1, 1] if r is evaluated in float32: below 1e-6 for every shipped gate."""
        return float32_error(self.a, self.b, self.centre)

    @property
    def whole_line(self) -> bool:
        """Whether Q = 1 + B >= 1 on the whole real line, so that the |B| of the safe form changes nothing."""
        b = self.b[: np.flatnonzero(self.b)[-1] + 1] if np.any(self.b) else np.empty(0)
        if len(b) == 0:
            return True
        # With a stationary centre, B = s^2 * C(s), so B >= 0 exactly where C >= 0.
        if b[0] != 0 or len(b) % 2 or b[-1] < 0:
            return False
        c = Rational(np.ones(1), b[1:], 0.0)
        poles = c.poles() if len(c.d) > 1 else np.empty(0, complex)
        return bool(c.d[0] >= 0 and not np.any(np.abs(poles.imag) <= 1e-9 * np.abs(poles)))

    def __repr__(self) -> str:
        where = f", theta={self.theta:g}, margin={self.margin:g}" if self.theta or self.margin else ""
        proof = f"lower_bound={self.lower_bound:.6g} ({self.ratio:.6f}, {self.certificate})"
        if self.certificate == "none":
            proof = "UNCERTIFIED"
        return (
            f"GateFit({self.target}, degree={self.degree}{where}, method={self.method}: error={self.error:.6g}, "
            f"{proof}, mse={self.mse:.4g}, "
            f"centre={self.centre:.6g}, {self.n_lps} LPs, {self.seconds:.2f} s)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON; `from_dict` restores every bit."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != NOT_SAVED}
        return plain | {name: plain[name].tolist() for name in ARRAYS} | {"degree": list(self.degree)}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "GateFit":
        """The inverse of `to_dict`.

        Raises:
            FormatError: missing or unknown keys, or wrong array lengths.
            NumericsError: a value is NaN or infinite.
        """
        names = {f.name for f in fields(cls)} - {NOT_SAVED}
        if not isinstance(plain, dict):
            raise FormatError(f"not a gate fit: a {type(plain).__name__}")
        if set(plain) != names:
            raise FormatError(f"not a gate fit: keys missing or unknown: {sorted(set(plain) ^ names)}")
        values = plain | {name: np.asarray(plain[name], dtype=np.float64) for name in ARRAYS}
        p, q = (int(n) for n in plain["degree"])
        for name, length in (("a", p + 1), ("b", q), ("numerator_scale", p + 1), ("denominator_scale", q)):
            if values[name].shape != (length,):
                raise FormatError(f"not a gate fit of degree ({p}, {q}): {name} has shape {values[name].shape}")
        numbers = (*(values[name] for name in ARRAYS), *(float(plain[name]) for name in NUMBERS))
        if not all(np.all(np.isfinite(one)) for one in numbers):
            raise NumericsError("not a gate fit: it holds NaN or infinity")
        for name in ("target", "method", "certificate"):
            if not isinstance(plain[name], str):
                raise FormatError(f"not a gate fit: {name} is {plain[name]!r}")
        return cls(**(values | {"degree": (p, q)}))

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draws the gate over its target, and the error with its certificate; saves to `path` if given."""
        from rsae_triton.remez.plot import plot_fit

        return plot_fit(self, path)
