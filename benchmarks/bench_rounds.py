"""How long rounds take on the CPU: encoding by the number of rounds, and a training step through two of them.

Thresholds stand where training leaves them (`bench_steps.rational`). Contenders take turns, one thread, by the
process's own CPU time, so that a busy machine distorts little; each one's best time counts.

    python benchmarks/bench_rounds.py            # measures, writes benchmarks/results/rounds-time.json
    python benchmarks/readme_table.py            # the table in docs/rounds.md and the picture
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from bench_steps import FIVE, L0, contenders, copy_weights, inputs, ours, rational, share_of, turns
from measuring import Contender, environment

from rsae_triton.common.files import write_text
from rsae_triton.teachers import JumpReluSAE

RESULTS = Path("benchmarks/results/rounds-time.json")
COUNTS = (2, 3, 4, 6)
TOKENS, D_IN = 1024, 576
PLAIN, ONE = "teacher, plain encoder", "RSAE, one round"


@dataclass(frozen=True)
class Options:
    d_sae: tuple[int, ...] = (2304, 18432)
    repeat: int = 7
    out: Path = RESULTS


def work(d_sae: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """What is timed, by kind and contender."""
    like, x = inputs(TOKENS, D_IN, d_sae)
    one = rational(like, x)
    theta = float(one.gate.threshold[0].detach())
    plain = copy_weights(JumpReluSAE(D_IN, d_sae, threshold=theta, initialise=False), like)
    found = {PLAIN: plain, ONE: one, **{f"{n} rounds": one.with_rounds(n, x) for n in COUNTS}}
    steps = {name: run for name, run in ((each.name, each.run) for each in contenders(TOKENS, D_IN, d_sae))
             if name in (FIVE, "RSAE", "RSAE, exact", "JumpReLU teacher")}  # fmt: skip
    through = ours(rational(like, x).with_rounds(2, x), TOKENS, "auto")
    steps["2 rounds"] = lambda: through.advance(x, False, False, None)
    return {
        "encode": {name: lambda sae=sae: sae.encode(x) for name, sae in found.items()},
        "encode_sparse": {name: lambda sae=sae: sae.encode_sparse(x) for name, sae in found.items() if name != PLAIN},
        "reconstruct": {name: lambda sae=sae: sae(x) for name, sae in found.items()},
        "step": steps,
    }


def measured(d_sae: int, repeat: int) -> dict[str, dict[str, float]]:
    """Best seconds of every contender."""
    rows: dict[str, dict[str, float]] = {}
    for kind, runs in work(d_sae).items():
        with torch.set_grad_enabled(kind == "step"):
            found = [Contender(name, run, lambda: {}, exact=False) for name, run in runs.items()]
            rows[kind] = {name: min(seconds) for name, seconds in turns(found, repeat, time.process_time).items()}
    print(d_sae, json.dumps({kind: {name: round(1e3 * s, 1) for name, s in row.items()} for kind, row in rows.items()}))
    return rows


def table(result: dict[str, Any]) -> str:
    """Milliseconds, and the ratios that matter, by d_sae."""
    sizes = list(result["seconds"])
    titles = ["", *(f"d_sae {int(size):,}" for size in sizes)]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    said = {
        "encode": "`encode`",
        "encode_sparse": "`encode_sparse`",
        "reconstruct": "`sae(x)`",
        "step": "training step",
    }
    for kind, what in said.items():
        for name in result["seconds"][sizes[0]][kind]:
            cells = []
            for size in sizes:
                row = result["seconds"][size][kind]
                base = row[ONE if kind != "step" else "RSAE"]
                ratio = "" if name in (ONE, "RSAE") else f" ({row[name] / base:.2f})"
                cells.append(f"{1e3 * row[name]:,.0f} ms{ratio}")
            label = {"RSAE": ONE, "RSAE, exact": f"{ONE}, exact", "2 rounds": "through 2 rounds"}.get(name, name)
            lines.append(f"| {what}: {label if kind == 'step' else name} | {' | '.join(cells)} |")
    where = result["device"]["name"]
    return "\n".join([
        *lines, "",
        f"{TOKENS:,} tokens, d_in {D_IN}, float32, one thread, l0 {L0}, support "
        f"{' and '.join(f'{100 * share_of(int(size)):.1f} %' for size in sizes)} of all places; in brackets: times one "
        f"round of a Rational SAE. Best of {result['repeat']} in turns, by CPU time, on a machine that did other work "
        f"too (load {result['load']:.1f}). {where}, torch {result['versions']['torch']}. `{result['command']}`, "
        f"{result['date']}.",
    ])  # fmt: skip


def main(options: Options) -> None:
    torch.set_num_threads(1)
    seconds = {str(d_sae): measured(d_sae, options.repeat) for d_sae in options.d_sae}
    result = {
        "command": " ".join(["python", *sys.argv]), "date": time.strftime("%Y-%m-%d"), "repeat": options.repeat,
        **environment(torch.device("cpu"), 1, "CPU"), "load": os.getloadavg()[0], "seconds": seconds,
    }  # fmt: skip
    write_text(options.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
