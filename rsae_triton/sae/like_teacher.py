"""Derives a gate from an SAE of any family: a threshold per feature, and the width of the ramp."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from rsae_triton.activations.pairs import row_width
from rsae_triton.common.checks import check_data, check_finite
from rsae_triton.common.errors import ShapeError
from rsae_triton.sae.architectures import JumpReluSAE, ReluSAE
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.batch_topk import BatchTopKSAE

# C_in of the gated form, in units of the activations' mean norm, and the share of it by which active pre-activations
# must exceed their thresholds in the median; chosen in docs/experiments.md.
GATE_WIDTH = 0.02
LEAST_RISE = 0.7
# Thresholds that were set on fewer tokens do not hold l0 on other text: a TopK teacher of 2,304 features whose l0 is 32
# ends at 660 with 1 token, at 94 with 4, at 36 with 64, at 34 with 256 and at 33 with 4,096.
LEAST_TOKENS = 256


def sample(activations: Tensor | Any, teacher: SparseAutoencoder, n_tokens: int, seed: int) -> Tensor:
    """Draws n_tokens rows for calibration, in the teacher's dtype and on its device; warns if they are too few."""
    if not isinstance(activations, Tensor) and not hasattr(activations, "tensor"):
        raise ShapeError(f"activations is a {type(activations).__name__}; give a torch.Tensor or an ActivationStore")
    stored = hasattr(activations, "rows") and not isinstance(activations, Tensor)
    x: Any = activations if isinstance(activations, Tensor) or stored else activations.tensor()
    if not stored:
        check_data("activations", x)
    shape = (len(x), row_width(x)) if stored else tuple(x.shape)
    if len(shape) != 2 or shape[1] != teacher.row_width:
        raise ShapeError(f"activations have shape {shape}; the teacher takes [n, d_in={teacher.row_width}]")
    if shape[0] == 0:
        raise ShapeError("there are no activations to calibrate on; give at least a few hundred tokens")
    chosen = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))[:n_tokens]
    # Only these rows of a store are read, since it may be larger than memory.
    x = (x.rows(chosen) if stored else x.detach()[chosen.to(x.device)]).to(
        device=teacher.W_enc.device, dtype=teacher.W_enc.dtype
    )
    check_finite("the sample of the activations", x, "drop those rows first")
    if len(x) < LEAST_TOKENS:
        warnings.warn(f"only {few_tokens(len(x))}", stacklevel=3)
    return x


def few_tokens(n: int) -> str:
    """Says that n tokens, fewer than LEAST_TOKENS, are too few."""
    return (
        f"{n} token{'s' * (n > 1)} to calibrate on: too few to say what l0 and the error will be on other text; "
        f"give at least {LEAST_TOKENS}, better some thousands"
    )


def teacher_thresholds(teacher: SparseAutoencoder, h: Tensor, z: Tensor) -> Tensor:
    """theta_f >= 0 [d_sae], above which the teacher's feature is active (for TopK: at which it is active equally
    often)."""
    if isinstance(teacher, JumpReluSAE):
        return teacher.threshold.detach().float().clone()
    if isinstance(teacher, BatchTopKSAE):
        return teacher.topk_threshold.detach().float().expand(teacher.d_sae).clone()
    if isinstance(teacher, ReluSAE):
        return torch.zeros(teacher.d_sae, device=h.device)
    # At h > theta, a threshold equal to the m-th largest pre-activation would make the feature fire m - 1 times. So the
    # threshold lies halfway to the next; a feature that never fires gets its largest.
    fires = (z != 0).sum(0)
    ranked = torch.cat([h.sort(0, descending=True).values, h.amin(0, keepdim=True)]).float()
    last = ranked.gather(0, (fires - 1).clamp_min(0).unsqueeze(0)).squeeze(0)
    following = ranked.gather(0, fires.unsqueeze(0)).squeeze(0)
    return torch.where(fires > 0, (last + following) / 2, last).clamp_min(0)


def ramp_width(teacher: SparseAutoencoder, x: Tensor, above: Tensor, width: float | None) -> float:
    """Returns C_in for a ramp of `width` (see `upgrade`). above [n, d_sae]: pre-activations minus thresholds.

    A ramp treats features below their thresholds as if they were worth as much as active ones, so it must not reach
    much deeper than active ones rise. Where they rise more it is not widened: that gains little, and with many features
    near their thresholds l0 could not be held.
    """
    usual = GATE_WIDTH * float(teacher.normalization(x).apply(x).float().norm(dim=1).mean())
    # h is in units of codes: a code of 1 adds the norm of its decoder row to the reconstruction.
    usual /= max(float(teacher.W_dec.detach().float().norm(dim=1).median()), 1e-12)
    if width is not None:
        return width * usual
    rises = above[above > 0].float()
    if not len(rises):
        return usual
    rise = float(rises.median())
    return rise if rise < LEAST_RISE * usual else usual
