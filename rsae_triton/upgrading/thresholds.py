"""Which features share a set of coefficients."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Grouping(NamedTuple):
    """How many coefficient sets, and which of them each feature uses (None: one for all, or one for each)."""

    groups: int
    group_of: Tensor | None


def strength_groups(h: Tensor, z: Tensor, groups: int) -> Tensor:
    """[d_sae] int64: features in `groups` equal parts by the root mean square of their active pre-activations.

    Features of one strength cover the same stretch of the gate, which is what they have to share. One that is never
    active on the sample counts as weakest.
    """
    active = z != 0
    strength = (h.float().square() * active).sum(0) / active.sum(0).clamp_min(1)
    rank = strength.argsort(stable=True).argsort()
    return rank * groups // len(rank)
