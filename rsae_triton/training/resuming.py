"""Resuming a run: finds the checkpoint, and checks that it is of this run and complete."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsae_triton.common.checkpoint import read_info
from rsae_triton.common.errors import ConfigError, FormatError, RsaeError
from rsae_triton.training.checkpoints import Checkpoints
from rsae_triton.training.optimizer import restore_optimizer
from rsae_triton.training.recipes import SparsityController
from rsae_triton.training.run import Run
from rsae_triton.training.settings import TrainSettings

_BLOCK = 1 << 22


def restore(run: Run, checkpoints: Checkpoints, steps: list[int]) -> float:
    """Restores the latest of the checkpoints of `steps` that every process can read; the same one on all processes.

    Returns:
        The seconds of training so far.

    Raises:
        ConfigError: it is of a run with other settings, another SAE or other activations.
        FormatError: no checkpoint can be read.
    """
    for step in reversed(steps):
        path, info, tensors = checkpoints.path(step), {}, {}
        controller: SparsityController | None = None
        problem: RsaeError | None = None
        try:
            info = read_info(path)
            _check(run, path, info)
            controller = _controller(run, path, info["controller"])
        except (FormatError, ConfigError) as error:
            problem = error
        problem = run.together.worst(problem)
        if problem is None:
            try:
                tensors = run.together.load(path, run.sae, run.tensors())
                _check_tensors(run, path, tensors)
            except FormatError as error:
                problem = error
            problem = run.together.worst(problem)
        if problem is not None:
            if isinstance(problem, ConfigError):
                raise problem
            warnings.warn(f"{problem}; going back to the checkpoint before", stacklevel=2)
            continue
        run.step, run.controller = info["step"], controller
        run.route.restore(info.get("route"))
        run.screen.restore(info.get("screen"))
        run.sae.load_state_dict({name[4:]: one for name, one in tensors.items() if name.startswith("sae.")})
        restore_optimizer(run.sae, run.optimizer, tensors)
        run.idle.copy_(tensors["idle"])
        if run.language is not None:
            run.language.restore(info.get("language"))
        if run.norms is not None:
            run.norms.copy_(tensors["norms"])
        if "rng.cpu" in tensors:
            torch.set_rng_state(tensors["rng.cpu"].clone())
        if "rng.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["rng.cuda"].clone())
        return float(info["seconds"])
    raise FormatError(f"no checkpoint in {checkpoints.folder} can be read; delete the folder to start again")


def _check(run: Run, path: Path, info: dict[str, Any]) -> None:
    own, theirs = run.settings.fixed(run.recipe), info["settings"]
    for name, value in own.items():
        # A setting that is newer than the checkpoint had its default value then.
        if theirs.get(name, getattr(TrainSettings, name, None)) != value:
            raise ConfigError(
                f"{path} was trained with {name}={theirs.get(name)!r}, not {value!r}; go on with the same, or start in "
                "another folder"
            )
    mine = run.config()
    for name in mine.keys() - {"metadata", "device"}:
        if info["config"].get(name) != mine[name]:
            raise ConfigError(f"{path} is of an SAE with {name}={info['config'].get(name)!r}, not {mine[name]!r}")
    if info["activations"] != run.identity:
        raise ConfigError(f"{path} was trained on other activations; resume with those, or start in another folder")


def _controller(run: Run, path: Path, state: dict[str, float | None] | None) -> SparsityController | None:
    if state is None:
        return None
    controller = SparsityController(run.recipe)
    wanted = controller.state().keys()
    newer = {"_start", "_first"}  # checkpoints of earlier versions lack these
    if not wanted - newer <= state.keys() <= wanted or any(
        isinstance(one, bool | str | list | dict) for one in state.values()
    ):
        raise FormatError(f"{path} has lost the state of the sparsity weight")
    controller.restore(state)
    return controller


def _check_tensors(run: Run, path: Path, tensors: dict[str, Tensor]) -> None:
    """Checks that a checkpoint has all tensors of the run, in the right shapes and finite, before the run is
    changed."""
    expected = {name: one for name, one in run.tensors().items() if not name.startswith("optimizer.")}
    for name, one in expected.items():
        found = tensors.get(name)
        if found is None or found.shape != one.shape:
            raise FormatError(f"{path} holds {'no' if found is None else 'another shape of'} {name}")
    parameters = dict(run.sae.named_parameters())
    for name, one in tensors.items():
        if name.startswith("optimizer."):
            parameter = parameters.get(name.removeprefix("optimizer.").rpartition(".")[0])
            if parameter is None or (one.dim() and one.shape != parameter.shape):
                raise FormatError(f"{path} holds {name}, which is of another SAE")
        if one.is_floating_point() and not bool(one.isfinite().all()):
            raise FormatError(f"{path} holds NaN or infinity in {name}")
    random = tensors.get("rng.cpu")
    if random is not None and (random.dtype != torch.uint8 or random.shape != torch.get_rng_state().shape):
        raise FormatError(f"{path} holds another kind of state of the random numbers")


def identity_of(activations: Any) -> str:
    """Identifies activations: by the store's key, or by a hash of the sums of all rows and columns."""
    if not isinstance(activations, Tensor):
        manifest = getattr(activations, "manifest", {})
        return str(manifest.get("key", type(activations).__name__))
    digest = hashlib.sha256(f"{tuple(activations.shape)} {activations.dtype}".encode())
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[activations.element_size()]
    columns = torch.zeros(activations.shape[1], dtype=torch.int64, device=activations.device)
    for rows in activations.detach().split(max(1, _BLOCK // max(1, activations.shape[1]))):
        bits = rows.contiguous().view(whole)  # sums of integers do not depend on their order
        digest.update(bits.sum(1, dtype=torch.int64).cpu().numpy().tobytes())
        columns += bits.sum(0, dtype=torch.int64)
    digest.update(columns.cpu().numpy().tobytes())
    return f"sha256 {digest.hexdigest()[:32]}"
