"""The gated form: z = h * r above a threshold, with r the minimax fit of a ramp that ends at the threshold."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rsae_triton.common.errors import NumericsError
from rsae_triton.remez import fit_gate
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.gate import RationalGate
from rsae_triton.sae.like_teacher import ramp_width
from rsae_triton.upgrading.calibrate import HISTOGRAM_TOKENS, LADDER
from rsae_triton.upgrading.sampling import Sample
from rsae_triton.upgrading.thresholds import Grouping


def gated(
    teacher: SparseAutoencoder,
    seen: Sample,
    degree: tuple[int, int] | None,
    grouping: Grouping,
    tolerance: float,
    width: float | None,
) -> tuple[RationalGate, dict[str, Any]]:
    """Fits a gated gate: z = h * r where h > theta_f, with r the minimax fit of a ramp that reaches 1 at theta.

    Above the threshold r is 1 up to the fit's error, so the code is the teacher's. The slope lies below the threshold:
    there it gives a gradient to pre-activations that are not active yet (docs/experiments.md says why this side).
    Returns the gate and the facts about its fit for `StageOne`.
    """
    x, y, h = (one[:HISTOGRAM_TOKENS] for one in (seen.x, seen.y, seen.h))
    input_scale = ramp_width(teacher, x, h - seen.thresholds, width)
    # Compared with the thresholded code without a ramp: a TopK teacher's own code already differs in which features
    # fire.
    exact = h * (h > seen.thresholds)
    with torch.no_grad():
        # Where the teacher's own error is nearly 0, a change is measured against 1 % of the signal instead.
        mse = (y - teacher.decode(exact, x)).square().sum()
        least = torch.maximum(mse, 0.01 * y.square().sum())
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
            change = ((y - teacher.decode(code, x)).square().sum() - mse) / least
            error = max(float((code - exact).norm() / exact.norm().clamp_min(1e-12)), abs(float(change)))
        if error <= tolerance:
            return gate, {"error": fit.error, "lower_bound": fit.lower_bound, "initial_relative_error": None}
    raise NumericsError(
        f"a gate of degree {gate.degree} reproduces the teacher's code to {error:.3g}, not to {tolerance:g}; "
        "raise tolerance or the degree"
    )
