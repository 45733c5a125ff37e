"""The SAEs that are compared after equally many steps: the Rational SAE and its controls.

Every contender starts from the same teacher and sees the same batches. "control" is the teacher, trained on with its
own objective. "rectangle" is the second control: the Rational SAE's recipe, but with JumpReLU's rectangle kernel, as
wide as the rational's ramp and centred at the threshold, in place of the rational. NAME@N is contender NAME (or the
teacher) with an encoder of N rounds added afterwards, without training. NAME@Nw: these rounds weigh the dimensions by
how much the language model listens to them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rsae_triton.common.errors import ConfigError
from rsae_triton.experiments.teach import objective_of
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.gate import RationalGate
from rsae_triton.sae.rational import FusedRationalSAE
from rsae_triton.teachers import JumpReluSAE
from rsae_triton.training.recipes import Recipe, recipe_for
from rsae_triton.training.rounds import noted_l0

if TYPE_CHECKING:
    from rsae_triton.training.metrics import TrainLog

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
ROUNDS = 2
"""How many rounds a contender has that is trained with more than one."""


@dataclass(frozen=True)
class Contender:
    """An SAE to train, and the recipe; None leaves it untrained. as_long_as: a contender whose training time this one
    gets, instead of its number of steps."""

    sae: SparseAutoencoder
    recipe: Recipe | None
    as_long_as: str | None = None


def parse_contender(name: str) -> tuple[str, int, bool]:
    """Splits NAME, NAME@ROUNDS or NAME@ROUNDSw into (NAME, rounds, weighed); rounds is 0 if none are added.

    Raises:
        ConfigError: an unknown name, or rounds that are not a number above 1.
    """
    base, mark, rounds = name.partition("@")
    weighed = rounds.endswith("w")
    rounds = rounds.removesuffix("w")
    known = (*CONTENDERS, "scratch", "pursuit") + (("teacher",) if mark else ())
    if base not in known or (mark and base == "pursuit"):
        raise ConfigError(
            f"contender is {name!r}; choose from {', '.join(CONTENDERS)}, scratch, pursuit, or NAME@ROUNDS of one of "
            "them or of teacher"
        )
    if mark and not (rounds.isascii() and rounds.isdigit() and 2 <= int(rounds) <= 64):
        raise ConfigError(f"contender is {name!r}; give 2 to 64 rounds, as in {base}@2")
    return base, int(rounds) if mark else 0, weighed


def contender(name: str, teacher: SparseAutoencoder, init: FusedRationalSAE, x: Tensor) -> Contender:
    """Makes the contender of this name.

    Args:
        name: one of CONTENDERS. teacher: the SAE being upgraded. init: the upgraded SAE after stage 1, with one round.
            x: activations [n, d_in] to set the thresholds of further rounds on.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in CONTENDERS:
        raise ConfigError(f"contender is {name!r}; choose from {', '.join(CONTENDERS)}")
    return CONTENDERS[name](teacher, init, x)


def _rsae(teacher: SparseAutoencoder, init: FusedRationalSAE, x: Tensor) -> Contender:
    return Contender(copy.deepcopy(init), recipe_for(init))


def _control(teacher: SparseAutoencoder, init: FusedRationalSAE, x: Tensor) -> Contender:
    return Contender(copy.deepcopy(teacher), objective_of(teacher))


def _control_compute(teacher: SparseAutoencoder, init: FusedRationalSAE, x: Tensor) -> Contender:
    """The control, trained for as many seconds as the contender "refined"."""
    return Contender(copy.deepcopy(teacher), objective_of(teacher), as_long_as="refined")


def _rectangle(teacher: SparseAutoencoder, init: FusedRationalSAE, x: Tensor) -> Contender:
    return Contender(jumprelu_like(init, slope_to_h=True), recipe_for(init))


def _refined(teacher: SparseAutoencoder, init: FusedRationalSAE, x: Tensor) -> Contender:
    """The Rational SAE, trained with two rounds."""
    made = init.with_rounds(ROUNDS, x, target_l0=noted_l0(init))
    return Contender(made, recipe_for(made))


def _rectangle_refined(teacher: SparseAutoencoder, init: FusedRationalSAE, x: Tensor) -> Contender:
    made = rectangle_gated(init).with_rounds(ROUNDS, x, target_l0=noted_l0(init))
    return Contender(made, recipe_for(made))


def _thresholds(teacher: SparseAutoencoder, init: FusedRationalSAE, x: Tensor) -> Contender:
    """The teacher's weights with stage 1's fixed thresholds: what a TopK teacher gains by these without any
    training."""
    return Contender(jumprelu_like(init), None)


CONTENDERS: dict[str, Callable[[SparseAutoencoder, FusedRationalSAE, Tensor], Contender]] = {
    "rsae": _rsae,
    "control": _control,
    "rectangle": _rectangle,
    "refined": _refined,
    "rectangle-refined": _rectangle_refined,
    "control-compute": _control_compute,
    "thresholds": _thresholds,
}


def more_rounds(sae: SparseAutoencoder, rounds: int, x: Tensor, weights: Tensor | None = None) -> FusedRationalSAE:
    """Returns `sae` with an encoder of this many rounds, at the same l0. Nothing is trained. weights: of dimensions."""
    return sae.with_rounds(rounds, x, weights=weights)


def steps_for(entry: Contender, steps: int, logs: dict[str, TrainLog]) -> int:
    """Returns `steps`, or the number of steps that take as long as the other contender's training took.

    Raises:
        ConfigError: the other contender has not been trained.
    """
    if entry.as_long_as is None:
        return steps
    if entry.as_long_as not in logs or "control" not in logs:
        raise ConfigError(f"control-compute is timed against {entry.as_long_as} and control; name them before it")
    return max(1, round(steps * logs[entry.as_long_as].seconds / logs["control"].seconds))


def jumprelu_like(rsae: FusedRationalSAE, *, slope_to_h: bool = False) -> JumpReluSAE:
    """Returns a JumpReLU SAE with the weights and thresholds of a gated Rational SAE and a rectangle as wide as its
    ramp."""
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


def rectangle_gated(rsae: FusedRationalSAE) -> FusedRationalSAE:
    """Returns `jumprelu_like(rsae, slope_to_h=True)` as a Rational SAE, to which rounds can be added.

    JumpReLU's rectangle is the slope of a straight line, which is a rational of degree (1, 0).
    """
    gate = RationalGate(
        rsae.d_sae,
        (1, 0),
        [0.5, 0.5],
        [],
        form="gated",
        amplitude="identity",
        backward="rational",
        input_scale=float(rsae.gate.input_scale.detach().mean()) / 2,
        threshold=rsae.gate.threshold.detach().clamp_min(0),
    )
    sae = FusedRationalSAE(
        rsae.d_in,
        rsae.d_sae,
        gate=gate,
        backend=rsae.backend,
        apply_b_dec_to_input=rsae.apply_b_dec_to_input,
        normalize_activations=rsae.normalize_activations,
        dtype=rsae.W_enc.dtype,
        device=rsae.W_enc.device,
        metadata=copy.deepcopy(rsae.metadata),
    )
    with torch.no_grad():
        for name in WEIGHTS:
            getattr(sae, name).copy_(getattr(rsae, name))
    return sae
