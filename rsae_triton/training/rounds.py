"""How training treats rounds: sets them aside or trains through them, and sets l0 afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from rsae_triton.common.errors import ConfigError
from rsae_triton.sae.adding import add_rounds, hold_l0
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.like_teacher import sample
from rsae_triton.sae.rational import FusedRationalSAE
from rsae_triton.sae.units import reading
from rsae_triton.training.settings import TrainSettings

SAMPLE = 8192
"""Number of tokens on which l0 is set."""


@contextmanager
def rounds_aside(
    sae: SparseAutoencoder, settings: TrainSettings, activations: Any, validation: Any, mesh: Any
) -> Iterator[Callable[[], None]]:
    """Within the context, `sae` is what is to be trained. Yields a function that adds the rounds again and sets l0.

    Raises:
        ConfigError: rounds would have to be set aside on a mesh, where each process holds only a part of the SAE.
    """
    refinement = sae.refinement if isinstance(sae, FusedRationalSAE) else None
    aside = refinement is not None and settings.rounds == "after"
    if aside and mesh is not None:
        raise ConfigError(
            "rounds='after' adds rounds to a whole SAE, and each process of a mesh holds a part: shard an SAE of one "
            "round (sae.with_rounds(1, activations)) and add rounds afterwards, or train with rounds='through'"
        )

    def finish() -> None:
        if aside and isinstance(sae, FusedRationalSAE) and refinement is not None:
            source = activations if validation is None else validation
            with reading(sae, source):
                put_back(sae, refinement.rounds, _rows(source, settings) if validation is None else validation)
        elif validation is not None:
            set_l0(sae, validation)

    if not aside or not isinstance(sae, FusedRationalSAE):
        yield finish
        return
    sae.refinement = None
    try:
        yield finish
    finally:
        if sae.refinement is None:  # training was interrupted: restore the original state
            sae.refinement = refinement


@torch.no_grad()
def put_back(sae: FusedRationalSAE, rounds: int, activations: Any) -> None:
    """Adds rounds, in place, to an SAE that was trained without; at the l0 that the original rounds were made for."""
    with reading(sae, activations):
        x = sample(activations, sae, SAMPLE, 0)
        z = sae.encode(x)
        l0 = float((z != 0).sum(-1).float().mean())
        before = (l0, float((x - sae.decode(z, x)).double().square().sum(1).mean()))
        facts = add_rounds(sae, rounds, x, noted_l0(sae) or max(l0, 1.0), before)
    sae.metadata["rounds"] = {**asdict(facts), "summary": facts.summary}


def noted_l0(sae: SparseAutoencoder) -> float | None:
    """The l0 that stage 1 measured for the teacher; on validation text, if there was any."""
    for name, key in (("rounds", "target_l0"), ("stage1", "validation_l0"), ("stage1", "teacher_l0")):
        facts = sae.metadata.get(name)
        value = facts.get(key) if isinstance(facts, Mapping) else None
        if isinstance(value, int | float) and 0 < value <= sae.d_sae:
            return float(value)
    return None


def set_l0(sae: SparseAutoencoder, validation: Any) -> None:
    """Sets the l0 on validation text to the teacher's, if that is known and the SAE has thresholds."""
    target = noted_l0(sae)
    if (
        target is not None
        and isinstance(sae, FusedRationalSAE)
        and sae.gate.form == "gated"
        and not sae.compares_features
    ):
        hold_l0(sae, validation, target)


def _rows(activations: Any, settings: TrainSettings) -> Tensor:
    """A sample of the training activations, without reading all of a store."""
    if isinstance(activations, Tensor):
        return activations
    size = min(SAMPLE, int(getattr(activations, "n_tokens", settings.batch_size)))
    return next(iter(activations.batches(size, seed=settings.seed)))
