"""Peak memory and speed of whole training steps on the CPU, by how a step is cut, at three widths.

    python benchmarks/scaling.py                 # measures, writes benchmarks/results/scaling-cpu.json and the table
    python benchmarks/scaling.py --render        # only the table of docs/scaling.md, from the committed results

Every case runs in a process of its own, on one thread. Peak memory is what the system saw (VmHWM) beyond the process
before the SAE was made. Speed is the best of the measured steps, by the process's own CPU time: other programs on a
shared machine then cost nothing but what they do to its caches.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.utils.checkpoint import checkpoint

from rsae_triton import FusedRationalSAE
from rsae_triton.commands.plan import Plan, estimates
from rsae_triton.common.files import write_text
from rsae_triton.ops.cost import Step, cost
from rsae_triton.ops.workspace import StepMemory
from rsae_triton.training.memory import plan_memory
from rsae_triton.training.optimizer import make_optimizer, remove_radial_gradient, take_step
from rsae_triton.training.recipes import GATE_PARAMETERS, RECIPES, losses
from rsae_triton.training.settings import TrainSettings

RESULTS, PAGE = Path("benchmarks/results/scaling-cpu.json"), Path("docs/scaling.md")
STRATEGIES = {
    "eager": "eager PyTorch",
    "recompute": "eager, torch.utils.checkpoint",
    "saved": "saved h",
    "chunked": "chunked over tokens",
    "streamed": "streamed over features",
    "sparse": "sparse",
}
L0, ENTRIES = 32, 2.5
"""Active features of a token, and entries of the support for each of them."""


@dataclass(frozen=True)
class Options:
    widths: tuple[int, ...] = (4096, 16384, 65536)
    tokens: int = 512
    d_in: int = 576
    steps: int = 2
    render: bool = False


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def training(strategy: str, n: int, d_in: int, d_sae: int) -> Callable[[], None]:
    """One optimiser step, as `train` does it."""
    backend = "eager" if strategy in ("eager", "recompute") else "cpu"
    sae = FusedRationalSAE(d_in, d_sae, form="gated", backward="rational", backend=backend, initialise=False)
    with torch.no_grad():
        for one in (sae.W_enc, sae.W_dec):
            one.uniform_(-0.05, 0.05)
        # h is normal with this deviation: thresholds and ramps of a trained SAE's density.
        deviation = 0.05 / 3**0.5 * d_in**0.5
        quantiles = torch.special.ndtri(1 - torch.tensor([1.0, ENTRIES], dtype=torch.float64) * L0 / d_sae) * deviation
        sae.gate.threshold.fill_(float(quantiles[0]))
        sae.gate.log_input_scale.fill_(float((quantiles[0] - quantiles[1]).log()))
    for name in GATE_PARAMETERS:
        getattr(sae.gate, name).requires_grad_(False)
    recipe, x, memory = RECIPES["hard"], torch.randn(n, d_in), StepMemory()
    optimizer = make_optimizer(sae, recipe, TrainSettings(steps=10))
    norms = sae.W_dec.detach().norm(dim=1, keepdim=True)
    plan = None if backend == "eager" else plan_memory(sae, n, strategy, no_support=None)
    plan = replace(plan, mode="sparse") if plan is not None and strategy == "sparse" else plan

    def loss() -> torch.Tensor:
        return losses(sae, x, recipe, 0.01, None, plan).total

    def step() -> None:
        memory.zero_grad(sae.parameters(), keep=strategy != "saved")
        with memory:
            total = checkpoint(loss, use_reentrant=False) if strategy == "recompute" else loss()
            total.backward()
        remove_radial_gradient(sae.W_dec)
        norm = torch.nn.utils.get_total_norm([one.grad for one in sae.parameters() if one.grad is not None])
        take_step(sae, optimizer, norm, 1.0, norms)

    return step


def measure(strategy: str, options: Options, d_sae: int, answer: Any) -> None:
    torch.set_num_threads(1)
    # What libraries and compiled gates take for themselves, at the smallest width.
    training(strategy, options.tokens, options.d_in, min(options.widths))()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    step = training(strategy, options.tokens, options.d_in, d_sae)
    taken = []
    for _ in range(options.steps):
        start = time.process_time()
        step()
        taken.append(time.process_time() - start)
    answer.send({"seconds": min(taken), "peak_bytes": resident("VmHWM") - before})


def run(options: Options) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    cases = []
    for d_sae in options.widths:
        for strategy in STRATEGIES:
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=measure, args=(strategy, options, d_sae, send))
            process.start()
            send.close()
            try:
                found = receive.recv()
            except EOFError:
                found = {"error": "the process ended without an answer; out of memory?"}
            process.join()
            cases.append({"d_sae": d_sae, "strategy": strategy, **found})
            print(cases[-1], flush=True)
    return {
        "command": "python " + " ".join(sys.argv),
        "machine": f"{_cpu()}, {os.cpu_count()} cores, shared with other work; one thread",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "tokens": options.tokens,
        "d_in": options.d_in,
        "steps": options.steps,
        "cases": cases,
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(results: dict[str, Any]) -> str:
    """Peak beyond weights, gradients and Adam's moments; the prediction beside it; tokens per second."""
    n, d_in = results["tokens"], results["d_in"]
    widths = list(dict.fromkeys(case["d_sae"] for case in results["cases"]))
    found = {(case["strategy"], case["d_sae"]): case for case in results["cases"]}
    lines = [
        "| step | " + " | ".join(f"d_sae {d_sae}" for d_sae in widths) + " |",
        "|---|" + "---|" * len(widths),
    ]
    for strategy, name in STRATEGIES.items():
        cells = []
        for d_sae in widths:
            case = found[strategy, d_sae]
            if "error" in case:
                cells.append(case["error"])
                continue
            beside = case["peak_bytes"] - 16 * (2 * d_in * d_sae + 2 * d_sae + d_in)
            cells.append(f"{beside / 1e6:,.0f} MB, {n / case['seconds']:,.0f} tokens/s")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    predicted = []
    for d_sae in widths:
        sae = FusedRationalSAE(d_in, d_sae, form="gated", initialise=False)
        p, q = sae.gate.degree
        step = Step(n, d_in, d_sae, p, q, True, "gated", 4)
        eager, saved = (cost(step, one).peak_bytes / 1e6 for one in ("eager", "split"))
        plans = [plan_memory(sae, n, one).need / 1e6 for one in ("chunked", "streamed")]
        predicted.append(" / ".join(f"{one:,.0f}" for one in (eager, saved, *plans)))
    lines.append(f"| *predicted MB: eager / saved / chunked / streamed* | {' | '.join(predicted)} |")
    held = " / ".join(f"{16 * 2 * d_in * d_sae / 1e6:,.0f}" for d_sae in widths)
    lines += [
        "",
        f"Measured: d_in {d_in}, {n} tokens a step, float32, gate (3, 2) shared and frozen, l0 {L0}, "
        f"{ENTRIES} entries of the support for each active feature; MB beside the weights, gradients and moments of "
        f"Adam ({held} MB). `{results['command']}`, {results['machine']}, torch {results['torch']}, "
        f"{results['date']}; best of {results['steps']} steps by CPU time.",
    ]
    return "\n".join(lines)


def million() -> str:
    """The computed layouts of a million features, on 8 and on 64 GPUs."""
    lines = [
        "| GPUs | tokens x features | `--memory` | GB per GPU: weights, gradients + Adam, bf16 copies, activations | "
        "compute | update | network (sent) | step | tokens/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for gpus, layouts in ((8, ((1, 8), (2, 4))), (64, ((1, 64), (8, 8)))):
        found = estimates(Plan(d_in=4096, d_sae=1 << 20, tokens=8192, gpus=gpus))
        chosen = [one for one in found if (one.tokens_over, one.features_over) in layouts]
        for one in (one for one in chosen if one.features_over == gpus or one.strategy == "saved"):
            parts = " + ".join(
                f"{part / 1e9:.1f}" for part in (one.weights, one.optimiser, one.copies, one.activations)
            )
            times = [f"{1e3 * part:.0f} ms" for part in (one.compute, one.update)]
            lines.append(
                f"| {gpus} | {one.tokens_over} x {one.features_over} | {one.strategy} | {parts} = {one.bytes / 1e9:.0f}"
                f"{'' if one.fits else ' (does not fit)'} | {' | '.join(times)} | {1e3 * one.communication:.1f} ms "
                f"({one.sent / 1e9:.2f} GB) | **{1e3 * one.seconds:.0f} ms** | {8192 / one.seconds:,.0f} |"
            )
    return "\n".join(lines)


def main(options: Options) -> None:
    if not options.render:
        write_text(RESULTS, json.dumps(run(options), indent=1) + "\n")
    text = PAGE.read_text()
    for name, rendered in (("scaling", table(json.loads(RESULTS.read_text()))), ("million", million())):
        pattern = rf"(<!-- {name} table:.*?-->\n).*?(<!-- /{name} table -->)"
        text, count = re.subn(pattern, lambda m, new=rendered: f"{m[1]}{new}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{PAGE} has {count} places for the table {name}; it must have one")
    write_text(PAGE, text)


if __name__ == "__main__":
    main(tyro.cli(Options))
