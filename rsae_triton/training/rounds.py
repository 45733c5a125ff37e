"""How training treats rounds: sets them aside or trains through them, and sets l0 afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from rsae_triton.common.errors import ConfigError
from rsae_triton.sae.added import scores
from rsae_triton.sae.adding import add_rounds, hold_l0
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.like_teacher import sample
from rsae_triton.sae.rational import FusedRationalSAE
from rsae_triton.sae.rounds import Refinement
from rsae_triton.sae.units import reading
from rsae_triton.training.settings import TrainSettings

LEAST_A, MOST_B = 0.3, 0.7
SAMPLE = 8192
"""Number of tokens on which l0 is set."""


@contextmanager
def rounds_aside(
    sae: SparseAutoencoder, settings: TrainSettings, activations: Any, validation: Any, mesh: Any
) -> Iterator[Callable[[], None]]:
    """Within the context, `sae` is what is to be trained. Yields a function that adds the rounds again and sets l0.

    Raises:
        ConfigError: rounds would have to be set aside, or l0 set, where each process holds only a part of the SAE.
    """
    refinement = sae.refinement if isinstance(sae, FusedRationalSAE) else None
    aside = refinement is not None and settings.rounds == "after"
    if aside and mesh is not None:
        raise ConfigError(
            "rounds='after' adds rounds to a whole SAE, and each process of a mesh holds a part: shard an SAE of one "
            "round (sae.with_rounds(1, activations)) and add rounds afterwards, or train with rounds='through'"
        )
    if aside:
        check_searched(sae)
    if validation is not None and mesh is not None and mesh.features[1] > 1:
        raise ConfigError(
            "validation sets the l0 of a whole SAE, and each process of this mesh holds a part: leave it out, and call "
            "rsae_triton.sae.adding.hold_l0 on the whole SAE afterwards (`rsae train --validation` does both)"
        )

    def finish() -> None:
        if aside or validation is not None:
            held_out = activations if validation is None else validation
            with reading(sae, held_out):
                rows = _rows(held_out, settings) if validation is None else validation
                finish_training(sae, refinement if aside else None, rows, settings.target_l0)

    if not aside or not isinstance(sae, FusedRationalSAE):
        if refinement is not None:
            moderate_starts(sae)
        yield finish
        return
    sae.refinement = None
    try:
        yield finish
    finally:
        if sae.refinement is None:  # training was interrupted: restore the original state
            sae.refinement = refinement


def finish_training(
    sae: SparseAutoencoder, aside: Refinement | None, activations: Any, target_l0: float | str | None
) -> None:
    """Adds the rounds that training left aside (None if there were none) and sets l0, in place.

    target_l0: of the training's settings. A number is what l0 is set to; otherwise it is the teacher's.
    """
    given = float(target_l0) if isinstance(target_l0, int | float) else None
    if aside is not None and isinstance(sae, FusedRationalSAE):
        put_back(sae, aside, activations, given)
    else:
        set_l0(sae, activations, given)


def check_searched(sae: SparseAutoencoder) -> None:
    """Raises ConfigError if the rounds of `sae` have been trained or set by hand: rounds="after" searches for their
    numbers again, and these would be lost."""
    facts, refinement = sae.metadata.get("rounds"), getattr(sae, "refinement", None)
    if refinement is None:
        return
    known = facts if isinstance(facts, Mapping) else {}
    for name in ("a", "b", "eta", "p"):
        values = getattr(refinement, name).detach()
        start = known.get(name)
        wanted = start if isinstance(start, int | float) else float(values.flatten()[0])
        if not torch.equal(values, torch.full_like(values, wanted)):
            raise ConfigError(
                "the rounds of this SAE have been trained or set by hand, and rounds='after' would replace their "
                "numbers by searched ones: train with rounds='through'; or begin with sae.with_rounds(1, activations)"
            )


@torch.no_grad()
def moderate_starts(sae: SparseAutoencoder) -> None:
    """Moves a and b, in place, away from extreme values that the search for untrained rounds has found.

    For ReLU teachers, whose amplitudes are too small, the least error without training is at a = 0.1 and b = 1, but
    training from there ends with 5 % more error than from a = 0.3 and b = 0.7 (docs/experiments.md). Rounds that have
    been trained, or were set by hand, stay as they are.
    """
    facts, refinement = sae.metadata.get("rounds"), getattr(sae, "refinement", None)
    if not isinstance(facts, Mapping) or refinement is None:
        return
    for name, low, high in (("a", LEAST_A, math.inf), ("b", -math.inf, MOST_B)):
        start, values = facts.get(name), getattr(refinement, name)
        if isinstance(start, int | float) and torch.equal(values, torch.full_like(values, start)):
            values.clamp_(low, high)


@torch.no_grad()
def put_back(sae: FusedRationalSAE, aside: Refinement, activations: Any, target_l0: float | None = None) -> None:
    """Adds as many rounds as `aside` has, with its weights of dimensions, in place, to an SAE that was trained without;
    at `target_l0`, or else at the l0 that the original rounds were made for."""
    with reading(sae, activations):
        x = sample(activations, sae, SAMPLE, 0)
        before = scores(sae, x)
        l0 = target_l0 or noted_l0(sae) or max(before.l0, 1.0)
        facts = add_rounds(sae, aside.rounds, x, l0, before, aside.weights)
    sae.metadata["rounds"] = {**asdict(facts), "summary": facts.summary}


def noted_l0(sae: SparseAutoencoder) -> float | None:
    """The l0 that stage 1 measured for the teacher; on validation text, if there was any."""
    for name, key in (("rounds", "target_l0"), ("stage1", "validation_l0"), ("stage1", "teacher_l0")):
        facts = sae.metadata.get(name)
        value = facts.get(key) if isinstance(facts, Mapping) else None
        if isinstance(value, int | float) and 0 < value <= sae.d_sae:
            return float(value)
    return None


def set_l0(sae: SparseAutoencoder, activations: Any, target_l0: float | None = None) -> None:
    """Sets the l0 on these activations to `target_l0`, or else to the teacher's if that is known; only for an SAE with
    thresholds."""
    target = noted_l0(sae) if target_l0 is None else target_l0
    if (
        target is not None
        and isinstance(sae, FusedRationalSAE)
        and sae.gate.form == "gated"
        and not sae.compares_features
    ):
        hold_l0(sae, activations, target)


def _rows(activations: Any, settings: TrainSettings) -> Tensor:
    """A sample of the training activations, without reading all of a store."""
    if isinstance(activations, Tensor):
        return activations
    size = min(SAMPLE, int(getattr(activations, "n_tokens", settings.batch_size)))
    return next(iter(activations.batches(size, seed=settings.seed)))
