"""The training loop: stage 2, and the training of teachers and controls, for every SAE of the package."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Protocol, Unpack

import torch
from torch import Tensor

from rsae_triton.activations.pairs import row_width
from rsae_triton.common.checks import check_data, check_names
from rsae_triton.common.errors import ConfigError, ShapeError, Stopped
from rsae_triton.common.files import check_folder, check_room
from rsae_triton.ops.runtime import deterministic, only_writer, stop_signal
from rsae_triton.sae.base import SparseAutoencoder, check_sae
from rsae_triton.sae.sides import side_by_side
from rsae_triton.sae.units import check_place, reading, take_note, warn_of_units
from rsae_triton.training.checkpoints import FOLDER, Checkpoints
from rsae_triton.training.language import LanguageLoss, language_memory, only_the_sae
from rsae_triton.training.memory import plan_memory
from rsae_triton.training.metrics import Metrics, TrainLog, progress_bar, take_up
from rsae_triton.training.on_entries import by_triton, reason_against
from rsae_triton.training.options import TrainOptions
from rsae_triton.training.processes import Alone
from rsae_triton.training.recipes import Recipe, holding, recipe_for
from rsae_triton.training.resuming import identity_of, restore
from rsae_triton.training.rounds import rounds_aside
from rsae_triton.training.run import Run
from rsae_triton.training.settings import KEPT_BY, LR, TrainSettings

if TYPE_CHECKING:
    from rsae_triton.activations.host import HostModel
    from rsae_triton.training.distributed import Mesh

__all__ = ["LR", "Activations", "TrainLog", "TrainSettings", "tensor_batches", "train"]


class Activations(Protocol):
    """Anything that can be trained on besides a tensor: an `ActivationStore`, or an object with these two members."""

    d_in: int

    def batches(self, batch_size: int, *, seed: int) -> Iterator[Tensor]:
        """Yields shuffled batches [batch_size, d_in], epoch after epoch without end.

        To resume, it also takes start=, the number of batches to skip; for several processes part=(rank, size), the
        share of the rows of every batch.
        """


def train(
    sae: SparseAutoencoder,
    activations: Tensor | Activations,
    settings: TrainSettings | None = None,
    *,
    targets: Tensor | None = None,
    label: str | None = None,
    progress: bool = True,
    mesh: Mesh | None = None,
    host: HostModel | None = None,
    validation: Tensor | Activations | None = None,
    **changes: Unpack[TrainOptions],
) -> TrainLog:
    """Trains `sae` in place to minimise mse + weight * sparsity; the recipe and `trainable` may hold some parameters
    fixed.

    Args:
        sae: a teacher, a control or a Rational SAE; with a mesh, this process's part of it (`Mesh.shard`).
        activations: an `ActivationStore`, or [n_tokens, d_in] in the units that `sae` reads; the same on every process.
        targets: for a transcoder, the activations that it should write, [n_tokens, d_out], row by row beside the ones
            it reads. A `PairedStore` as `activations` holds both.
        settings: a `TrainSettings`. `changes` are fields of it as keyword arguments (steps=400, target_l0=20,
            out="run", ...), without settings or overriding some of them.
        label: shown beside the progress bar. progress: whether to show the bar and the memory plan.
        mesh: the processes that train together (`rsae_triton.training.distributed`).
        host: for objective="mse+kl", the language model that the activations are from; its weights are not trained.
        validation: activations that are not trained on, on which l0 is set after training by shifting all thresholds by
            one constant: to `target_l0` if that is a number, else to the teacher's l0 (with rounds, the one that they
            were made for). Without validation, l0 stays as trained; rounds="after" sets it on a sample of
            `activations`.

    Returns:
        The log. `sae` is changed.

    Raises:
        ShapeError: activations of another width.
        ConfigError: settings that cannot be used, an unknown setting (with a suggestion), a checkpoint of another run,
            or a store of another model or place.
        NumericsError: activations, gradients or a loss are not finite. The message names the step, the tensor and the
            last checkpoint, and `sae` holds the parameters from before that step.
        StorageError: a checkpoint cannot be written.
        Stopped: SIGTERM was received, and the run has been saved.
    """
    if not isinstance(settings, TrainSettings | None):
        raise ConfigError(f"settings is a {type(settings).__name__}; give TrainSettings(...), or its fields by name")
    check_names("train", changes, TrainSettings.__dataclass_fields__)
    if settings is None and "steps" not in changes:
        raise ConfigError("train needs steps, the number of optimiser steps: train(sae, activations, steps=400)")
    values: dict[str, Any] = dict(changes)
    settings = TrainSettings(**values) if settings is None else replace(settings, **values)
    check_sae("sae", sae)
    activations = side_by_side(sae, activations, targets)
    if settings.objective != "mse" and sae.row_width != sae.d_in:
        raise ConfigError("objective='mse+kl' is for SAEs; a transcoder trains with objective='mse'")
    with rounds_aside(sae, settings, activations, validation, mesh) as finish:
        log = _train(sae, activations, settings, label, progress, mesh, host, validation is None)
        finish()
    return log


def _train(
    sae: SparseAutoencoder,
    activations: Tensor | Activations,
    settings: TrainSettings,
    label: str | None,
    progress: bool,
    mesh: Mesh | None,
    host: HostModel | None,
    l0_is_final: bool,
) -> TrainLog:
    check_data("sae.W_dec", sae.W_dec)
    if torch.is_inference_mode_enabled() or any(one.is_inference() for one in sae.parameters()):
        raise ConfigError("sae was made, or is trained, in torch.inference_mode(), which has no gradients; leave it")
    recipe = recipe_for(sae, settings.recipe) if isinstance(settings.recipe, str) else settings.recipe
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"recipe is a {type(recipe).__name__}; give a name of RECIPES, or a Recipe")
    recipe = holding(recipe, sae, settings.target_l0)
    together: Alone = Alone() if mesh is None else mesh
    together.check(sae, recipe, settings)
    if together.features[1] > 1 and sae.row_width != sae.d_in:
        raise ConfigError("the features of a transcoder are not split over processes; give each process all of them")
    if isinstance(activations, Tensor):
        check_data("activations", activations)
        if activations.dim() != 2:
            raise ShapeError(f"activations have shape {tuple(activations.shape)}; give [n_tokens, d_in={sae.d_in}]")
    elif not callable(getattr(activations, "batches", None)) or not hasattr(activations, "d_in"):
        raise ShapeError(f"activations is a {type(activations).__name__}; give a torch.Tensor or an ActivationStore")
    width = activations.shape[-1] if isinstance(activations, Tensor) else row_width(activations)
    if width != sae.row_width:
        raise ShapeError(
            f"the activations have d_in={width}, the SAE has d_in={sae.row_width}; they must come from one hook"
        )
    check_place(sae, activations)
    if isinstance(activations, Tensor) and sae.units is not None:
        warn_of_units(sae, activations)
    if recipe.target_l0 is not None and recipe.target_l0 > sae.d_sae * together.features[1]:
        raise ConfigError(f"target_l0 is {recipe.target_l0:g}; there are {sae.d_sae * together.features[1]} features")
    # Before the run's folder is created. A store with this process's shards only has a length of its own.
    rows = len(activations) if isinstance(activations, Tensor) else getattr(activations, "n_tokens", None)
    if rows is not None and getattr(activations, "share", None) is None and rows < settings.batch_size:
        raise ShapeError(f"{rows} tokens are fewer than one batch of {settings.batch_size}; lower batch_size")
    if settings.decoder_norm == "free" and together.rank == 0:
        warnings.warn("decoder norms are free: they grow and evade an l1 penalty; compare at equal l0", stacklevel=2)

    language = _language(host, activations, settings, together)
    tokens = settings.batch_size // together.data[1] // settings.accumulate
    beside = 0.0 if language is None else float(sum(language_memory(language.host, *language.shape)))
    show = progress and together.rank == 0
    log = TrainLog(recipe.name, settings.steps, settings.batch_size, settings.seed)
    with ExitStack() as stack:
        dtype = stack.enter_context(_wide(sae))
        frozen = {*recipe.frozen, *KEPT_BY[settings.trainable]}
        reason = reason_against(sae, soft=recipe.soft, aux_k=recipe.aux_k, frozen=frozen)
        plan = plan_memory(
            sae,
            max(1, tokens),
            settings.memory,
            aux_k=recipe.aux_k,
            no_support=reason,
            exact=settings.exact,
            language=beside,
            on_gpu=by_triton(sae, frozen, recipe.aux_k),
        )
        plan = together.agree(plan)
        if show:
            print(plan)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(deterministic(settings.deterministic))
        stack.enter_context(_frozen(sae, recipe, settings.trainable))
        take_note(sae, activations)
        stack.enter_context(reading(sae, activations, trains=True))
        stack.enter_context(_training(sae))
        stack.enter_context(only_the_sae(None if language is None else language.host))
        if settings.out is not None and together.rank == 0:
            if mesh is None:
                # Weights and what Adam keeps of each; of several processes one must not stop alone.
                need = sum((3 if one.requires_grad else 1) * one.nbytes for one in sae.parameters())
                check_room(settings.out, need, "a checkpoint")
                check_folder(settings.out / FOLDER)
            stack.enter_context(only_writer(settings.out))
        together.barrier()
        run = Run(sae, settings, recipe, plan, together, identity_of(activations), dtype, language)
        checkpoints = None if settings.out is None else Checkpoints(settings.out, settings.keep)
        if checkpoints is not None:
            _take_up(run, checkpoints, log)
        batches = _batches(activations, settings, run.step, together.data)
        stopping = stack.enter_context(stop_signal(settings.out is not None))
        metrics = Metrics(log, settings.out if together.rank == 0 else None, settings.track, asdict(settings))
        stack.callback(metrics.close)
        _loop(run, batches, metrics, checkpoints, stopping, label or f"training ({recipe.name})", show)
        if show and l0_is_final:
            _say_l0(log.l0, recipe.target_l0)
    return log


def _say_l0(l0: list[float], target: float | None) -> None:
    """Prints that a run ended far from the l0 that it was to hold, as short ones do."""
    last = l0[-10:]
    if target is None or not last or abs(sum(last) / len(last) / target - 1) <= 0.1:
        return
    print(
        f"  l0 is {sum(last) / len(last):.1f} at the end, and {target:.1f} was to be held. More steps bring it there;\n"
        "  validation text (validation=, --validation) sets it after training"
    )


def _loop(
    run: Run,
    batches: Iterator[Tensor],
    metrics: Metrics,
    checkpoints: Checkpoints | None,
    stopping: list[bool],
    label: str,
    show: bool,
) -> None:
    settings, log = run.settings, metrics.log
    started = saved_at = time.perf_counter()
    saved_step, path, shown = run.step, None, run.features()
    with progress_bar(label, settings.steps, run.step, settings.batch_size, show) as advance:
        while run.step < settings.steps:
            due = checkpoints is not None and time.perf_counter() - saved_at > 60 * settings.checkpoint_minutes
            batch = next(batches, None)
            if not isinstance(batch, Tensor):
                raise ShapeError(
                    f"activations.batches gave {'no more' if batch is None else f'a {type(batch).__name__}'} at step "
                    f"{run.step}; it must give tensors [batch_size, d_in] without end"
                )
            row, stop, due = run.advance(batch, bool(stopping), due, checkpoints)
            if row["step"] % settings.log_every == 0 or run.step == settings.steps:
                shown = run.features()
                metrics.row(row | shown | {"seconds": round(log.seconds + time.perf_counter() - started, 3)})
            advance(row | shown)
            if checkpoints is None:
                continue
            if settings.checkpoint_every is not None and run.step % settings.checkpoint_every == 0:
                due = True
            if due or stop:
                path = run.save(checkpoints, log.seconds + time.perf_counter() - started)
                saved_at, saved_step = time.perf_counter(), run.step
            if stop and run.step < settings.steps:
                raise Stopped(
                    f"stopped by SIGTERM after step {run.step} of {settings.steps}; saved as {path}. To go on, run the "
                    "same command with --resume (in Python: train(..., resume=True))"
                )
        log.seconds += time.perf_counter() - started
        if checkpoints is not None and run.step > saved_step:
            run.save(checkpoints, log.seconds)


def _language(
    host: HostModel | None, activations: Tensor | Activations, settings: TrainSettings, together: Alone
) -> LanguageLoss | None:
    """Returns the KL term, if the objective has one."""
    if settings.objective == "mse":
        return None
    if host is None:
        raise ConfigError("objective='mse+kl' needs the language model: train(..., host=load_host(...))")
    if together.data[1] * together.features[1] > 1:
        raise ConfigError("objective='mse+kl' trains on one process; leave the mesh out")
    return LanguageLoss(host, activations, settings)


def _take_up(run: Run, checkpoints: Checkpoints, log: TrainLog) -> None:
    """Resumes from the latest readable checkpoint, if asked to and if there is one."""
    settings, out = run.settings, run.settings.out
    assert out is not None
    there = run.together.same(checkpoints.steps())
    if there and not settings.resume:
        raise ConfigError(
            f"{out} holds a run that reached step {there[-1]}; resume it (--resume), or take another folder"
        )
    if there:
        log.seconds = restore(run, checkpoints, there)
    if run.together.rank == 0:
        take_up(out, run.step, log)
        with suppress(OSError):
            checkpoints.clean()
    run.together.barrier()


def tensor_batches(
    x: Tensor, batch_size: int, *, seed: int, start: int = 0, part: tuple[int, int] = (0, 1)
) -> Iterator[Tensor]:
    """Yields shuffled batches [batch_size, d_in] of x [n_tokens, d_in], epoch after epoch; the order depends on seed
    only.

    start: number of batches to skip. part: (rank, size), the share of the rows of every batch to return.
    """
    generator = torch.Generator().manual_seed(seed)
    per_epoch = len(x) // batch_size
    rows = slice(part[0] * (batch_size // part[1]), (part[0] + 1) * (batch_size // part[1]))
    while True:
        order = torch.randperm(len(x), generator=generator)
        for number in range(min(start, per_epoch), per_epoch):
            yield x[order[number * batch_size : (number + 1) * batch_size][rows].to(x.device)]
        start = max(0, start - per_epoch)


def _batches(
    activations: Tensor | Activations, settings: TrainSettings, start: int, part: tuple[int, int]
) -> Iterator[Tensor]:
    size, seed = settings.batch_size, settings.seed
    if isinstance(activations, Tensor):
        return tensor_batches(activations, size, seed=seed, start=start, part=part)
    more: dict[str, Any] = ({"start": start} if start else {}) | ({"part": part} if part[1] > 1 else {})
    return activations.batches(size, seed=seed, **more)


@contextmanager
def _wide(sae: SparseAutoencoder) -> Iterator[torch.dtype]:
    """Trains with weights of at least float32, since bfloat16 has too few bits for a step of 1e-4; restores the
    dtype."""
    before = sae.W_dec.dtype
    if before.itemsize >= 4:
        yield before
        return
    sae.float()
    try:
        yield before
    finally:
        sae.to(before)


@contextmanager
def _training(sae: SparseAutoencoder) -> Iterator[None]:
    """Sets training mode, in which BatchTopK encodes differently, and restores the previous mode afterwards."""
    before = sae.training
    sae.train()
    try:
        yield
    finally:
        sae.train(before)


@contextmanager
def _frozen(sae: SparseAutoencoder, recipe: Recipe, trainable: str) -> Iterator[None]:
    """Excludes from training what the recipe freezes and what `trainable` keeps; restores it afterwards."""
    kept = {*recipe.frozen, *KEPT_BY[trainable]}
    held = [p for name, p in sae.named_parameters() if name.removeprefix("gate.") in kept and p.requires_grad]
    if not any(p.requires_grad for p in set(sae.parameters()) - set(held)):
        if trainable == "all":
            raise ConfigError("every parameter of sae is frozen; call sae.requires_grad_() before training")
        raise ConfigError(
            f"trainable={trainable!r} leaves nothing of this {sae.architecture} SAE to train; choose encoder or all"
        )
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)
