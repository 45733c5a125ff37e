"""Plots a fit: the gate over its target, and the error between the two lines that certify it."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.figure import Figure

from rsae_triton.common.files import make_folder, write_atomically
from rsae_triton.remez.problem import TARGETS, Problem, make_problem
from rsae_triton.remez.rational import Rational


class Fit(Protocol):
    """The attributes of a `GateFit` that are drawn. (A protocol, since `GateFit` has this plot as a method.)"""

    @property
    def a(self) -> np.ndarray: ...
    @property
    def b(self) -> np.ndarray: ...
    @property
    def centre(self) -> float: ...
    @property
    def degree(self) -> tuple[int, int]: ...
    @property
    def target(self) -> str: ...
    @property
    def theta(self) -> float: ...
    @property
    def margin(self) -> float: ...
    @property
    def error(self) -> float: ...
    @property
    def lower_bound(self) -> float: ...
    @property
    def reference(self) -> np.ndarray: ...
    @property
    def weighted(self) -> bool: ...
    @property
    def problem(self) -> Problem | None: ...
    def __call__(self, t: Any) -> Any: ...


def _dense(fit: Fit) -> np.ndarray:
    """Points in [-1, 1] to draw at: even ones, some that cluster at theta, and some under the poles."""
    steps = np.geomspace(1e-7, 2.0, 600)
    poles = Rational(fit.a, np.concatenate([[1.0], fit.b]), fit.centre).poles()
    near = (poles.real[:, None] + np.abs(poles.imag)[:, None] * np.linspace(-5, 5, 41)).ravel()
    t = np.concatenate([np.linspace(-1, 1, 2001), fit.theta - steps, fit.theta + steps, near, fit.reference])
    return np.unique(t[np.abs(t) <= 1])


def _problem(fit: Fit) -> Problem | None:
    """Returns the target to draw: the fit's own, or a named one rebuilt; None for a callable's fit read from a file."""
    if fit.problem is not None:
        return fit.problem
    if fit.target in TARGETS and not fit.weighted:
        return make_problem(fit.target, fit.theta, fit.margin)
    return None


def plot_fit(fit: Fit, path: str | Path | None = None) -> Figure:
    """Draws r and its target above, and target - r with error, lower bound and reference points below.

    The figure belongs to no window or global state. Saved to `path` (any suffix matplotlib knows) if given.
    """
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    t = _dense(fit)
    above.plot(t, fit(t), color="C0", label=f"r, degree {fit.degree}")
    problem = _problem(fit)
    if problem is not None:
        for low, high in problem.pieces:
            x = t[(t >= low) & (t <= high)]
            above.plot(x, problem.value(x), "k--", lw=1, label=fit.target if low == -1 else None)
            below.plot(x, problem.weight(x) * (problem.value(x) - fit(x)), color="C0", lw=1)
        at = fit.reference
        error = problem.weight(at) * (problem.value(at) - fit(at))
        below.plot(at, error, "o", ms=4, color="C3", label="where it alternates")
    for sign in (-1, 1):
        below.axhline(sign * fit.error, color="0.4", lw=0.8, label="error" if sign == 1 else None)
        below.axhline(sign * fit.lower_bound, color="C2", lw=0.8, ls=":", label="lower bound" if sign == 1 else None)
    for axis in (above, below):
        if fit.margin > 0:
            label = "left out" if axis is above else None
            axis.axvspan(fit.theta - fit.margin, fit.theta + fit.margin, color="0.92", lw=0, label=label)
    above.legend(loc="upper left", fontsize="small")
    # Placed above the axes, because inside the error curve would run through it.
    below.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize="small", frameon=False)
    title = f"{fit.target} {fit.degree}  error {fit.error:.4g}  lower bound {fit.lower_bound:.4g}"
    above.set(title=title, ylabel="gate")
    below.set(xlabel="t", ylabel="target − r", xlim=(-1, 1))
    if path is not None:
        make_folder(Path(path).parent)
        write_atomically(Path(path), lambda one: figure.savefig(one, dpi=150))
    return figure
