"""The gate commands: plain functions, whose typed and documented parameters tyro turns into a command line."""

import json
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from rsae_triton.common.errors import ConfigError, FormatError
from rsae_triton.common.files import check_figure, make_folder, write_text
from rsae_triton.remez import table
from rsae_triton.remez.fit import fit_gate
from rsae_triton.remez.gatefit import GateFit


def certificate(fit: GateFit) -> str:
    """The certificate as text: what was fitted, how well, what proves it, and the coefficients."""
    p, q = fit.degree
    where = f", |t - {fit.theta:g}| < {fit.margin:g} left out" if fit.margin else ""
    proof = {
        "alternation": f"the error alternates on {len(fit.reference)} points",
        "program": f"a linear program on {len(fit.reference)} points has no solution",
        "rounding": "the error is rounding",
        "none": "",
    }[fit.certificate]
    bound = f"{fit.lower_bound:.9g}   ({fit.ratio:.6f} of the error: {proof})"
    if fit.certificate == "none":
        bound = "none: nothing is proved about this fit"
    lines = [
        f"{fit.target}, degree ({p}, {q}), {fit.method}{where}",
        f"  error        {fit.error:.9g}",
        f"  lower bound  {bound}",
        f"  mse          {fit.mse:.6g}",
        f"  in float32   within {fit.float32_error:.2g} of float64 on [-1, 1]",
        f"  centre       {fit.centre:.17g}",
        *(f"  a{i:<3} {value:+.17g}" for i, value in enumerate(fit.a)),
        *(f"  b{j:<3} {value:+.17g}" for j, value in enumerate(fit.b, start=1)),
        f"  {fit.n_lps} linear programs, {fit.seconds:.2f} s",
    ]
    return "\n".join(lines)


def _read_samples(path: Path) -> np.ndarray:
    try:
        # Memory-mapped, so that a header that claims more than the file holds is refused before memory is allocated.
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except Exception as error:  # for a damaged header, numpy, ast and tokenize raise errors of different types
        raise FormatError(f"cannot read samples from {path}: {error}; save them with numpy.save") from error


def fit(
    target: tyro.conf.Positional[Literal["relu", "step", "jumprelu", "ramp"]],
    degree: str = "9,8",
    theta: float = 0.0,
    margin: float = 0.0,
    method: Literal["minimax", "least_squares", "relaxed_remez"] = "minimax",
    tol: float | None = None,
    points: int = 4001,
    samples: Path | None = None,
    plot: Path | None = None,
    out: Path | None = None,
) -> None:
    """Fits a rational gate to a target on [-1, 1] and prints its certificate.

    Examples:
        rsae gates fit relu --degree 3,2
        rsae gates fit jumprelu --theta 0.1 --margin 0.02 --degree 9,8 --plot gate.png

    Args:
        target: the gate to approximate.
        degree: degrees p,q of numerator and denominator, or "auto" to search (see tol).
        theta: the threshold, in the scaled pre-activation.
        margin: half-width of the gap around theta that is left out; a jump needs one.
        method: minimax: least largest error, with proof; least_squares: least mean squared error; relaxed_remez:
            the published initialiser (Adam on a penalty), far from optimal, for comparison only.
        tol: search for the smallest degree, up to the one given, with this error (mse for least_squares).
        points: size of the even grid on [-1, 1].
        samples: a .npy file of scaled pre-activations: least_squares fits them, and mse is taken on them.
        plot: write the figure of gate and error here (.png, .svg, .pdf).
        out: write the fit here as JSON.
    """
    if plot is not None:
        check_figure("--plot", plot)
    values = None if samples is None else _read_samples(samples)
    fitted = fit_gate(
        target,
        degree,
        theta=theta,
        margin=margin,
        method=method,
        tol=tol,
        points=points,
        samples=values,
        table=False,
    )
    print(certificate(fitted))
    if plot is not None:
        try:
            fitted.plot(plot)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot write the figure to {plot}: {error}") from error
        print(f"  figure       {plot}")
    if out is not None:
        make_folder(out.parent)
        write_text(out, json.dumps(fitted.to_dict()) + "\n")
        print(f"  fit          {out}")


def show(path: Path = table.PATH) -> None:
    """Prints the table of fitted gates that ships with the package.

    Args:
        path: the table file to show.
    """
    row = "{:<10}{:>8}{:>8}{:>8}{:>14}{:>13}{:>12}{:>13}".format
    print(row("target", "degree", "theta", "margin", "error", "bound/error", "mse", "centre"))
    for one in table.read_table(path):
        centre = f"{one.centre:.6g}" if abs(one.centre) > 1e-9 else "0"
        degree = "{},{}".format(*one.degree)
        print(
            row(
                one.target,
                degree,
                f"{one.theta:g}",
                f"{one.margin:g}",
                f"{one.error:.6g}",
                f"{one.ratio:.6f}",
                f"{one.mse:.3g}",
                centre,
            )
        )


def rebuild(out: Path = table.PATH) -> None:
    """Fits every gate of the shipped table anew and writes the table.

    Args:
        out: where to write it; by default over the shipped one.
    """
    fits = []
    for target, degree, theta, margin in table.ENTRIES:
        fits.append(fit_gate(target, degree, theta=theta, margin=margin, table=False))
        print(f"{fits[-1]!r}", flush=True)
    try:
        table.write_table(fits, out)
    except OSError as error:
        raise ConfigError(f"cannot write the table to {out}: {error}") from error
    print(f"{len(fits)} gates in {out}")
