"""`rsae sweep`: teachers x sparsities x layers x widths x seeds, each upgraded and compared with controls;
resumable."""

from __future__ import annotations

import copy
import gc
import hashlib
import itertools
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from rsae_triton.activations import HostModel, Splits, check_corpus, load_corpus, load_host
from rsae_triton.common.checks import check_integer, check_number, check_seed
from rsae_triton.common.errors import ConfigError
from rsae_triton.common.files import check_folder, make_folder, read_finished, write_text
from rsae_triton.common.names import EMBEDDED
from rsae_triton.common.terminal import plain
from rsae_triton.evaluation import compare
from rsae_triton.evaluation.downstream import splice_of
from rsae_triton.evaluation.listening import dimension_weights
from rsae_triton.evaluation.pursuit import pursuit_bound
from rsae_triton.experiments.contenders import contender, more_rounds, parse_contender, steps_for
from rsae_triton.experiments.teach import FAMILIES, L0, TeacherPlan, make_teacher, saved_teacher, splits_for
from rsae_triton.ops.runtime import matmul_precision
from rsae_triton.report.fronts import write_sweep_report
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.pretrained import CONFIG_FILE
from rsae_triton.sae.rational import FusedRationalSAE
from rsae_triton.sae.units import take_note
from rsae_triton.training.loop import LR, TrainLog, train
from rsae_triton.training.recipes import RECIPES
from rsae_triton.training.settings import KEPT_BY, trains
from rsae_triton.upgrading.stage_one import upgrade

SCHEMA = 1
# Options that came later: a cell that leaves them as they are keeps its identity.
USUAL = {"center_writing_weights": False, "trainable": "all", "objective": "mse"}
CHOICES = {"split": ("test", "validation"), "objective": ("mse", "mse+kl"), "trainable": tuple(KEPT_BY)}


@dataclass(frozen=True)
class Sweep:
    """Upgrade many teachers beside their controls, and draw the fronts of error against sparsity.

    Every finished cell is a file in OUT/cells: the same command goes on where it was stopped, and a wider one
    computes only what is new. OUT/sweep.json, OUT/sweep.md and the plots are made from all cells at the end.

    Examples:
        rsae sweep --teachers relu topk --seeds 0 1 2 --out out/sweep
        rsae sweep --teachers path/to/sae --hooks blocks.8.hook_resid_pre --model gpt2
    """

    teachers: tuple[str, ...] = ("relu", "jumprelu", "topk")
    """Families to train here (relu, jumprelu, topk, batchtopk), or saved SAEs: folders, files or hub ids."""
    sparsities: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Factors on a family's usual density: k is multiplied by them, a sparsity weight divided."""
    hooks: tuple[str, ...] = ("",)
    """Where to read, in TransformerLens' names; when empty, where a saved teacher says it reads, else the middle of the
    model."""
    widths: tuple[int, ...] = (2304,)
    """Features of the teachers trained here."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; each has its own teacher and its own order of batches."""
    contenders: tuple[str, ...] = ("rsae", "control", "rectangle")
    """What is made of each teacher: rsae, control, rectangle, refined (trained through two rounds), rectangle-refined,
    control-compute (the control, as many seconds as refined took), thresholds, scratch; NAME@N for N untrained rounds
    on one of these or on the teacher, as in teacher@2, NAME@Nw if these weigh dimensions by what the model listens to;
    pursuit for the bound."""
    model: str = "smollm2"
    """Host model: smollm2, a .gguf file, a model folder, or a hub id."""
    center_writing_weights: bool = False
    """Centre GPT-2's residual stream, for teachers trained on TransformerLens' default."""
    text: tuple[str, ...] = ("demo",)
    """Text to read activations from: demo, files, folders, or a hub dataset."""
    tokens: int = 200_000
    """Training tokens to extract at each hook."""
    teacher_steps: int = 1000
    """Steps of a teacher trained here."""
    steps: int = 400
    """Steps of every contender."""
    trainable: Literal["all", "encoder", "gate"] = "all"
    """What contenders train: all, encoder (the decoder stays to the bit) or gate (every weight stays). A control
    without such parameters is the teacher itself."""
    objective: Literal["mse", "mse+kl"] = "mse"
    """What contenders minimise beside their sparsity: mse, or mse and KL with the language model in the loop."""
    batch_size: int = 512
    """Tokens per step."""
    sequences: int = 48
    """Held-out sequences to splice into for delta_ce; 0 for reconstruction only."""
    spliced: tuple[str, ...] = ()
    """Which contenders are spliced in, besides the teacher, at equal l0 only; all, as shipped too, when not given."""
    split: Literal["test", "validation"] = "test"
    """Which held-out split is scored: test, or validation while choosing."""
    device: str | None = None
    """cpu or cuda; CUDA where there is one when not given."""
    save: bool = False
    """Save every contender too, as OUT/saes/CELL/CONTENDER, for `rsae probe` and other commands."""
    out: Path = Path("out/sweep")
    """Folder of the cells and the report."""

    def check(self) -> None:
        """Checks the options before anything is downloaded or computed (ConfigError)."""
        for name in ("teachers", "sparsities", "hooks", "widths", "seeds", "contenders"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is empty; give at least one")
        for name in ("tokens", "teacher_steps", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; give a positive number")
        for width in self.widths:
            check_integer("--widths", width, 1)
        for seed in self.seeds:
            check_seed(seed)
        check_folder(self.out)
        for factor in self.sparsities:
            check_number("--sparsities", factor, above=0)
        check_corpus(self.text)
        for name in self.contenders:
            parse_contender(name)
        if strange := set(self.spliced) - {"init", *self.contenders}:
            raise ConfigError(f"--spliced {', '.join(sorted(strange))}: give names of contenders")
        if self.sequences == 1 or self.sequences < 0:
            raise ConfigError(f"--sequences is {self.sequences}; an interval takes at least 2 (0 for none)")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"--{name} is {getattr(self, name)!r}; choose {', '.join(choices)}")
        for teacher in self.teachers:
            if teacher not in FAMILIES:
                saved_teacher("--teachers", teacher)

    def cells(self) -> Iterator[Cell]:
        """Yields every teacher of the sweep. A saved one is read at the hook in its metadata, unless a hook is
        given."""
        saved = [teacher for teacher in self.teachers if teacher not in FAMILIES] if "" in self.hooks else []
        own = {teacher: saved_teacher("--teachers", teacher).metadata.get("hook_name") for teacher in saved}
        for hook in self.hooks:
            for width, teacher, sparsity, seed in itertools.product(
                self.widths, self.teachers, self.sparsities, self.seeds
            ):
                if teacher in FAMILIES or (width == self.widths[0] and sparsity == self.sparsities[0]):
                    yield Cell(self, hook or own.get(teacher) or "", width, teacher, sparsity, seed)


@dataclass(frozen=True)
class Cell:
    """One teacher of a sweep."""

    sweep: Sweep
    hook: str
    width: int
    teacher: str
    sparsity: float
    seed: int

    def plan(self) -> TeacherPlan | None:
        """How to train the teacher; None for a saved one."""
        if self.teacher not in FAMILIES:
            return None
        usual = RECIPES[self.teacher].weight
        # The usual weights are for the embedded model; elsewhere l0 itself is held.
        held = min(L0 * self.sparsity, self.width / 4) if usual and self.sweep.model != EMBEDDED else None
        return TeacherPlan(
            family=self.teacher,
            d_sae=self.width,
            k=max(1, round(TeacherPlan.k * self.sparsity)),
            weight=usual / self.sparsity if usual and held is None else None,
            l0=held,
            steps=self.sweep.teacher_steps,
            batch_size=self.sweep.batch_size,
            seed=self.seed,
        )

    def identity(self) -> dict[str, Any]:
        """Everything that decides the cell's numbers, as far as this program controls it."""
        plan, sweep = self.plan(), self.sweep
        usual = sweep.model == EMBEDDED or all(parse_contender(one)[0] == "teacher" for one in sweep.contenders)
        start = ("the teacher's weight" if self.sparsity != 1 or not plan else "") if usual else "worth of features"
        return {
            "schema": SCHEMA,
            "teacher": self.teacher,
            "sparsity": self.sparsity if plan else None,
            "plan": plan.identity() if plan else None,
            "hook": self.hook,
            "seed": self.seed,
            **{name: getattr(sweep, name) for name in ("model", "tokens", "steps", "batch_size", "sequences", "split")},
            **{name: value for name, usual in USUAL.items() if (value := getattr(sweep, name)) != usual},
            **({"spliced": list(sweep.spliced)} if sweep.spliced else {}),
            # Older cells had one starting weight for all teachers, and a ramp as wide for small codes as for others.
            **({"start": start} if start else {}),
            **({"width": "auto"} if self.sparsity > 1 or not plan else {}),
            "text": list(sweep.text),
            "contenders": list(sweep.contenders),
            # A changed recipe gives other numbers, so its cells must have another identity.
            "recipes": {name: asdict(RECIPES[name]) for name in ("hard", self.teacher) if name in RECIPES},
            "lr": LR,
        }

    @property
    def place(self) -> tuple[Any, ...]:
        """Everything that its activations depend on."""
        config = self.sweep
        return config.model, config.center_writing_weights, self.hook, config.text, config.tokens

    @property
    def path(self) -> Path:
        key = key_of(self.identity())[:8]
        level = f"x{self.sparsity:g}-d{self.width}-" if self.plan() else ""
        hook = f"{self.hook}-" if self.hook else ""
        return self.sweep.out / "cells" / f"{hook}{Path(self.teacher).name}-{level}seed{self.seed}-{key}.json"

    @property
    def label(self) -> str:
        return self.path.stem.rsplit("-", 1)[0]

    @property
    def folder(self) -> Path:
        """Where its SAEs are saved."""
        return self.sweep.out / "saes" / self.path.stem

    def saved(self) -> bool:
        """Whether its SAEs are on disk, if they are asked for. A bound has none, nor has a saved teacher's scratch."""
        names = {"teacher", *self.sweep.contenders} - {"pursuit", "" if self.plan() else "scratch"}
        return not self.sweep.save or all((self.folder / name / CONFIG_FILE).is_file() for name in names)

    def finished(self) -> bool:
        """Whether its scores are on disk, and its SAEs if they are asked for."""
        return self.saved() and read_cell(self.path) is not None


def key_of(identity: dict[str, Any]) -> str:
    """A key that is the same for a cell's identity and for that identity read back from JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def read_cell(path: Path) -> dict[str, Any] | None:
    """Reads a finished cell; None if it is missing or incomplete."""
    return read_finished(path, "cell", "scores", "stage1")


def write_cell(path: Path, result: dict[str, Any]) -> None:
    """Writes a finished cell."""
    make_folder(path.parent)
    write_text(path, json.dumps(result, indent=1) + "\n")


def sweep(config: Sweep) -> Path:
    """Runs `rsae sweep` and returns the path of sweep.md.

    Raises:
        RsaeError: something that the user can fix; finished cells stay.
    """
    config.check()
    return write_sweep_report(config.out, run_cells(list(config.cells())))


@matmul_precision("medium")
def run_cells(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Computes the cells that are not on disk yet, and returns all of them. Cells of the same place should be
    adjacent."""
    console = Console()
    waiting = [cell for cell in cells if not cell.finished()]
    console.print(f"{len(cells)} cells, {len(cells) - len(waiting)} of them done before")
    host: HostModel | None = None
    splits: Splits | None = None
    started = time.perf_counter()
    for done, cell in enumerate(waiting):
        if cell.finished():  # another process may be working on the same folder
            continue
        config = cell.sweep
        if host is None or splits is None or cell.place != waiting[done - 1].place:
            host = load_host(
                config.model,
                device=config.device,
                hook_name=cell.hook or None,
                center_writing_weights=config.center_writing_weights,
            )
            splits = splits_for(host, load_corpus(list(config.text)), config.tokens)
        result = run_cell(cell, host, splits)
        write_cell(cell.path, result)
        left = (time.perf_counter() - started) / (done + 1) * (len(waiting) - done - 1)
        progress = f"[dim]({done + 1}/{len(waiting)}, {left / 60:.0f} min left)[/]"
        console.print(f"{plain(cell.label)}: {plain(one_line(result))}  {progress}")
    return [found for cell in cells if (found := read_cell(cell.path)) is not None]


def run_cell(cell: Cell, host: HostModel, splits: Splits) -> dict[str, Any]:
    """Trains the teacher, upgrades it, trains the contenders and scores them all. Returns a dict for JSON."""
    config = cell.sweep
    started = time.perf_counter()
    x = splits.train.tensor().to(host.device)
    plan = cell.plan()
    if plan is None:
        teacher = saved_teacher("--teachers", cell.teacher).to(host.device)
        teacher.to_units_(splits.train.scale)
    else:
        teacher, _ = make_teacher(plan, splits, x, label=f"{cell.label} teacher")
    init = upgrade(teacher, x, rounds=1, validation=splits.validation.tensor().to(host.device))
    saes, logs = make_contenders(cell, host, teacher, init, splits, x)
    for name in saes.keys() - {"init"} if config.save else ():
        own = copy.deepcopy(saes[name])
        take_note(own, splits.train)
        own.save_pretrained(cell.folder / name)
    held = getattr(splits, config.split)
    options: dict[str, Any] = {}
    if config.sequences:
        sequences = held.sequences
        options = {
            "host": host,
            "tokens": sequences.tokens[: config.sequences],
            "counted": sequences.counted[: config.sequences],
            "splice": splice_of(splits.train),
            "mean": splits.train.mean,
        }
        if config.spliced:
            options |= {"spliced_names": ("teacher", *config.spliced), "shipped": False}
    test = held.tensor().to(host.device)
    scores = compare(saes, test, **options)
    bound = {"pursuit": pursuit_bound(saes, test)} if "pursuit" in config.contenders else {}
    gc.collect()
    return {
        "cell": cell.identity(),
        "hook_name": splits.train.manifest["hook_name"],
        "model_name": host.name,
        "d_in": splits.train.d_in,
        "d_sae": teacher.d_sae,
        "family": teacher.architecture,
        "stage1": init.metadata["stage1"],
        "training": {
            name: {"weight": one.weight[-1], "l0": one.l0[-1], "steps": one.steps, "seconds": round(one.seconds, 1)}
            for name, one in logs.items()
        },
        "scores": scores,
        **bound,
        "seconds": round(time.perf_counter() - started, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {host.device}",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def make_contenders(
    cell: Cell, host: HostModel, teacher: SparseAutoencoder, init: FusedRationalSAE, splits: Splits, x: torch.Tensor
) -> tuple[dict[str, SparseAutoencoder], dict[str, TrainLog]]:
    """Returns all contenders by name, and the logs of those that were trained. Thresholds of rounds are set on
    validation text, because a teacher's l0 is lower on text it was trained on."""
    config = cell.sweep
    plan, target_l0 = cell.plan(), init.metadata["stage1"]["train_l0"]
    unseen = splits.validation.tensor().to(x.device)
    saes: dict[str, SparseAutoencoder] = {"teacher": teacher, "init": init}
    logs: dict[str, TrainLog] = {}
    names = {name: parse_contender(name) for name in config.contenders}
    weights = dimension_weights(host, splits.validation) if any(one[2] for one in names.values()) else None
    for name, (base, rounds, weighed) in names.items():
        if base == "pursuit":
            continue
        if base not in saes and base == "scratch":
            if plan is None:
                continue
            longer = TeacherPlan(**{**asdict(plan), "steps": plan.steps + config.steps})
            saes[base], _ = make_teacher(longer, splits, x, label=f"{cell.label} scratch")
        if base not in saes:
            entry = contender(base, teacher, init, unseen)
            saes[base] = entry.sae
            if entry.recipe is not None and trains(entry.sae, config.trainable):
                logs[base] = train(
                    entry.sae,
                    x if config.objective == "mse" else splits.train,
                    host=None if config.objective == "mse" else host,
                    objective=config.objective,
                    steps=steps_for(entry, config.steps, logs),
                    recipe=entry.recipe,
                    # The same number; l0 on validation text is then set to the teacher's.
                    target_l0="auto" if isinstance(entry.sae, FusedRationalSAE) else target_l0,
                    trainable=config.trainable,
                    rounds="through",
                    validation=unseen,
                    batch_size=config.batch_size,
                    seed=cell.seed + 1,
                    label=f"{cell.label} {base}",
                )
        if rounds:
            saes[name] = more_rounds(saes[base], rounds, unseen, weights if weighed else None)
    # A contender that was only trained to add rounds to it is not compared.
    return {name: sae for name, sae in saes.items() if name in ("teacher", "init", *names)}, logs


def one_line(result: dict[str, Any]) -> str:
    """A line with the mse of each contender at equal l0."""
    matched = result["scores"]["matched_l0"]
    numbers = ", ".join(f"{name} {score['mse']:.2f}" for name, score in matched.items() if name != "init")
    return f"l0 {matched['teacher']['l0']:.1f}: {numbers}"
