"""The objectives: named recipes for teachers and Rational SAEs, and the controller that holds l0."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor

from rsae_triton.common.checks import check_number
from rsae_triton.common.errors import ConfigError
from rsae_triton.ops.across import Across, decode_across
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.rational import FusedRationalSAE
from rsae_triton.sae.topk_rational import TopKRationalSAE
from rsae_triton.teachers import BatchTopKSAE, JumpReluSAE, ReluSAE, TopKSAE, keep_largest
from rsae_triton.training.memory import MemoryPlan
from rsae_triton.training.on_entries import AUXILIARY_SHARE, TANH_SLOPE, below_thresholds, losses_on_entries

USUAL_K, USUAL_L0 = 32, 25.0
FAR = 3.0
"""From which factor on a starting weight is far from what a feature is worth. On SmolLM2 it is 0.55 to 2.1."""
GATE_PARAMETERS = ("alpha", "beta", "centre", "log_input_scale")

# Learning-rate factors of what rounds add; the thresholds of all rounds have the recipe's own factor.
ROUNDS_LR_SCALE = {f"refinement.{name}": 5.0 for name in ("a", "b", "eta", "p")}


@dataclass(frozen=True)
class Recipe:
    """An objective: mse + weight * sparsity.

    Attributes:
        name: its name on the command line.
        sparsity: "l1" of |z| * ||W_dec row||; "l0", the (differentiable) number of active features; "tanh" of 4 |z| *
            ||W_dec row|| (a bounded l1 for thresholds trained through a rectangle); or "none".
        weight: of the sparsity term, in units of the activations' mean norm (l1) or its square (l0), so that it means
            the same at any scale; the initial weight if `target_l0` adjusts it.
        target_l0: hold the l0 of the training batches at this value by adjusting the weight; None keeps the weight.
        soft: train on the dense rational code instead of the shipped one (the paper's way; see docs/experiments.md).
        aux_k: number of dead features that reconstruct the residual (TopK's auxiliary loss, arXiv:2406.04093); 0 for
            none.
        frozen: names of gate parameters that stay as stage 1 left them.
        lr_scale: learning-rate factor by parameter-name ending.
    """

    name: str
    sparsity: str = "l1"
    weight: float = 1.0
    target_l0: float | None = None
    soft: bool = False
    aux_k: int = 0
    frozen: tuple[str, ...] = ()
    lr_scale: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.sparsity not in ("l1", "l0", "tanh", "none"):
            raise ConfigError(f"sparsity is {self.sparsity!r}; choose l1, l0, tanh or none")
        check_number("the sparsity weight", self.weight, least=0)
        if self.target_l0 is not None:
            check_number("target_l0", self.target_l0, above=0)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("relu", "l1", weight=0.125),
        Recipe("jumprelu", "l0", weight=0.001, lr_scale={"threshold": 10.0}),
        # The penalty of https://transformer-circuits.pub/2025/january-update instead of l0, with c = 4.
        Recipe("jumprelu-tanh", "tanh", weight=0.001, lr_scale={"threshold": 10.0}),
        Recipe("topk", "none", weight=0.0, aux_k=256),
        Recipe("batchtopk", "none", weight=0.0, aux_k=256),
        # The paper to the letter (section 3.3): every parameter is trained, on mse + l1 of the soft code.
        Recipe("paper", "l1", weight=0.125, soft=True),
        # Trains the shipped code: zeros by the hard gate, gradients by the rational's slope. The weight starts at about
        # twice the value where it settles, because thresholds that rise early leave more steps to use them;
        # `relative_weight` adapts it to the teacher's sparsity. The gate's coefficients stay as fitted: if trained,
        # they bend the slope that trains everything else (docs/experiments.md).
        Recipe("hard", "l0", weight=0.0017, frozen=GATE_PARAMETERS, lr_scale={"threshold": 15.0}),
        Recipe("hard-trained", "l0", weight=0.0017, lr_scale={"threshold": 15.0}),
    )
}


def recipe_for(sae: SparseAutoencoder, name: str = "auto") -> Recipe:
    """Returns the recipe of this name, or the one that fits the SAE ("auto"); for a teacher that was trained here, its
    own objective at its own weight.

    Raises:
        ConfigError: an unknown recipe, or one that this SAE cannot be trained with.
    """
    own = own_objective(sae) if name == "auto" else {}
    if name == "auto":
        if isinstance(sae, TopKRationalSAE):
            name = "topk"
        elif isinstance(sae, FusedRationalSAE):
            name = "hard" if sae.gate.form == "gated" else "paper"
        elif isinstance(sae, JumpReluSAE):
            name = "jumprelu-tanh" if own.get("penalty") == "tanh" else "jumprelu"
        else:
            name = "topk" if isinstance(sae, TopKSAE) else "batchtopk" if isinstance(sae, BatchTopKSAE) else "relu"
    if name not in RECIPES:
        raise ConfigError(f"recipe is {name!r}; choose one of auto, {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    if recipe.sparsity != "none" and _positive(weight := own.get("weight")):
        recipe = replace(recipe, weight=float(weight))
    if recipe.soft and not isinstance(sae, FusedRationalSAE):
        raise ConfigError(f"recipe {name!r} trains a rational code; a {sae.architecture} SAE has none")
    direct = isinstance(sae, FusedRationalSAE) and sae.gate.form == "direct"
    if recipe.sparsity == "l0" and (isinstance(sae, ReluSAE) or sae.compares_features or direct):
        raise ConfigError(f"recipe {name!r} needs trainable thresholds; use a gated rational or a JumpReLU SAE")
    if recipe.sparsity == "l0" and isinstance(sae, FusedRationalSAE):
        recipe = replace(recipe, weight=start_near_worth(recipe.weight * relative_weight(sae.metadata), sae.metadata))
    if isinstance(sae, FusedRationalSAE) and sae.refinement is not None:
        recipe = replace(recipe, lr_scale=recipe.lr_scale | ROUNDS_LR_SCALE)
    return recipe


def own_objective(sae: SparseAutoencoder) -> Mapping[str, Any]:
    """How a teacher was trained here, as its metadata say; empty for others.

    An SAE that was made of a teacher of another family (`to_jumprelu` of a ReLU teacher's Rational SAE) has that one's
    metadata, whose weight is of another penalty.
    """
    known = sae.metadata.get("objective")
    if isinstance(sae, FusedRationalSAE) or not isinstance(known, Mapping):
        return {}
    family = str(known.get("family")).removesuffix("transcoder").rstrip("_") or "jumprelu"
    kind = {"relu": ReluSAE, "jumprelu": JumpReluSAE, "topk": TopKSAE, "batchtopk": BatchTopKSAE}.get(family)
    return known if kind is not None and isinstance(sae, kind) else {}


def relative_weight(metadata: Mapping[str, Any]) -> float:
    """How much the teacher of an SAE values sparsity, relative to the teachers that the recipes were chosen on (1).

    This is the teacher's sparsity weight divided by its family's usual one, or for TopK the usual k divided by its k.
    If the teacher was held at an l0, or trained elsewhere, it is estimated from l0: the weight at which training
    settles goes as l0 to the power -1.5 (docs/experiments.md).
    """
    objective, stage1 = metadata.get("objective"), metadata.get("stage1")
    if isinstance(objective, Mapping):
        usual = RECIPES.get(str(objective.get("family")))
        own, k, held = objective.get("weight"), objective.get("k"), objective.get("l0")
        if usual is not None and usual.weight and _positive(held):
            return float((USUAL_L0 / float(held)) ** 1.5)
        if usual is not None and usual.weight and _positive(own):
            return float(own) / usual.weight
        return USUAL_K / float(k) if usual is not None and usual.sparsity == "none" and _positive(k) else 1.0
    l0 = stage1.get("teacher_l0") if isinstance(stage1, Mapping) else None
    return float((USUAL_L0 / float(l0)) ** 1.5) if _positive(l0) else 1.0


def start_near_worth(weight: float, metadata: Mapping[str, Any]) -> float:
    """Returns `weight`, or what stage 1 found a feature to be worth (`StageOne.worth`) if that is far from it.

    Training settles somewhat below that worth. The recipe's weight is near it on models like the one it was chosen on;
    but where activations vary little around a large mean it is many times too large, and then most features die before
    the weight has found its way back (docs/experiments.md).
    """
    stage1 = metadata.get("stage1")
    worth = stage1.get("worth") if isinstance(stage1, Mapping) else None
    return float(worth) if _positive(worth) and not 1 / FAR <= weight / worth <= FAR else weight


def _positive(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and 0 < value < math.inf


def training_l0(teacher: SparseAutoencoder, teacher_l0: float) -> float:
    """The l0 at which to train a Rational SAE of `teacher` and its controls, which are then compared at the teacher's
    l0.

    It is a little higher, because a code can be thresholded down to an l0 but never up. For TopK it is the same, since
    its control cannot exceed k and has l0 = k on other text as well.
    """
    return teacher_l0 * (1.0 if isinstance(teacher, TopKSAE) else 1.04)


def holding(recipe: Recipe, sae: SparseAutoencoder, target_l0: float | str | None) -> Recipe:
    """Returns the recipe with l0 held at `target_l0`, if its sparsity term can do that.

    target_l0: None keeps the recipe's weight. "auto" is the recipe's own target, else the one that stage 1 noted in the
    SAE (`training_l0` of its teacher), else none.
    """
    if target_l0 == "auto":
        stage1 = sae.metadata.get("stage1")
        noted = stage1.get("train_l0") if isinstance(stage1, Mapping) else None
        target_l0 = noted if recipe.target_l0 is None and _positive(noted) else recipe.target_l0
    if target_l0 is not None:
        check_number("target_l0", target_l0, above=0)
    return recipe if target_l0 is None or recipe.sparsity == "none" else replace(recipe, target_l0=float(target_l0))


class SparsityController:
    """The sparsity weight in the units of the loss, adjusted to hold l0 at a target if there is one.

    This is proportional-integral control of log(weight) on log(l0 / target), averaged over about 10 batches, so it is
    scale-free and the weight stays positive. (Thresholds integrate the weight themselves; integral control alone would
    oscillate.) The integral part stays within a factor 100 of its start: a target that cannot be reached shows in the
    log as a weight at its limit, not as a diverging loss.

    During the warm-up of the sparsity term the target falls geometrically from the l0 of the first batch, and the
    weight is raised where l0 is above it. (If the starting weight is far too low for the target, its warm-up alone
    changes nothing: the code is dense until the end, then loses nine tenths of its l0 within a few steps, and features
    die.)
    """

    _STATE = ("weight", "_base", "_low", "_high", "_start", "_average", "_first")

    def __init__(
        self,
        recipe: Recipe,
        norm: float = 1.0,
        *,
        proportional: float = 3.0,
        integral: float = 0.02,
        memory: float = 0.9,
    ) -> None:
        """norm: the activations' mean norm."""
        self.target, self.weight = recipe.target_l0, recipe.weight * (norm if recipe.sparsity == "l1" else norm**2)
        self._base = self._start = self.weight
        self._low, self._high = self.weight / 100, self.weight * 100
        self._proportional, self._integral, self._memory = proportional, integral, memory
        self._average: float | None = None
        self._first: float | None = None

    def update(self, l0: float, warm: float = 1.0) -> float:
        """Takes the mean l0 of a batch and returns the weight for the next batch. warm: how much of the warm-up is
        done, from 0 to 1."""
        self._average = l0 if self._average is None else self._memory * self._average + (1 - self._memory) * l0
        self._first = l0 if self._first is None else self._first
        if self.target is not None:
            target = self.target * max(self._first / self.target, 1.0) ** (1 - warm)
            error = math.log(max(self._average, 1e-3) / target)
            low = self._start if warm < 1 else self._low
            self._base = min(max(self._base * math.exp(self._integral * error), low), self._high)
            self.weight = self._base * math.exp(self._proportional * max(-1.0, min(1.0, error)))
            self.weight = max(self.weight, self._start) if warm < 1 else self.weight
        return self.weight

    def state(self) -> dict[str, float | None]:
        """The controller's state; after `restore` it continues as if it had not stopped."""
        return {name: getattr(self, name) for name in self._STATE}

    def restore(self, state: dict[str, float | None]) -> None:
        for name in self._STATE:
            setattr(self, name, state.get(name, getattr(self, name)))  # older checkpoints have no `_start` and `_first`


@dataclass
class Losses:
    """The terms of one batch: `total` to differentiate, the rest for the log; counts for dead features.

    share: the fraction of [n_tokens, d_sae] that the support takes, if the step was sparse; 1 if the support was too
    large for that; None if the step was dense. On a GPU it is a tensor; if the entries did not fit it is infinite, the
    loss is NaN, and the step must be repeated densely. squares: the squared norm of the gradients of W_enc and W_dec
    (without the radial part, if that is to be removed), if the step computed it. missed: what a check of its screened
    product found (`Screen.found`), if there was one.
    """

    total: Tensor
    mse: Tensor
    l0: Tensor
    counts: Tensor
    share: float | Tensor | None = None
    squares: Tensor | None = None
    missed: Tensor | None = None


def losses(
    sae: SparseAutoencoder,
    rows: Tensor,
    recipe: Recipe,
    weight: float,
    dead: Tensor | None = None,
    plan: MemoryPlan | None = None,
    across: Across | None = None,
) -> Losses:
    """Computes mse (mean over tokens of ||x - x_hat||^2) + weight * sparsity (mean over tokens).

    Args:
        rows: [n_tokens, d_in]; for a transcoder input and target beside each other. weight: of the sparsity term.
        dead: [d_sae] bool, features for the auxiliary loss.
        plan: how the step is cut to fit into memory; whole when None. across: the other processes that hold features of
            this SAE; mse is then of the whole, while sparsity, l0 and counts are of the features here.
    """
    if isinstance(sae, FusedRationalSAE) and sae.refinement is not None and not recipe.aux_k:
        return _losses_of_rounds(sae, rows, recipe, weight, plan is not None and plan.exact, across)
    x, y = sae.sides(rows)
    sparse = plan is not None and plan.mode == "sparse"
    places = max(len(x) * sae.d_sae, 1)
    most = plan.most_entries(places) if plan is not None and (across is None or plan.on_gpu) else None
    share: float | Tensor | None = 1.0 if sparse else None
    if plan is not None and sparse and not isinstance(sae, FusedRationalSAE):
        found = losses_on_entries(
            sae, x, sparsity=recipe.sparsity, weight=weight, aux_k=recipe.aux_k, dead=dead, most=most,
            exact=plan.exact, across=across, kernels=plan.on_gpu,
        )  # fmt: skip
        if found is not None:
            return Losses(*found[:4], share=found.entries / places)
    elif plan is not None and plan.mode != "saved":
        assert isinstance(sae, FusedRationalSAE)
        cut = sae.autoencode(
            x,
            hard=not recipe.soft,
            l1_weight=weight if recipe.sparsity == "l1" else 0.0,
            l0_weight=weight if recipe.sparsity == "l0" else 0.0,
            chunk_tokens=plan.chunk_tokens,
            chunk_features=plan.chunk_features,
            memory="sparse" if sparse else "dense",
            exact=plan.exact,
            most_entries=most if sparse else None,
            across=across,
            target=None if y is x else y,
        )
        if sparse and cut.entries.device.type == "cuda":  # a float would wait for the GPU
            share = torch.where(cut.entries > (places if most is None else most), torch.inf, cut.entries / places)
        elif sparse and (entries := int(cut.entries)) >= 0:
            share = entries / places if most is None or entries <= most else math.inf
        return Losses(cut.total, cut.mse.detach(), cut.l0.detach(), cut.counts.detach(), share)
    if isinstance(sae, FusedRationalSAE):
        z, counts, l1 = sae.encode_with_sums(x, hard=not recipe.soft)
    else:
        z, counts = sae.encode_with_counts(x)
        l1 = None
    if across is None:
        x_hat = sae.decode(z, x)
    else:
        x_hat = sae.normalization(x).undo(decode_across(z, sae.W_dec, sae.b_dec, across))
    residual = y - x_hat
    mse = residual.square().sum(-1).mean()
    total = mse
    l0 = counts.sum() / len(x)
    if recipe.sparsity == "l1":
        norms = sae.W_dec.norm(dim=1)
        total = total + weight * ((z.abs() @ norms).mean() if l1 is None else (l1 * norms).sum() / len(x))
    elif recipe.sparsity == "tanh":
        total = total + weight * torch.tanh(TANH_SLOPE * z.abs() * sae.W_dec.norm(dim=1)).sum(1).mean()
    elif recipe.sparsity == "l0":
        total = total + weight * l0
    if recipe.aux_k and dead is not None and bool(dead.any()):
        total = total + auxiliary_loss(sae, x, residual.detach(), dead, recipe.aux_k) * AUXILIARY_SHARE
        total = total + below_thresholds(sae, x, dead)
    return Losses(total, mse.detach(), l0.detach(), counts.detach(), share)


def _losses_of_rounds(
    sae: FusedRationalSAE, x: Tensor, recipe: Recipe, weight: float, exact: bool, across: Across | None
) -> Losses:
    """The losses of an encoder with rounds, which always works on entries."""
    l1, l0 = (weight if recipe.sparsity == name else 0.0 for name in ("l1", "l0"))
    found = sae.autoencode(x, hard=not recipe.soft, l1_weight=l1, l0_weight=l0, exact=exact, across=across)
    share = max(int(found.entries), 0) / max(len(x) * sae.d_sae, 1)
    return Losses(found.total, found.mse, found.l0, found.counts, share)


def auxiliary_loss(sae: SparseAutoencoder, x: Tensor, residual: Tensor, dead: Tensor, k: int) -> Tensor:
    """How well the k strongest dead features reconstruct the residual of the live ones (arXiv:2406.04093, app. A.2)."""
    h = sae.hidden_pre(x)
    z = keep_largest(h.masked_fill(~dead, -torch.inf), min(k, int(dead.sum()))).relu()
    return (residual - sae.normalization(x).scale * (z @ sae.W_dec)).square().sum(-1).mean()
