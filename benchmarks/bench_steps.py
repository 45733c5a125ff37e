"""Whole training steps on the CPU, as people run them: this package's, other libraries', and bare matrix products.

A step is loss, backward pass, radial part, clipping, Adam and the decoder's norms, in float32: for ours `Run.advance`,
which is what `train()` repeats. Thresholds stand where training leaves them: L0 active features a token, and a support
of some more (SUPPORT, as measured on trained SAEs). Contenders take turns, and each one's best time counts; with one
thread the clock is the process's own CPU time, so that a busy machine distorts little.

    python benchmarks/bench_steps.py             # measures, writes benchmarks/results/steps-cpu.json and the tables
    python benchmarks/bench_steps.py --render    # only the tables of docs/steps.md, docs/index.md, README.md

Peers (SAELens, sparsify, dictionary_learning) take part where they are installed: `make peers`.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peer_steps
import torch
import tyro
from cases import Case, make_sae
from measuring import Contender, environment, peak_bytes
from torch import Tensor

from rsae_triton import FusedRationalSAE, RationalGate
from rsae_triton.common.files import make_folder, write_text
from rsae_triton.ops import native, products
from rsae_triton.remez import fit_gate
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.teachers import BatchTopKSAE, JumpReluSAE, TopKSAE
from rsae_triton.training.memory import plan_memory
from rsae_triton.training.on_entries import reason_against
from rsae_triton.training.processes import Alone
from rsae_triton.training.recipes import recipe_for
from rsae_triton.training.run import Run
from rsae_triton.training.settings import TrainSettings

RESULTS, PAGE, README = Path("benchmarks/results/steps-cpu.json"), Path("docs/steps.md"), Path("README.md")
INDEX = Path("docs/index.md")
L0 = 32
SUPPORT = {2304: 0.03, 18432: 0.004}
"""Shares of [n_tokens, d_sae] in the support of trained SAEs, by d_sae: SmolLM2's, layer 16, at l0 31 to 35."""
FIVE, ONE = "five dense products (torch.mm)", "one dense product (torch.mm)"


@dataclass(frozen=True)
class Options:
    sizes: tuple[str, ...] = ("1024x576x18432", "1024x576x2304")
    """tokens x d_in x d_sae."""
    repeat: int = 5
    threads: int = 1
    growth: bool = True
    """How a step grows with d_sae, tokens and l0, each alone."""
    only: tuple[str, ...] = field(default_factory=tuple)
    """Contenders whose name holds one of these; all when not given."""
    out: Path = RESULTS
    render: bool = False


def share_of(d_sae: int, l0: float = L0) -> float:
    """The share of the support at this width and l0: entries a token grow with l0, and hardly with d_sae."""
    return min(0.5, {**SUPPORT}.get(d_sae, 75 / d_sae) * l0 / L0)


def inputs(n: int, d_in: int, d_sae: int) -> tuple[FusedRationalSAE, Tensor]:
    return make_sae(Case("step", n, d_in, d_sae, form="gated"), "cpu", "auto")


def rational(like: FusedRationalSAE, x: Tensor, l0: float = L0, backend: str = "auto") -> FusedRationalSAE:
    """The default Rational SAE of `like`'s weights, its thresholds where training leaves them on x."""
    d_sae = like.d_sae
    with torch.no_grad():
        h = ((x[:256] - like.b_dec) @ like.W_enc).flatten()
        kept = [max(1, round(share * len(h))) for share in (l0 / d_sae, share_of(d_sae, l0))]
        theta, low = (float(h.kthvalue(len(h) - count).values) for count in kept)
    gate = RationalGate.from_fit(
        fit_gate("ramp", (3, 2)), d_sae, form="gated", backward="rational",
        thresholds=torch.full((d_sae,), theta), input_scale=max(theta - low, 1e-3),
    )  # fmt: skip
    sae = FusedRationalSAE(like.d_in, d_sae, gate=gate, backend=backend, initialise=False)
    return copy_weights(sae, like)


def copy_weights(sae: Any, like: FusedRationalSAE) -> Any:
    with torch.no_grad():
        for name in ("W_enc", "W_dec", "b_dec", "b_enc"):
            getattr(sae, name).copy_(getattr(like, name))
    return sae


def ours(sae: SparseAutoencoder, n: int, memory: str, exact: bool = False) -> Run:
    """What `train()` makes of an SAE; its rate is so low that every turn does the same work."""
    settings = TrainSettings(
        steps=10**9, batch_size=n, memory=memory, exact=exact, lr=1e-9, warmup=0, decay=0.0, target_l0=None
    )  # type: ignore[arg-type]
    recipe = recipe_for(sae)
    for name, one in sae.named_parameters():
        one.requires_grad_(name.removeprefix("gate.") not in recipe.frozen)
    sae.train()
    reason = reason_against(sae, soft=recipe.soft, aux_k=recipe.aux_k, frozen=set(recipe.frozen))
    plan = plan_memory(sae, n, memory, aux_k=recipe.aux_k, no_support=reason, exact=exact)
    return Run(sae, settings, recipe, plan, Alone(), "benchmark", torch.float32)


def contenders(n: int, d_in: int, d_sae: int) -> list[Contender]:
    like, x = inputs(n, d_in, d_sae)
    theta = float(rational(like, x).gate.threshold[0].detach())

    def made(name: str, sae: SparseAutoencoder, memory: str, exact: bool = False) -> Contender:
        run = ours(sae, n, memory, exact)
        return Contender(name, lambda: run.advance(x, False, False, None), lambda: {}, exact=False, pieces={})

    W_enc, W_dec = like.W_enc.detach().t().contiguous(), like.W_dec.detach()
    h, out = torch.empty(d_sae, n), torch.empty(n, d_in)
    one, other = torch.empty(d_sae, d_in), torch.empty(d_sae, d_in)

    def five() -> None:
        torch.mm(W_enc, x.t(), out=h)
        torch.mm(h.t(), W_dec, out=out)
        torch.mm(h, out, out=one)
        torch.mm(W_dec, out.t(), out=h)
        torch.mm(h, x, out=other)

    options = {"initialise": False}
    found = [
        Contender(FIVE, five, lambda: {}, exact=False),
        Contender(ONE, lambda: torch.mm(W_enc, x.t(), out=h), lambda: {}, exact=False),
        made("RSAE", rational(like, x), "sparse"),
        made("RSAE, exact", rational(like, x), "sparse", exact=True),
        made("RSAE, dense", rational(like, x), "saved"),
        made("RSAE, dense in pieces", rational(like, x), "chunked"),
        made("RSAE, eager PyTorch", rational(like, x, backend="eager"), "saved"),
        made("JumpReLU teacher", copy_weights(JumpReluSAE(d_in, d_sae, threshold=theta, **options), like),
             "sparse"),
        made("TopK teacher", copy_weights(TopKSAE(d_in, d_sae, k=L0, **options), like), "sparse"),
        made("BatchTopK teacher", copy_weights(BatchTopKSAE(d_in, d_sae, k=L0, **options), like), "sparse"),
    ]  # fmt: skip
    for name, run in peer_steps.steps(like, x, theta, L0).items():
        found.append(Contender(name, run, lambda: {}, exact=False))
    return found


def turns(found: list[Contender], repeat: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {one.name: [] for one in found}
    for turn in range(repeat + 1):  # the first warms up, and compiles
        for one in found:
            before = clock()
            one.run()
            if turn:
                times[one.name].append(clock() - before)
    return times


def measured(size: str, options: Options, clock: Callable[[], float]) -> dict[str, Any]:
    n, d_in, d_sae = map(int, size.split("x"))
    found = contenders(n, d_in, d_sae)
    if options.only:
        found = [one for one in found if one.name in (FIVE, ONE) or any(part in one.name for part in options.only)]
    times = turns(found, options.repeat, clock)
    rows = {
        one.name: {
            "seconds": min(times[one.name]),
            "median_s": sorted(times[one.name])[len(times[one.name]) // 2],
            "peak_bytes": peak_bytes(one, torch.device("cpu")),
        }
        for one in found
    }
    print(size, json.dumps({name: round(1e3 * row["seconds"], 1) for name, row in rows.items()}, indent=1), flush=True)
    return {"tokens": n, "d_in": d_in, "d_sae": d_sae, "l0": L0, "support": share_of(d_sae), "rows": rows}


def growth(options: Options, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """Steps of the default recipe, one size varied at a time."""
    cases = [("d_sae", 512, 2048 * 2**k, L0) for k in range(7)]
    cases += [("tokens", 128 * 2**k, 16384, L0) for k in range(6)]
    cases += [("l0", 512, 16384, 8 * 2**k) for k in range(6)]
    found = []
    for what, n, d_sae, l0 in cases:
        like, x = inputs(n, 576, d_sae)
        run = ours(rational(like, x, l0), n, "sparse")
        one = Contender(what, lambda run=run, x=x: run.advance(x, False, False, None), lambda: {}, exact=False)
        seconds = min(turns([one], 2, clock)[what])
        found.append(
            {"what": what, "tokens": n, "d_sae": d_sae, "l0": l0, "support": run.route.share, "seconds": seconds,
             "peak_bytes": peak_bytes(one, torch.device("cpu"))}
        )  # fmt: skip
        print(found[-1], flush=True)
        del like, x, run, one
    return found


def table(result: dict[str, Any], least: int = 0) -> str:
    """One table of all sizes: seconds, what that is of five products, and transient memory."""
    cases = [case for case in result["cases"] if case["d_sae"] >= least]
    head = [f"{case['tokens']} x {case['d_in']} x {case['d_sae']}" for case in cases]
    lines = ["| step | " + " | ".join(head) + " |", "|---|" + "---|" * len(head)]
    names = {name: None for case in cases for name in case["rows"]}
    first = cases[0]["rows"]
    for name in sorted(names, key=lambda name: first.get(name, {"seconds": math.inf})["seconds"]):
        cells = []
        for case in cases:
            row, five = case["rows"].get(name), case["rows"][FIVE]["seconds"]
            memory = "" if row is None or name in (FIVE, ONE) else f", {row['peak_bytes'] / 1e6:,.0f} MB"
            cells.append("" if row is None else f"{1e3 * row['seconds']:,.0f} ms ({row['seconds'] / five:.2f}{memory})")
        shown = name if name in (FIVE, ONE) or name.startswith(peer_steps.LIBRARIES) else f"**{name}, ours**"
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", origin(result)])


def summary(result: dict[str, Any]) -> str:
    """One sentence: our default step, one dense product, and the fastest and slowest of the others."""
    case = result["cases"][0]
    rows = {name: 1e3 * row["seconds"] for name, row in case["rows"].items()}
    peers = sorted((name for name in rows if name.startswith(peer_steps.LIBRARIES)), key=rows.__getitem__)
    between = f"the fastest peer ({peers[0]}) {rows[peers[0]]:,.0f}, the slowest ({peers[-1]}) {rows[peers[-1]]:,.0f}"
    return (
        f"A whole training step of {case['tokens']:,} tokens at d_in {case['d_in']}, d_sae {case['d_sae']:,} takes "
        f"{rows['RSAE']:,.0f} ms on one CPU thread; one dense matrix product takes {rows[ONE]:,.0f}, {between} "
        f"([how](docs/steps.md))."
    )


def origin(result: dict[str, Any]) -> str:
    on, versions = result["device"], {**result["versions"], **result["peers"]}
    supports = " and ".join(f"{100 * case['support']:.1f} %" for case in result["cases"])
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "cuda")
    return (
        f"In brackets: the time over that of five dense products, and memory beyond weights, gradients and moments. "
        f"float32, {on['threads']} thread, l0 {L0} (k = {L0}), support {supports} of all places; best of "
        f"{result['repeat']} steps in turns, by {result['clock']}, on a shared machine (load {result['load']:.1f}). "
        f"{on['name']}: bfloat16 in hardware {'yes' if result['bfloat16'] else 'no'}, product by "
        f"{'oneDNN' if result['onednn'] else 'MKL'}, loops {'compiled' if result['compiled'] else 'in PyTorch'}. "
        f"`{result['command']}`, {result['date']}; {packages}."
    )


def growth_table(result: dict[str, Any]) -> str:
    lines = ["| varied | from | to | time grows as its power | transient memory as its power | at the end |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for what in ("d_sae", "tokens", "l0"):
        rows = [row for row in result["growth"] if row["what"] == what]
        if len(rows) < 2:
            continue
        powers = [slope([row[what] for row in rows], [row[name] for row in rows]) for name in ("seconds", "peak_bytes")]
        last = rows[-1]
        lines.append(
            f"| {what} | {rows[0][what]:,} | {last[what]:,} | {powers[0]:.2f} | {powers[1]:.2f} | "
            f"{1e3 * last['seconds']:,.0f} ms, {last['peak_bytes'] / 1e6:,.0f} MB |"
        )
    lines += [
        "",
        "Of the default recipe; what is not varied is 512 tokens, 16,384 features, l0 32. " + origin(result),
    ]
    return "\n".join(lines)


def tables() -> list[tuple[Path, str, str]]:
    """(page, name, text) of every table, from what is committed."""
    result = json.loads(RESULTS.read_text())
    return [
        (PAGE, "steps", table(result)), (PAGE, "growth", growth_table(result)),
        (README, "steps", summary(result)), (INDEX, "steps", summary(result).replace("(docs/", "(")),
    ]  # fmt: skip


def slope(sizes: list[float], values: list[float]) -> float:
    """The exponent of a power law, fitted in logarithms."""
    a, b = ([math.log(one) for one in some] for some in (sizes, values))
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    return sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True)) / sum((p - mean_a) ** 2 for p in a)


def place(path: Path, name: str, text: str) -> None:
    start, end = f"<!-- {name} table:", f"<!-- /{name} table -->"
    page = path.read_text()
    if page.count(start) != 1 or page.count(end) != 1:
        raise SystemExit(f"{path} has {page.count(start)} places for the {name} table; it must have one")
    head, rest = page.split(start)
    marker, rest = rest.split("\n", 1)
    write_text(path, f"{head}{start}{marker}\n{text}\n{end}{rest.split(end)[1]}")


def command() -> str:
    """What was asked for, but for where the result goes."""
    words = sys.argv[: sys.argv.index("--out")] if "--out" in sys.argv else sys.argv
    return "make bench-steps" if len(words) == 1 else " ".join(["python", *words])


def main(options: Options) -> None:
    if not options.render:
        torch.set_num_threads(options.threads)
        clock = time.process_time if options.threads == 1 else time.perf_counter
        about = environment(torch.device("cpu"), options.threads, "CPU" if options.threads == 1 else "wall")
        result = {
            "command": command(),
            "date": time.strftime("%Y-%m-%d"), "repeat": options.repeat,
            "bfloat16": products.bfloat16_products(), "onednn": products.onednn(),
            "compiled": native.library() is not None, "peers": peer_steps.versions(), **about,
            "cases": [measured(size, options, clock) for size in options.sizes],
            "growth": growth(options, clock) if options.growth else [],
            "load": os.getloadavg()[0],
        }  # fmt: skip
        make_folder(options.out.parent)
        write_text(options.out, json.dumps(result, indent=1) + "\n")
    if options.out == RESULTS:
        for page, name, text in tables():
            place(page, name, text)


if __name__ == "__main__":
    main(tyro.cli(Options))
