"""Decides which features share a set of coefficients."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Grouping(NamedTuple):
    """The number of coefficient sets, and which one each feature uses (None: one set for all, or one for each)."""

    groups: int
    group_of: Tensor | None


def strength_groups(h: Tensor, z: Tensor, groups: int) -> Tensor:
    """Returns a group number per feature, [d_sae] int64: equal parts, ordered by the RMS of the active pre-activations.

    Features of similar strength use the same stretch of the gate, so they can share its coefficients. A feature that is
    never active on the sample counts as weakest.
    """
    active = z != 0
    strength = (h.float().square() * active).sum(0) / active.sum(0).clamp_min(1)
    rank = strength.argsort(stable=True).argsort()
    return rank * groups // len(rank)
