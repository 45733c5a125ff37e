"""What is compared at equal steps: the Rational SAE, its fair control, and the controls that say where a gain is from.

Every contender starts from the same teacher and sees the same batches. "control" is the teacher with its own
objective. "rectangle" is the second control: the Rational SAE's recipe with JumpReLU's rectangle kernel, as wide as
the rational's ramp and centred at the threshold, in place of the rational.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rsae_triton.common.errors import ConfigError
from rsae_triton.experiments.teach import objective_of
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.rational import FusedRationalSAE
from rsae_triton.teachers import JumpReluSAE
from rsae_triton.training.recipes import Recipe, recipe_for

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass(frozen=True)
class Contender:
    """An SAE to be trained, by which recipe; a recipe of None leaves it as it is."""

    sae: SparseAutoencoder
    recipe: Recipe | None


def contender(name: str, teacher: SparseAutoencoder, init: FusedRationalSAE) -> Contender:
    """The contender of this name.

    Args:
        name: one of CONTENDERS. teacher: the SAE being upgraded. init: it after stage 1.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in CONTENDERS:
        raise ConfigError(f"contender is {name!r}; choose from {', '.join(CONTENDERS)}")
    return CONTENDERS[name](teacher, init)


def _rsae(teacher: SparseAutoencoder, init: FusedRationalSAE) -> Contender:
    return Contender(copy.deepcopy(init), recipe_for(init))


def _control(teacher: SparseAutoencoder, init: FusedRationalSAE) -> Contender:
    return Contender(copy.deepcopy(teacher), objective_of(teacher))


def _rectangle(teacher: SparseAutoencoder, init: FusedRationalSAE) -> Contender:
    return Contender(jumprelu_like(init, slope_to_h=True), recipe_for(init))


def _thresholds(teacher: SparseAutoencoder, init: FusedRationalSAE) -> Contender:
    """The teacher's weights behind stage 1's fixed thresholds: what a TopK gains by them without any training."""
    return Contender(jumprelu_like(init), None)


CONTENDERS: dict[str, Callable[[SparseAutoencoder, FusedRationalSAE], Contender]] = {
    "rsae": _rsae,
    "control": _control,
    "rectangle": _rectangle,
    "thresholds": _thresholds,
}


def jumprelu_like(rsae: FusedRationalSAE, *, slope_to_h: bool = False) -> JumpReluSAE:
    """A JumpReLU SAE with the weights and thresholds of a gated Rational SAE and a rectangle as wide as its ramp."""
    gate = rsae.gate
    sae = JumpReluSAE(
        rsae.d_in,
        rsae.d_sae,
        threshold=gate.threshold.detach().clamp_min(0),
        bandwidth=float(gate.input_scale.detach().mean()),
        slope_to_h=slope_to_h,
        apply_b_dec_to_input=rsae.apply_b_dec_to_input,
        dtype=rsae.W_enc.dtype,
        device=rsae.W_enc.device,
    )
    with torch.no_grad():
        for name in WEIGHTS:
            getattr(sae, name).copy_(getattr(rsae, name))
    return sae
