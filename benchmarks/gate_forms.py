"""Which gate, trained how, beats the control at equal l0: the table of docs/experiments.md.

    python benchmarks/gate_forms.py --teacher relu

Every contender starts from the demo's teacher, takes the same steps on the same batches with l0 held at the same
target, and is scored on the validation split at the teacher's l0. "rectangle" is the second control: the same
recipe with JumpReLU's rectangle in place of the rational's slope, so that the table says what the rational adds.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from rsae_triton.activations import load_corpus, load_host
from rsae_triton.common.files import write_text
from rsae_triton.evaluation import at_l0, reconstruction
from rsae_triton.experiments.contenders import WEIGHTS, Contender, contender, jumprelu_like
from rsae_triton.experiments.demo_options import Demo
from rsae_triton.experiments.sweep import Cell, Sweep
from rsae_triton.experiments.teach import TeacherPlan, make_teacher, splits_for
from rsae_triton.ops.runtime import matmul_precision
from rsae_triton.remez import fit_gate
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.gate import RationalGate, smooth_step
from rsae_triton.sae.rational import FusedRationalSAE
from rsae_triton.training.loop import LR, train
from rsae_triton.training.recipes import RECIPES, recipe_for
from rsae_triton.upgrading.stage_one import upgrade

WIDTHS = (0.45, 0.65, 1.0, 1.6)


@dataclass(frozen=True)
class Options:
    """Sizes are the demo's, so that its cached teacher and activations are used."""

    teacher: str = "relu"
    sparsity: float = 1.0
    """Factor on the teacher's usual density, as in `rsae sweep`."""
    steps: int = 400
    seeds: int = 1
    contenders: tuple[str, ...] = ()
    """All that are named in the table when none is given. Rows that the file has already are not run again."""
    out: Path | None = None
    """benchmarks/results/gate-forms-TEACHER.json when not given, with the sparsity if it is another."""

    @property
    def path(self) -> Path:
        level = "" if self.sparsity == 1 else f"-x{self.sparsity:g}"
        return self.out or Path(f"benchmarks/results/gate-forms-{self.teacher}{level}.json")

    def kept(self) -> dict[str, Any]:
        """What must be the same for rows to stand in one file."""
        return {name: getattr(self, name) for name in ("teacher", "sparsity", "steps")}

    def plan(self) -> TeacherPlan:
        demo = Demo()
        sweep = Sweep(teacher_steps=demo.teacher_steps, batch_size=demo.batch_size)
        plan = Cell(sweep, "", demo.d_sae, self.teacher, self.sparsity, seed=0).plan()
        if plan is None:
            raise SystemExit(f"--teacher is {self.teacher!r}; name a family")
        return plan


def gated(rsae: FusedRationalSAE, **options: Any) -> FusedRationalSAE:
    """The upgraded SAE with another gate: its weights and thresholds, `options` for `RationalGate`."""
    gate = RationalGate(
        rsae.d_sae, form="gated", backward="rational", threshold=rsae.gate.threshold.detach(), **options
    )  # fmt: skip
    return copied(FusedRationalSAE(rsae.d_in, rsae.d_sae, gate=gate), rsae)


def copied(sae: Any, source: SparseAutoencoder) -> Any:
    with torch.no_grad():
        for name in WEIGHTS:
            getattr(sae, name).copy_(getattr(source, name))
    return sae


def from_fit(target: str, degree: tuple[int, int], width: float, **options: Any) -> dict[str, Any]:
    """A certified fit as arguments of `RationalGate`."""
    fit = fit_gate(target, degree, **options)
    return {
        "degree": fit.degree,
        "a": fit.a,
        "b": fit.b,
        "centre": fit.centre,
        "numerator_scale": fit.numerator_scale,
        "denominator_scale": fit.denominator_scale,
        "input_scale": width,
    }


def contenders(teacher: SparseAutoencoder, x: torch.Tensor) -> dict[str, Callable[[], Contender]]:
    """By name, in the order of the table; each makes a fresh SAE and its recipe. Widths: as in `upgrade`."""
    init = upgrade(teacher, x, rounds=1)
    width = float(upgrade(teacher, x, width=1, rounds=1).gate.input_scale[0].detach())
    hard, trained = recipe_for(init), recipe_for(init, "hard-trained")
    step = dict(zip(("a", "b"), smooth_step(), strict=True))

    def ramp(degree: tuple[int, int] = (3, 2), times: float = 1.0, **options: Any) -> FusedRationalSAE:
        return gated(init, **from_fit("ramp", degree, times * width), **options)

    def rectangle(times: float) -> SparseAutoencoder:
        sae = jumprelu_like(init, slope_to_h=True)
        sae.bandwidth = times * width
        return sae

    return {
        "control": lambda: contender("control", teacher, init, x),
        "thresholds": lambda: contender("thresholds", teacher, init, x),
        "ramp (the default)": lambda: Contender(copy.deepcopy(init), hard),
        "ramp, half as wide": lambda: Contender(ramp(times=0.5), hard),
        "ramp, twice as wide": lambda: Contender(ramp(times=2.0), hard),
        "ramp (5,4)": lambda: Contender(ramp((5, 4)), hard),
        "ramp (3,2), trained": lambda: Contender(ramp(), trained),
        "ramp (5,4), trained": lambda: Contender(ramp((5, 4)), trained),
        "ramp (5,4), trained, per feature": lambda: Contender(ramp((5, 4), groups=init.d_sae), trained),
        "rectangle": lambda: contender("rectangle", teacher, init, x),
        "rectangle, twice as wide": lambda: Contender(rectangle(2.0), hard),
        **{f"ramp, width {times}": lambda times=times: Contender(ramp(times=times), hard) for times in WIDTHS},
        "ramp, weight from .0017": lambda: Contender(copy.deepcopy(init), RECIPES["hard"]),
        "smooth step": lambda: Contender(
            gated(init, degree=(2, 2), amplitude="identity", input_scale=width, **step), hard
        ),
        "smooth step in the forward pass": lambda: Contender(
            gated(init, degree=(2, 2), input_scale=width, **step), trained
        ),
        "minimax step (8,8), forward": lambda: Contender(
            gated(init, **from_fit("step", (8, 8), 10 * width, margin=0.1)), trained
        ),
        "weight .0008, thresholds 5 x": lambda: Contender(
            ramp(), replace(hard, weight=0.0008, lr_scale={"threshold": 5.0})
        ),
        "weight .0017, thresholds 5 x": lambda: Contender(ramp(), replace(hard, lr_scale={"threshold": 5.0})),
        "weight .0030, thresholds 15 x": lambda: Contender(ramp(), replace(hard, weight=0.003)),
        "control, lr 3e-4": lambda: contender("control", teacher, init, x),
        "ramp, lr 3e-4": lambda: Contender(ramp(), replace(hard, lr_scale={"threshold": 30.0})),
        "control, lr 1e-3": lambda: contender("control", teacher, init, x),
        "ramp, lr 1e-3": lambda: Contender(ramp(), replace(hard, lr_scale={"threshold": 9.0})),
    }


def lr_of(name: str) -> float:
    """The value in the contender's name if it ends in one, else the default."""
    return float(name.rpartition(", lr ")[2]) if ", lr " in name else LR


@matmul_precision("medium")
def main(options: Options) -> None:
    host = load_host()
    splits = splits_for(host, load_corpus("demo"), Demo().tokens)
    x, validation = splits.train.tensor(), splits.validation.tensor()
    plan = options.plan()
    teacher, _ = make_teacher(plan, splits, x)
    own = asdict(reconstruction(teacher, validation))
    target = upgrade(teacher, x, rounds=1).metadata["stage1"]["train_l0"]
    before = json.loads(options.path.read_text()) if options.path.is_file() else {"rows": []}
    if before["rows"] and before["options"] != options.kept():
        raise SystemExit(f"{options.path} was made with {before['options']}; move it away, or give another --out")
    rows = before["rows"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    done = {(row["contender"], row["seed"]) for row in rows}
    for seed in range(1, options.seeds + 1):
        made = contenders(teacher, x)
        longer = replace(plan, steps=plan.steps + options.steps)
        made["scratch"] = lambda longer=longer: Contender(make_teacher(longer, splits, x)[0], None)
        for name in options.contenders or made:
            if (name, seed) in done:
                continue
            entry = made[name]()
            started = time.perf_counter()
            weight = None
            if entry.recipe is not None:
                log = train(
                    entry.sae,
                    x,
                    steps=options.steps,
                    recipe=entry.recipe,
                    target_l0=target,
                    lr=lr_of(name),
                    seed=seed,
                    label=name,
                )
                weight = log.weight[-1]
            seconds = time.perf_counter() - started
            shipped, matched = reconstruction(entry.sae, validation), at_l0(entry.sae, validation, own["l0"])
            rows.append(
                {
                    "contender": name,
                    "seed": seed,
                    "shipped": asdict(shipped),
                    "matched": {**asdict(reconstruction(matched, validation)), "tau": matched.tau},
                    "commit": commit,
                    "last_weight": weight,
                    "seconds": round(seconds, 1),
                }
            )
            score = rows[-1]["matched"]
            print(
                f"{name:34s} seed {seed}: mse {score['mse']:.2f} at l0 {score['l0']:.2f} (shipped {shipped.l0:.2f})",
                flush=True,
            )
            write(options, own, rows)
    print(options.path)


def write(options: Options, teacher: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """After every row: a run that is stopped has what it measured."""
    result = {
        "options": options.kept(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "teacher": teacher,
        "rows": rows,
    }
    options.path.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.path, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
