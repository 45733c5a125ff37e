"""Where each feature of a teacher opens, and which features share a set of coefficients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rsae_triton.sae.architectures import JumpReluSAE, ReluSAE
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.batch_topk import BatchTopKSAE


class Grouping(NamedTuple):
    """How many coefficient sets, and which of them each feature uses (None: one for all, or one for each)."""

    groups: int
    group_of: Tensor | None


def teacher_thresholds(teacher: SparseAutoencoder, h: Tensor, z: Tensor) -> Tensor:
    """theta_f >= 0 [d_sae]: above it the teacher's feature is active (TopK: as often as it is active)."""
    if isinstance(teacher, JumpReluSAE):
        return teacher.threshold.detach().float().clone()
    if isinstance(teacher, BatchTopKSAE):
        return teacher.topk_threshold.detach().float().expand(teacher.d_sae).clone()
    if isinstance(teacher, ReluSAE):
        return torch.zeros(teacher.d_sae, device=h.device)
    # The m-th largest pre-activation of a feature that fires on m tokens would itself not fire at h > theta, so
    # the threshold lies halfway to the next; a feature that never fires keeps its largest.
    fires = (z != 0).sum(0)
    ranked = torch.cat([h.sort(0, descending=True).values, h.amin(0, keepdim=True)]).float()
    last = ranked.gather(0, (fires - 1).clamp_min(0).unsqueeze(0)).squeeze(0)
    following = ranked.gather(0, fires.unsqueeze(0)).squeeze(0)
    return torch.where(fires > 0, (last + following) / 2, last).clamp_min(0)


def strength_groups(h: Tensor, z: Tensor, groups: int) -> Tensor:
    """[d_sae] int64: features in `groups` equal parts by the root mean square of their active pre-activations.

    Features of one strength cover the same stretch of the gate, which is what they have to share. One that is never
    active on the sample counts as weakest.
    """
    active = z != 0
    strength = (h.float().square() * active).sum(0) / active.sum(0).clamp_min(1)
    rank = strength.argsort(stable=True).argsort()
    return rank * groups // len(rank)
