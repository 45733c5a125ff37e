"""Stage 2, and the training of teachers and controls: one loop for every SAE of the package."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .base import SparseAutoencoder
from .errors import ConfigError, NumericsError, ShapeError
from .memory import plan_memory
from .recipes import Recipe, SparsityController, holding, losses, recipe_for

LR = 6e-4


class Activations(Protocol):
    """What can be trained on besides a tensor: an `ActivationStore`, or anything with these two."""

    d_in: int

    def batches(self, batch_size: int, *, seed: int) -> Iterator[Tensor]:
        """Shuffled batches [batch_size, d_in], epoch after epoch without end."""


@dataclass
class TrainLog:
    """What a run did: one entry per logged step in each list, and what it cost."""

    recipe: str
    steps: int
    batch_size: int
    seed: int
    step: list[int] = field(default_factory=list)
    mse: list[float] = field(default_factory=list)
    l0: list[float] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    dead: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def tensor_batches(x: Tensor, batch_size: int, *, seed: int) -> Iterator[Tensor]:
    """Shuffled batches [batch_size, d_in] of x [n_tokens, d_in], epoch after epoch; the order depends on seed only."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(x), generator=generator)
        for start in range(0, len(x) - batch_size + 1, batch_size):
            yield x[order[start : start + batch_size].to(x.device)]


def train(
    sae: SparseAutoencoder,
    activations: Tensor | Activations,
    *,
    steps: int,
    recipe: str | Recipe = "auto",
    target_l0: float | None = None,
    batch_size: int = 512,
    lr: float = LR,
    warmup: int | None = None,
    decay: float = 0.2,
    sparsity_warmup: int = 0,
    clip: float = 1.0,
    seed: int = 0,
    dead_after: int = 10_000,
    log_every: int = 10,
    label: str | None = None,
    progress: bool = True,
    memory: str = "auto",
) -> TrainLog:
    """Trains every parameter of `sae` in place: mse + weight * sparsity.

    The norm of every decoder row stays what it is: a free norm evades the l1 penalty, for a Rational SAE and its
    teacher alike.

    Args:
        sae: a teacher, a control or a Rational SAE. activations: [n_tokens, d_in], or an `ActivationStore`.
        steps, batch_size: optimiser steps and tokens in each.
        recipe: a name of `recipes.RECIPES`, "auto" for the one that fits the SAE, or a `Recipe`.
        target_l0: hold l0 here by steering the sparsity weight (recipes that have one).
        lr: of Adam; warmed up linearly over `warmup` steps (steps // 20 when None) and brought to zero linearly
            over the last `decay` of the run.
        sparsity_warmup: steps over which the sparsity weight rises from zero; for training from scratch, where
            the full weight on an untrained code kills features.
        clip: largest norm of the gradient. seed: of the order of batches, nothing else is random.
        dead_after: tokens without activity after which a feature counts as dead.
        log_every: steps between entries of the log. label: shown beside the progress bar.
        memory: how a step is cut so that it fits: "saved" (not at all), "chunked" over tokens, "streamed" over
            features, or "auto", the first of these that fits into free memory (see `plan_memory`). The numbers are
            the same to rounding.

    Returns:
        The log; `sae` is changed.

    Raises:
        ShapeError: activations of another width. ConfigError: settings that cannot be used.
        NumericsError: activations or a loss that are not finite; the message names the step, and `sae` holds the
            parameters of the last good logged step.
    """
    if isinstance(recipe, str):
        recipe = recipe_for(sae, recipe)
    recipe = holding(recipe, target_l0)
    width = activations.shape[-1] if isinstance(activations, Tensor) else activations.d_in
    if width != sae.d_in:
        raise ShapeError(
            f"the activations have d_in={width}, the SAE has d_in={sae.d_in}; they must come from one hook"
        )
    for name, value, low in (("steps", steps, 0), ("batch_size", batch_size, 1), ("log_every", log_every, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ConfigError(f"{name} is {value!r}; give an integer of at least {low}")
    if not lr > 0 or not math.isfinite(lr):
        raise ConfigError(f"lr is {lr}; give a positive number")
    if isinstance(activations, Tensor):
        if len(activations) < batch_size:
            raise ShapeError(f"{len(activations)} tokens are fewer than one batch of {batch_size}; lower batch_size")
        batches = tensor_batches(activations, batch_size, seed=seed)
    else:
        batches = activations.batches(batch_size, seed=seed)

    plan = plan_memory(sae, batch_size, memory, aux_k=recipe.aux_k)
    if progress and plan.mode != "saved":
        print(plan)
    log = TrainLog(recipe.name, steps, batch_size, seed)
    optimizer = _optimizer(sae, recipe, lr)
    warmup = steps // 20 if warmup is None else warmup
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, steps, warmup, decay))
    controller: SparsityController | None = None
    idle = torch.zeros(sae.d_sae, device=sae.W_dec.device)
    norms = sae.W_dec.detach().norm(dim=1, keepdim=True)
    good = _snapshot(sae)
    started = time.perf_counter()
    bar = _progress(label or f"training ({recipe.name})", steps, batch_size, progress)
    with bar as advance, _frozen(sae, recipe), _training(sae):
        for step in range(steps):
            x = next(batches).to(device=sae.W_dec.device, dtype=sae.W_dec.dtype)
            if controller is None:
                controller = SparsityController(recipe, float(x.float().norm(dim=1).mean()))
            dead = idle > dead_after
            ramp = min(1.0, step / sparsity_warmup) if sparsity_warmup else 1.0
            terms = losses(sae, x, recipe, ramp * controller.weight, dead if recipe.aux_k else None, plan)
            optimizer.zero_grad(set_to_none=True)
            terms.total.backward()
            _remove_radial_gradient(sae.W_dec)
            norm = nn.utils.clip_grad_norm_([p for p in sae.parameters() if p.requires_grad], clip)
            logged = step % log_every == 0 or step == steps - 1
            if logged:
                if not (bool(torch.isfinite(terms.total)) and bool(torch.isfinite(norm))):
                    sae.load_state_dict(good)
                    raise NumericsError(_explain_nan(step, x, terms.total, norm))
                good = _snapshot(sae)
            optimizer.step()
            schedule.step()
            sae.scale_decoder_rows_(norms)
            sae.constrain_()
            idle = torch.where(terms.counts > 0, 0.0, idle + len(x))
            if ramp == 1.0:
                controller.update(float(terms.l0))
            if logged:
                log.step.append(step)
                log.mse.append(float(terms.mse))
                log.l0.append(float(terms.l0))
                log.weight.append(ramp * controller.weight)
                log.dead.append(int(dead.sum()))
            advance(log)
    log.seconds = time.perf_counter() - started
    return log


def _optimizer(sae: SparseAutoencoder, recipe: Recipe, lr: float) -> torch.optim.Optimizer:
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in sae.named_parameters():
        scale = next((factor for ending, factor in recipe.lr_scale.items() if name.endswith(ending)), 1.0)
        groups.setdefault(scale, []).append(parameter)
    return torch.optim.Adam(
        [{"params": parameters, "lr": lr * scale} for scale, parameters in groups.items()],
        betas=(0.9, 0.999),
        fused=sae.W_dec.device.type in ("cuda", "cpu"),
    )


def _schedule(step: int, steps: int, warmup: int, decay: float) -> float:
    """Factor on the learning rate: linear warm-up, flat, linear decay to zero over the last `decay` of the steps."""
    up = (step + 1) / warmup if step < warmup else 1.0
    return min(up, (steps - step) / max(1.0, decay * steps))


def _remove_radial_gradient(W_dec: nn.Parameter) -> None:
    """Drops the part of the decoder's gradient along its rows: their norm is fixed, Adam must not chase it."""
    grad, rows = W_dec.grad, W_dec.detach()
    if grad is not None:
        along = (grad * rows).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True).clamp_min(1e-12)
        grad.addcmul_(along, rows, value=-1)


def _snapshot(sae: SparseAutoencoder) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}


def _explain_nan(step: int, x: Tensor, loss: Tensor, norm: Tensor) -> str:
    bad = int((~torch.isfinite(x)).sum())
    where = f"the batch holds {bad} NaN or infinite activations" if bad else "the activations of the batch are finite"
    return (
        f"training stopped at step {step}: loss {float(loss):g}, gradient norm {float(norm):g} ({where}); the SAE is "
        "back at the last good logged step. Lower lr, or clean the activations"
    )


@contextmanager
def _training(sae: SparseAutoencoder) -> Iterator[None]:
    """Training mode, which a BatchTopK encodes differently in; afterwards the mode it was found in."""
    before = sae.training
    sae.train()
    try:
        yield
    finally:
        sae.train(before)


@contextmanager
def _frozen(sae: SparseAutoencoder, recipe: Recipe) -> Iterator[None]:
    """Takes the recipe's frozen parameters out of training, and puts them back as they were."""
    held = [p for name, p in sae.named_parameters() if name.removeprefix("gate.") in recipe.frozen and p.requires_grad]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


@contextmanager
def _progress(label: str, steps: int, batch_size: int, show: bool) -> Iterator[Any]:
    """A bar with tokens/s, ETA, mse and l0."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    started = time.perf_counter()
    with Progress(*columns, disable=not show) as bar:
        task = bar.add_task(label, total=steps, state="")

        def advance(log: TrainLog) -> None:
            done = bar.tasks[0].completed + 1
            rate = done * batch_size / max(time.perf_counter() - started, 1e-9)
            state = f"{rate:,.0f} tok/s  mse {log.mse[-1]:.1f}  l0 {log.l0[-1]:.1f}"
            bar.update(task, advance=1, state=state)

        yield advance
