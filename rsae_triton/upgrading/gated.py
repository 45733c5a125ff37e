"""The gated form: z = h * r above a threshold, r the minimax fit of a ramp that is complete there."""

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
    """z = h * r where h > theta_f, r the minimax fit of a ramp: a smooth step that reaches 1 at theta.

    Above the threshold r is 1 to the fit's error, so that the code is the teacher's; its slope lies below, where
    it tells pre-activations that are not active yet what they would be worth (docs/experiments.md: why this side).
    """
    x, y, h = (one[:HISTOGRAM_TOKENS] for one in (seen.x, seen.y, seen.h))
    input_scale = ramp_width(teacher, x, h - seen.thresholds, width)
    # Against the code with thresholds and no ramp: a TopK teacher's own code differs already in which fire.
    exact = h * (h > seen.thresholds)
    with torch.no_grad():
        # A teacher that leaves next to nothing has no error that another could be compared with.
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
