"""The direct form: the gate is the rational itself, fitted to the teacher's nonlinearity and calibrated."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rsae_triton.remez import GateFit, fit_gate
from rsae_triton.sae.architectures import ReluSAE
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.gate import RationalGate
from rsae_triton.upgrading.calibrate import HISTOGRAM_TOKENS, LADDER, Calibration, Histogram, calibrate, histogram
from rsae_triton.upgrading.sampling import Sample
from rsae_triton.upgrading.thresholds import Grouping

# A direct JumpReLU is fitted with its jump at THETA, so that codes up to 1 / THETA thresholds lie inside the clip.
THETA, MARGIN = 0.1, 0.02


def direct(
    teacher: SparseAutoencoder, seen: Sample, degree: tuple[int, int] | None, grouping: Grouping, tolerance: float
) -> tuple[RationalGate, dict[str, Any]]:
    """Fits a direct gate: z = C_out * (r(h / C_in) + tail), from the minimax fit of the teacher's gate, calibrated.

    Per-feature thresholds are expressed through C_in. Returns the gate and the facts about its fit for `StageOne`.
    """
    jump, thresholds = not isinstance(teacher, ReluSAE), seen.thresholds
    if jump and bool((thresholds <= 0).any()):
        # A feature with threshold 0 is a ReLU; a jump at the smallest positive threshold comes closest.
        positive = thresholds[thresholds > 0]
        thresholds = thresholds.clamp_min(max(float(positive.min()), 1e-3) if len(positive) else 1e-3)
    scale = thresholds / THETA if jump else torch.ones_like(thresholds)
    h, z = seen.h[:HISTOGRAM_TOKENS], seen.z[:HISTOGRAM_TOKENS]
    # Values are in units of the feature's scale, so an error there counts scale^2 in the code.
    value, target = (h / scale).flatten().double().cpu().numpy(), (z / scale).flatten().double().cpu().numpy()
    weight = scale.square().expand_as(h).flatten().double().cpu().numpy()
    data = histogram(value, target, target != 0, weight)
    best: tuple[Calibration, GateFit, float] | None = None
    for candidate in LADDER if degree is None else (degree,):
        fit = fit_gate("jumprelu", candidate, theta=THETA, margin=MARGIN) if jump else fit_gate("relu", candidate)
        best = min(
            (_calibrated(fit, data, c) for c in _input_scales(data, jump)), key=lambda one: one[0].relative_error
        )
        if best[0].relative_error <= tolerance:
            break
    assert best is not None
    calibration, fit, c_in = best
    gate = RationalGate(
        teacher.d_sae,
        fit.degree,
        calibration.a,
        calibration.b,
        **grouping._asdict(),
        form="direct",
        centre=fit.centre,
        input_scale=scale * c_in if jump else c_in,
        output_scale=scale * c_in if jump else c_in,
        numerator_scale=fit.numerator_scale,
        denominator_scale=fit.denominator_scale,
    ).to(h.device)
    with torch.no_grad():
        # The activity threshold that gives the teacher's l0. Ranked in numpy because kthvalue is slow on millions.
        strengths = gate(h, hard=False).abs().flatten().cpu().numpy()
        rank = max(0, len(strengths) - int((z != 0).sum()) - 1)
        gate.activity_threshold.fill_(float(np.partition(strengths, rank)[rank]))
    return gate, {
        "error": fit.error,
        "lower_bound": fit.lower_bound,
        "initial_relative_error": calibration.initial_relative_error,
    }


def _input_scales(data: Histogram, jump: bool) -> list[float]:
    """Returns the C_in to try: 1 for a jump (its threshold sets the scale), fractions of the largest |value| for a
    ReLU."""
    if jump:
        return [1.0]
    reach = np.abs(data.value).max()
    return [float(reach * share) for share in (1.0, 0.5, 0.25, 0.125)]


def _calibrated(fit: GateFit, data: Histogram, input_scale: float) -> tuple[Calibration, GateFit, float]:
    return calibrate(fit, data, input_scale, tail=True), fit, input_scale
