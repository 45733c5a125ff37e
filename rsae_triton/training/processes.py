"""What the processes of a run do together: here for a single process, in `distributed.py` for many."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsae_triton.common.checkpoint import is_sharded, read_state
from rsae_triton.common.errors import RsaeError
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.training.checkpoints import Checkpoints
from rsae_triton.training.memory import MemoryPlan
from rsae_triton.training.recipes import Losses, Recipe, losses
from rsae_triton.training.settings import TrainSettings


@dataclass
class Summed:
    """A step's numbers over all processes: mse, l0, the gradient's norm (as tensor and as number), activity counts of
    this process's features, each flag (True if any process raised it), the share of the support (see `Losses`), and the
    active entries that a screen missed, and of how many (0 if nothing was checked)."""

    mse: float
    l0: float
    norm: Tensor
    grad_norm: float
    counts: Tensor
    flags: list[bool]
    finite: bool
    share: float | None = None
    missed: tuple[float, float] = (0.0, 0.0)


class Alone:
    """A single process.

    Attributes:
        rank: of this process. data, features: (its place, number of processes) along the two axes.
    """

    rank = 0
    data: tuple[int, int] = (0, 1)
    features: tuple[int, int] = (0, 1)

    def check(self, sae: SparseAutoencoder, recipe: Recipe, settings: TrainSettings) -> None:
        """Raises ConfigError for what these processes cannot train."""

    def barrier(self) -> None:
        """Waits for all processes."""

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes that have other tokens."""
        return value

    def over_features(self, value: Tensor) -> Tensor:
        """The sum over the processes that hold other features."""
        return value

    def losses(
        self,
        sae: SparseAutoencoder,
        x: Tensor,
        recipe: Recipe,
        weight: float,
        dead: Tensor | None,
        plan: MemoryPlan,
    ) -> Losses:
        return losses(sae, x, recipe, weight, dead, plan)

    def finish(self, sae: SparseAutoencoder, terms: Losses, flags: list[bool]) -> Summed:
        """Combines gradients and numbers, so that they are of the whole batch and the whole SAE."""
        known = () if terms.squares is None else (sae.W_enc, sae.W_dec)
        grads = [p.grad for p in sae.parameters() if p.grad is not None and not any(p is one for one in known)]
        norm = torch.nn.utils.get_total_norm(grads)
        norm = norm if terms.squares is None else (norm.square() + terms.squares).sqrt()
        # A single transfer from the device for all of them.
        later = [terms.share] if isinstance(terms.share, Tensor) else []
        checks = [] if terms.missed is None else list(terms.missed.unbind())
        wanted = (terms.mse, terms.l0, norm, terms.total, *checks, *later)
        numbers = torch.stack([one.detach().double() for one in wanted]).tolist()
        mse, l0, grad_norm, _ = numbers[:4]
        finite = all(map(math.isfinite, numbers[:4]))
        share = numbers[-1] if later else terms.share
        missed = (numbers[4], numbers[5]) if checks else (0.0, 0.0)
        return Summed(mse, l0, norm, grad_norm, terms.counts, flags, finite, share, missed)  # type: ignore[arg-type]

    def whole_config(self, sae: SparseAutoencoder) -> dict[str, Any]:
        """The configuration of the SAE that `sae` is a part of."""
        return sae.config()

    def same(self, steps: list[int]) -> list[int]:
        """The steps for which the first process found checkpoints; else each process might choose another one."""
        return steps

    def worst(self, problem: RsaeError | None) -> RsaeError | None:
        """The worst error of any process, so that all raise or continue alike; a ConfigError comes before others."""
        return problem

    def any(self, flag: bool) -> bool:
        """Whether the flag is True on any process."""
        return flag

    def agree(self, plan: MemoryPlan) -> MemoryPlan:
        """Returns one plan for all processes."""
        return plan

    def save(
        self,
        checkpoints: Checkpoints,
        step: int,
        sae: SparseAutoencoder,
        tensors: dict[str, Tensor],
        info: dict[str, Any],
    ) -> Path:
        """Writes a checkpoint of the run's tensors; each process writes its part."""
        # No step is random today, but a user's own SAE may draw random numbers.
        random = {"rng.cpu": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            random["rng.cuda"] = torch.cuda.get_rng_state()
        return checkpoints.save(step, tensors | random, info)

    def load(self, path: Path, sae: SparseAutoencoder, like: dict[str, Tensor]) -> dict[str, Tensor]:
        """Reads the tensors of a checkpoint that was written by one process or by many. like: the run's tensors, for
        dtypes."""
        if not is_sharded(path):
            return read_state(path)
        from rsae_triton.sae.sharded import read_whole

        return read_whole(path)
