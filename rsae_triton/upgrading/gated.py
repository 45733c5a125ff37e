"""The gated form: z = h * r above a threshold, r the minimax fit of a ramp that is complete there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsae_triton.common.errors import NumericsError
from rsae_triton.remez import fit_gate
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.gate import RationalGate
from rsae_triton.upgrading.calibrate import HISTOGRAM_TOKENS, LADDER
from rsae_triton.upgrading.sampling import Sample
from rsae_triton.upgrading.thresholds import Grouping

# C_in of the gated form, in units of the activations' mean norm, and how much of it active pre-activations must rise
# above their thresholds in the median; chosen in docs/experiments.md.
GATE_WIDTH = 0.02
LEAST_RISE = 0.7


def gated(
    teacher: SparseAutoencoder,
    seen: Sample,
    degree: tuple[int, int] | None,
    grouping: Grouping,
    tolerance: float,
    width: float | None,
) -> tuple[RationalGate, dict[str, Any]]:
    """z = h * r where h > theta_f, r the minimax fit of a ramp that is complete at theta.

    Above the threshold r is 1 to the fit's error, so that the code is the teacher's; its slope lies below, where
    it tells pre-activations that are not active yet what they would be worth (docs/experiments.md: why this side).
    """
    x, h = seen.x[:HISTOGRAM_TOKENS], seen.h[:HISTOGRAM_TOKENS]
    input_scale = ramp_width(teacher, x, h - seen.thresholds, width)
    # Against the code with thresholds and no ramp: a TopK teacher's own code differs already in which fire.
    exact = h * (h > seen.thresholds)
    with torch.no_grad():
        mse = (x - teacher.decode(exact, x)).square().sum()
    error = np.inf
    for candidate in LADDER if degree is None else (degree,):
        fit = fit_gate("ramp", candidate)
        gate = RationalGate.from_fit(
            fit,
            teacher.d_sae,
            thresholds=seen.thresholds,
            form="gated",
            **grouping._asdict(),
            backward="rational",
            input_scale=input_scale,
        ).to(h.device)
        with torch.no_grad():
            code = gate(h)
            change = (x - teacher.decode(code, x)).square().sum() / mse - 1
            error = max(float((code - exact).norm() / exact.norm().clamp_min(1e-12)), abs(float(change)))
        if error <= tolerance:
            return gate, {"error": fit.error, "lower_bound": fit.lower_bound, "initial_relative_error": None}
    raise NumericsError(
        f"a gate of degree {gate.degree} reproduces the teacher's code to {error:.3g}, not to {tolerance:g}; "
        "raise tolerance or the degree"
    )


def ramp_width(teacher: SparseAutoencoder, x: Tensor, above: Tensor, width: float | None) -> float:
    """C_in of a ramp of `width` (see `upgrade`); above [n, d_sae]: pre-activations over their thresholds.

    A ramp bets on features below their thresholds as if they were worth what active ones are: it must not reach much
    deeper than those rise. Where they rise more it is not widened: it gains little, and where many features are near
    their thresholds l0 could not be held.
    """
    usual = GATE_WIDTH * float(teacher.normalization(x).apply(x).float().norm(dim=1).mean())
    if width is not None:
        return width * usual
    rises = above[above > 0].float()
    if not len(rises):
        return usual
    rise = float(rises.median())
    return rise if rise < LEAST_RISE * usual else usual
