"""`rsae known`: how well teachers, controls and upgrades detect the features of data with known features."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from rich.console import Console
from torch import Tensor

from rsae_triton.common.checks import check_integer, check_number, check_seed
from rsae_triton.common.errors import ConfigError
from rsae_triton.common.files import check_folder, make_folder, read_finished, write_text
from rsae_triton.common.terminal import plain
from rsae_triton.evaluation.ground_truth import (
    KnownFeatures,
    detect,
    planted_features,
    saelens_model,
    synthsaebench_model,
)
from rsae_triton.evaluation.reconstruction import at_l0
from rsae_triton.experiments.contenders import contender, more_rounds, parse_contender, steps_for
from rsae_triton.experiments.teach import FAMILIES, TeacherPlan, objective_of, train_teacher
from rsae_triton.ops.runtime import matmul_precision
from rsae_triton.report.known import known_tables, summarise_known
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.training.loop import TrainLog, train
from rsae_triton.training.settings import KEPT_BY, trains
from rsae_triton.upgrading.stage_one import upgrade

Trainable = Literal["all", "encoder", "gate"]
HELD_OUT = 20_000
"""Number of tokens in the validation set, and in the test set."""
SYNTHSAEBENCH = 0.1
"""The correlation of SynthSAEBench's features."""
VERSION = 2
"""Raised when the same settings give other numbers, so that cells of before are not taken for new ones."""


@dataclass(frozen=True)
class Known:
    """Train teachers on data with known features, upgrade them, and score how well they detect the features: MCC, F1,
    precision, recall, and the error.

    Every finished cell is a file in OUT/cells, as with `rsae sweep`. OUT/known.json and OUT/known.md hold all of them,
    with intervals over seeds.

    Examples:
        rsae known --out out/known
        rsae known --data planted --teachers jumprelu --l0s 5 --contenders teacher@2 rsae --out out/known
    """

    teachers: tuple[str, ...] = ("jumprelu", "topk", "relu")
    """Families: relu, jumprelu, topk, batchtopk."""
    data: Literal["saelens", "synthsaebench", "planted"] = "planted"
    """planted: our own, which needs nothing; saelens: a model of sae_lens.synthetic (SAELens must be installed);
    synthsaebench: SynthSAEBench's settings (trees of features, correlations) at --d-in and --n-features."""
    l0s: tuple[float, ...] = (5.0, 10.0)
    """Active features per token, of every code; and of the data, but for synthsaebench's, which has its own."""
    correlations: tuple[float, ...] = (0.0,)
    """Correlation between features; 0 for independent ones (synthsaebench has its own)."""
    d_in: int = 64
    """Width of the activations."""
    n_features: int = 512
    """Features of the data."""
    d_sae: int = 256
    """Features of the SAEs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each has its own data, teacher and order of batches."""
    contenders: tuple[str, ...] = (
        "teacher@2",
        "teacher@3",
        "teacher@4",
        "teacher@6",
        "rsae",
        "rsae@2",
        "control",
        "refined",
    )
    """What is made of each teacher, as for `rsae sweep`; NAME/gate and NAME/encoder train these parameters only."""
    tokens: int = 200_000
    """Training tokens."""
    teacher_steps: int = 3000
    """Steps of a teacher."""
    steps: int = 1200
    """Steps of every contender."""
    batch_size: int = 512
    """Tokens per step."""
    out: Path = Path("out/known")
    """Folder of the cells and the tables."""

    def check(self) -> None:
        for name in ("teachers", "l0s", "correlations", "seeds", "contenders"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is empty; give at least one")
        for name in ("d_in", "n_features", "d_sae", "tokens", "teacher_steps", "steps", "batch_size"):
            check_integer(f"--{name.replace('_', '-')}", getattr(self, name), 1)
        for l0 in self.l0s:
            check_number("--l0s", l0, above=0, most=min(self.n_features, self.d_sae) / 2)
        for correlation in self.correlations:
            check_number("--correlations", correlation, least=0)
        for seed in self.seeds:
            check_seed(seed)
        if strange := [name for name in self.teachers if name not in FAMILIES]:
            raise ConfigError(f"--teachers {', '.join(strange)}: choose from {', '.join(FAMILIES)}")
        if self.data not in ("saelens", "synthsaebench", "planted"):
            raise ConfigError(f"--data is {self.data!r}; choose saelens, synthsaebench or planted")
        if self.data == "synthsaebench":
            check_integer("--n-features", self.n_features, 128)
            if self.correlations != Known.correlations:
                raise ConfigError(f"--correlations: synthsaebench has its own ({SYNTHSAEBENCH:g}); leave them out")
        for name in self.contenders:
            split_name(name)
        check_folder(self.out)

    @property
    def command(self) -> str:
        """The command that makes the same tables again, wherever they went."""
        said = ["rsae known"]
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name != "out" and value != one.default:
                values = value if isinstance(value, tuple) else (value,)
                said += [
                    f"--{one.name.replace('_', '-')}",
                    *(f"{v:g}" if isinstance(v, float) else str(v) for v in values),
                ]
        return " ".join(said)

    def cells(self) -> Iterator[KnownCell]:
        correlations = (SYNTHSAEBENCH,) if self.data == "synthsaebench" else self.correlations
        for seed, l0, correlation, teacher in itertools.product(self.seeds, self.l0s, correlations, self.teachers):
            yield KnownCell(self, teacher, l0, correlation, seed)


@dataclass(frozen=True)
class KnownCell:
    """One teacher, with all that decides its numbers."""

    config: Known
    teacher: str
    l0: float
    correlation: float
    seed: int

    def identity(self) -> dict[str, Any]:
        sizes = ("data", "d_in", "n_features", "d_sae", "tokens", "teacher_steps", "steps", "batch_size")
        own = {name: getattr(self, name) for name in ("teacher", "l0", "correlation", "seed")}
        return {
            **own,
            **{name: getattr(self.config, name) for name in sizes},
            "contenders": list(self.config.contenders),
            "version": VERSION,
        }

    @property
    def path(self) -> Path:
        key = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:8]
        return (
            self.config.out / "cells" / f"{self.config.data}-{self.teacher}-l0-{self.l0:g}-seed{self.seed}-{key}.json"
        )


class Draws(NamedTuple):
    """Training, validation and test tokens of one model, scaled to a mean norm of sqrt(d_in)."""

    train: Tensor
    validation: Tensor
    test: KnownFeatures


def split_name(name: str) -> tuple[str, int, Trainable]:
    """Splits NAME, NAME@N, NAME/gate, NAME/encoder or NAME/gate@N into (NAME, rounds added, trainable).

    Raises:
        ConfigError: no such contender.
    """
    base, mark, rounds = name.partition("@")
    base, slash, trainable = base.partition("/")
    _, added, weighed = parse_contender(base + mark + rounds)
    if weighed:
        raise ConfigError(f"contender is {name!r}; there is no language model to weigh dimensions by; leave w out")
    if base in ("scratch", "pursuit") or (slash and trainable not in KEPT_BY) or (slash and base == "teacher"):
        raise ConfigError(f"contender is {name!r}; give NAME, NAME@ROUNDS, NAME/encoder or NAME/gate")
    return base, added, cast(Trainable, trainable or "all")


@matmul_precision("highest")
def known(config: Known) -> Path:
    """Runs `rsae known` and returns the path of known.md.

    Raises:
        RsaeError: something that the user can fix; finished cells stay.
    """
    config.check()
    console = Console()
    cells = list(config.cells())
    waiting = [cell for cell in cells if read_finished(cell.path, "scores", "seconds") is None]
    console.print(f"{len(cells)} cells, {len(cells) - len(waiting)} of them done before")
    for done, cell in enumerate(waiting):
        result = run_known(cell)
        make_folder(cell.path.parent)
        write_text(cell.path, json.dumps(result, indent=1) + "\n")
        scores = ", ".join(f"{name} {one['f1']:.3f}" for name, one in result["scores"].items())
        console.print(
            f"{plain(cell.path.stem)}: F1 {scores}  [dim]({done + 1}/{len(waiting)}, {result['seconds']:.0f} s)[/]"
        )
    results = [found for cell in cells if (found := read_finished(cell.path, "scores")) is not None]
    rows = summarise_known(results)
    write_text(
        config.out / "known.json",
        json.dumps({"command": config.command, "rows": rows, "cells": results}, indent=1) + "\n",
    )
    write_text(config.out / "known.md", known_tables(rows))
    return config.out / "known.md"


def draws(cell: KnownCell) -> Draws:
    """Draws the data of a cell; that of the last cell is kept, because teachers of several families share it."""
    config = cell.config
    return _draws(config.data, config.d_in, config.n_features, config.tokens, cell.l0, cell.correlation, cell.seed)


@functools.lru_cache(maxsize=1)
def _draws(data: str, d_in: int, n_features: int, tokens: int, l0: float, correlation: float, seed: int) -> Draws:
    sizes: dict[str, Any] = {"d_in": d_in, "n_features": n_features, "l0": l0, "correlation": correlation}
    draw: Callable[[int, int], KnownFeatures]
    if data == "synthsaebench":
        draw = synthsaebench_model(d_in=d_in, n_features=n_features, seed=seed)
    elif data == "saelens":
        draw = saelens_model(**sizes, seed=seed)
    else:

        def draw(n_tokens: int, tokens_seed: int) -> KnownFeatures:
            return planted_features(n_tokens, **sizes, seed=tokens_seed, model_seed=seed)

    found, held, test = draw(tokens, 1).x, draw(HELD_OUT, 2).x, draw(HELD_OUT, 3)
    scale = math.sqrt(d_in) / float(found.norm(dim=1).mean())
    return Draws(found * scale, held * scale, test._replace(x=test.x * scale))


def run_known(cell: KnownCell) -> dict[str, Any]:
    """Trains the teacher and its contenders, and scores them all at the teacher's l0. Returns a dict for JSON."""
    config, started = cell.config, time.perf_counter()
    data = draws(cell)
    plan = TeacherPlan(
        cell.teacher,
        config.d_sae,
        max(1, round(cell.l0)),
        steps=config.teacher_steps,
        batch_size=config.batch_size,
        seed=cell.seed,
        l0=None if cell.teacher in ("topk", "batchtopk") else cell.l0,
    )
    teacher, log = train_teacher(plan, data.train, data.train.mean(0), progress=False)
    saes, logs = _contenders(cell, teacher, data)
    logs = {"teacher": log, **logs}
    wanted = ("teacher", *config.contenders)
    l0 = detect(teacher, data.test).l0
    scores = {name: asdict(detect(at_l0(saes[name], data.test.x, l0), data.test)) for name in wanted}
    return {
        "cell": cell.identity(),
        "scores": scores,
        "training": {name: {"steps": log.steps, "seconds": round(log.seconds, 1)} for name, log in logs.items()},
        "seconds": round(time.perf_counter() - started, 1),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _contenders(
    cell: KnownCell, teacher: SparseAutoencoder, data: Draws
) -> tuple[dict[str, SparseAutoencoder], dict[str, TrainLog]]:
    init = upgrade(teacher, data.train, rounds=1)
    saes: dict[str, SparseAutoencoder] = {"teacher": teacher}
    logs: dict[str, TrainLog] = {}
    for name in cell.config.contenders:
        base, rounds, trainable = split_name(name)
        key = base if trainable == "all" else f"{base}/{trainable}"
        if key not in saes:
            entry = contender(base, teacher, init, data.validation)
            saes[key] = entry.sae
            if entry.recipe is not None and trains(entry.sae, trainable):
                recipe = objective_of(teacher) if base.startswith("control") else entry.recipe
                logs[key] = train(
                    entry.sae,
                    data.train,
                    steps=steps_for(entry, cell.config.steps, logs),
                    recipe=recipe,
                    target_l0=init.metadata["stage1"]["train_l0"],
                    trainable=trainable,
                    rounds="through",
                    seed=cell.seed + 1,
                    batch_size=cell.config.batch_size,
                    progress=False,
                )
        if rounds:
            saes[name] = more_rounds(saes[key], rounds, data.validation)
    return saes, logs
