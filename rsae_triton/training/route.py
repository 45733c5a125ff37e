"""Decides whether training steps are sparse or dense, by the size of the support."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rsae_triton.ops import native
from rsae_triton.ops.support_triton import DENSITY
from rsae_triton.training.memory import MemoryPlan

LIMITS = {"compiled": (0.12, 0.16), "tiled": (0.04, 0.06)}
"""Shares of [n_tokens, d_sae], by what runs the loops over entries on a CPU (`ops.native`). Dense steps become sparse
below the first; sparse ones become dense above the second. The two differ so that a run does not change its way at
every step (docs/scaling.md)."""
EVERY = 10
"""The number of dense steps after which the support is estimated again, from some tokens of the batch."""

FULL = 0.8
"""On a GPU, the upper limit is the share that entries have room for (`support_triton.DENSITY`), and the lower limit is
this fraction of it."""

_log = logging.getLogger(__name__)


class Route:
    """Which way the next step is computed.

    Attributes:
        sparse: whether it is sparse. share: the support's share of [n_tokens, d_sae] when it was last measured.
        below, above: the shares at which that changes.
    """

    def __init__(self, plan: MemoryPlan) -> None:
        self._dense, self._sparse = plan, replace(plan, mode="sparse")
        on_cpu = LIMITS["tiled" if native.library() is None else "compiled"]
        self.below, self.above = (FULL * DENSITY, DENSITY) if plan.on_gpu else on_cpu
        self.sparse, self.share = plan.support == "always", -1.0

    def plan(self, step: int, look: Callable[[], float]) -> MemoryPlan:
        """How step number `step` is computed. look: estimates the share of the support from some tokens of the
        batch."""
        if not self._dense.on_gpu and self._due(step):
            self.saw(look(), step)
        return self._sparse if self.sparse else self._dense

    @property
    def dense(self) -> MemoryPlan:
        """The plan for a step whose entries did not fit."""
        return self._dense

    def looks_later(self, step: int) -> bool:
        """Whether the share is measured together with a step's other numbers: on a GPU, because measuring it first
        would wait."""
        return self._dense.on_gpu and self._due(step)

    def _due(self, step: int) -> bool:
        return self._dense.support == "auto" and not self.sparse and (self.share < 0 or step % EVERY == 0)

    def saw(self, share: float, step: int) -> None:
        """Takes the share of the support in step `step`, and decides on the steps after it."""
        self.share = min(share, 1.0)
        if self._dense.support != "auto":
            return
        sparse = share < (self.above if self.sparse else self.below)
        if sparse != self.sparse:
            self.sparse = sparse
            _log.info(
                "from step %d on, steps are %s: the support is %.2f %% of all places",
                step, "sparse" if sparse else "dense", 100 * self.share,
            )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """The state for `restore`."""
        return {"sparse": self.sparse, "share": self.share}

    def restore(self, state: Any) -> None:
        """Continues from `state`. If it is anything else (from an old checkpoint), the next batch is measured."""
        if self._dense.support != "auto" or not isinstance(state, dict):
            return
        sparse, share = state.get("sparse"), state.get("share")
        if isinstance(sparse, bool) and isinstance(share, float) and 0 <= share <= 1:
            self.sparse, self.share = sparse, share
