"""Which gate, trained how, beats the control at equal l0: the table of docs/experiments.md.

    python benchmarks/gate_forms.py --steps 400 --seeds 1 --out benchmarks/results/gate-forms.json

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

import torch
import tyro

from rsae_triton.activations import extract_splits, load_corpus, load_host
from rsae_triton.base import SparseAutoencoder, write_atomically
from rsae_triton.demo import MARGIN_L0, Demo, make_teacher
from rsae_triton.evaluate import at_l0, reconstruction
from rsae_triton.gate import RationalGate
from rsae_triton.recipes import RECIPES, Recipe
from rsae_triton.remez import fit_gate
from rsae_triton.sae import FusedRationalSAE
from rsae_triton.teachers import JumpReluSAE
from rsae_triton.train import train
from rsae_triton.upgrade import upgrade

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass(frozen=True)
class Options:
    """Sizes are the demo's, so that its cached teacher and activations are used."""

    teacher: str = "relu"
    steps: int = 400
    seeds: int = 1
    contenders: tuple[str, ...] = (
        "control",
        "rational",
        "identity",
        "rectangle",
        "minimax (8,8)",
        "per feature",
        "slow thresholds",
    )
    out: Path = Path("benchmarks/results/gate-forms.json")


def copied(sae: SparseAutoencoder, teacher: SparseAutoencoder) -> SparseAutoencoder:
    with torch.no_grad():
        for name in WEIGHTS:
            getattr(sae, name).copy_(getattr(teacher, name))
    return sae


def contenders(
    teacher: SparseAutoencoder, x: torch.Tensor
) -> dict[str, Callable[[], tuple[SparseAutoencoder, Recipe]]]:
    init = upgrade(teacher, x)
    width, theta = float(init.gate.input_scale[0].detach()), init.gate.threshold.detach()
    sizes = (teacher.d_in, teacher.d_sae)
    hard, fixed = RECIPES["hard"], ("alpha", "beta", "centre", "log_input_scale")

    def identity() -> tuple[SparseAutoencoder, Recipe]:
        gate = copy.deepcopy(init.gate)
        gate.amplitude = "identity"
        return copied(FusedRationalSAE(*sizes, gate=gate), teacher), replace(hard, frozen=fixed)

    def rectangle() -> tuple[SparseAutoencoder, Recipe]:
        sae = JumpReluSAE(*sizes, threshold=theta, bandwidth=2 * width, slope_to_h=True)
        return copied(sae, teacher), hard

    def minimax() -> tuple[SparseAutoencoder, Recipe]:
        fit = fit_gate("step", (8, 8), margin=0.1)
        gate = RationalGate.from_fit(
            fit, teacher.d_sae, thresholds=theta, form="gated", backward="rational", input_scale=10 * width
        )
        return copied(FusedRationalSAE(*sizes, gate=gate), teacher), hard

    return {
        "control": lambda: (
            copy.deepcopy(teacher),
            RECIPES[{"standard": "relu"}.get(teacher.architecture, teacher.architecture)],
        ),
        "rational": lambda: (copy.deepcopy(init), hard),
        "identity": identity,
        "rectangle": rectangle,
        "minimax (8,8)": minimax,
        "slow thresholds": lambda: (
            copy.deepcopy(init),
            replace(hard, weight=0.0008, lr_scale={"threshold": 10.0}),
        ),
        "per feature": lambda: (upgrade(teacher, x, coefficients="per_feature"), hard),
    }


def main(options: Options) -> None:
    torch.set_float32_matmul_precision("medium")
    demo = Demo(teacher=options.teacher)
    host = load_host()
    splits = extract_splits(host, load_corpus("demo"), n_train=demo.tokens, n_validation=10_000, n_test=10_000)
    x, validation = splits.train.tensor(), splits.validation.tensor()
    teacher, _ = make_teacher(demo, None, splits, x)
    own = asdict(reconstruction(teacher, validation))
    target = MARGIN_L0 * upgrade(teacher, x).metadata["stage1"]["teacher_l0"]
    rows = []
    for seed in range(1, options.seeds + 1):
        made = contenders(teacher, x)
        for name in options.contenders:
            sae, recipe = made[name]()
            started = time.perf_counter()
            log = train(sae, x, steps=options.steps, recipe=recipe, target_l0=target, seed=seed, label=name)
            seconds = time.perf_counter() - started
            shipped, matched = reconstruction(sae, validation), at_l0(sae, validation, own["l0"])
            rows.append(
                {
                    "contender": name,
                    "seed": seed,
                    "shipped": asdict(shipped),
                    "matched": {**asdict(reconstruction(matched, validation)), "tau": matched.tau},
                    "last_weight": log.weight[-1],
                    "seconds": round(seconds, 1),
                }
            )
            score = rows[-1]["matched"]
            print(
                f"{name:16s} seed {seed}: mse {score['mse']:.2f} at l0 {score['l0']:.2f} (shipped l0 {shipped.l0:.2f})"
            )
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    result = {
        "options": {name: str(value) for name, value in asdict(options).items()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "commit": commit,
        "teacher": own,
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out, lambda path: path.write_text(json.dumps(result, indent=2) + "\n"))
    print(options.out)


if __name__ == "__main__":
    main(tyro.cli(Options))
