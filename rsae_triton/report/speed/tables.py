"""Makes docs/benchmarks.md and the table of docs/index.md, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rsae_triton.ops.cost import CEILINGS, Step, cost
from rsae_triton.report.speed.results import ENOUGH_TURNS, FLOOR, SWEEPS, eager, exponents, timed, title, turns
from rsae_triton.report.speed.targets import FEATURE, SHARED, find, targets

WORK = {
    "step": "Training step: loss, backward, Adam",
    "encode": "Encoder, inference",
    "backward": "Encoder, forward and backward",
    "sparse": "Inference to rows of indices and back",
    "coefficients": "The gate's backward pass alone, with every coefficient's gradient",
}
INTRO = """# Benchmarks

This page is made by `rsae bench --render` from `benchmarks/results/speed-*.json`; do not edit it. `make bench`
measures on the CPU, `make bench-gpu` on a CUDA device. `rsae bench --new out/bench/cpu.json --keep` (or `gpu.json`)
adds the new result. Run `make peers` first to include SAELens and sparsify, and `make bench-demo` afterwards to time
the demo. If a run had no time for some cases, run it again with `BENCH="--bench-tokens 1024 --bench-resume"`.
{devices}

**How.** All contenders of a case have the same weights and input (sparse sums of decoder directions plus noise, fixed
seeds). They take turns: each turn runs every contender once, so that other load on the machine affects all of them. A
contender is timed only if its results are right. Its loss and every gradient are compared with the written-out
formulas (in float64 for small cases, else in float32); the error may be twice eager PyTorch's in the same dtype plus
a stated limit (1e-3 in float32, 3e-2 in bf16, of the norm). Adam's learning rate is 0, so that every turn does the
same work. Times are medians (20th to 80th percentile; turns).

**Columns.** *Memory*: the most bytes in use at once, beyond weights, optimiser state and the last step's gradients.
*Predicted*: by the cost model (`rsae_triton/ops/cost.py`), from the peak rates measured in the same run. *Floor*: the
share reached of the best possible time, which is the longer of the work's FLOPs at the speed of one large matrix
product and its least memory traffic at the speed of a copy. *Error*: the largest relative error of the loss and any
gradient. Other libraries compute another function at the same shape, and are checked against their own definition.

**Contenders.** *eager*: plain PyTorch, by Horner's rule and by powers. *ours*: what `train()` does if memory allows;
*chunked* cuts the step by tokens, *streamed* by features. *bare products*: only the matrix products of a step.
"""


def page(results: dict[str, dict[str, Any]], plots: dict[str, list[str]]) -> str:
    """The text of docs/benchmarks.md. plots: {name of a result: file names of its plots}."""
    missing = {"cpu", "cuda"} - {one["device"]["kind"] for one in results.values()}
    names = {"cpu": "the CPU", "cuda": "a GPU"}
    devices = f"Not measured yet: {' and '.join(names[one] for one in sorted(missing))}." if missing else ""
    parts = [INTRO.format(devices=devices)]
    for name, result in results.items():
        parts.append("\n".join(_device(result, plots.get(name, []))))
    if "cuda" in missing:
        parts.append("\n".join(_unmeasured()))
    return "\n".join(parts).rstrip() + "\n"


def _device(result: dict[str, Any], plots: list[str]) -> Iterator[str]:
    device, versions, on = result["device"], result["versions"], result["ceilings"]
    yield f"## {device['name']} ({device['kind'].upper() if device['kind'] == 'cpu' else 'CUDA'})\n"
    threads = f", {device['threads']} thread of {device['cores']} cores" if device["threads"] else ""
    rates = ", ".join(f"{1e-9 * rate:,.0f} GFLOP/s ({size} bytes)" for size, rate in on["products"].items())
    yield (
        f"Commit {result['commit']}{threads}; clock: {result['clock']}; "
        f"{', '.join(f'{name} {version}' for name, version in versions.items() if version)}. "
        f"Load average {result['load_average_before']:.1f} before, {result['load_average_after']:.1f} after. "
        f"Ceilings: {rates}, {1e-9 * on['bandwidth']:.1f} GB/s. {result['minutes']:.1f} minutes in all."
    )
    if result.get("note"):
        yield f"\n{result['note']}"
    yield from _checks(result)
    yield from _targets(result)
    for work, heading in WORK.items():
        cases = [case for case in result["cases"] if case["work"] == work and not case["sweep"]]
        if cases:
            yield f"\n### {heading}"
            yield from _cases(cases, [find(result, one.case) for one in targets()])
    yield from _growth(result, plots)
    if result["other"]:
        yield "\n### Besides\n\n| what | value |\n| --- | --- |"
        yield from (f"| {one['name']} | {one['value']:.4g} {one['unit']} |" for one in result["other"])


def _checks(result: dict[str, Any]) -> Iterator[str]:
    """What `tools/gpu_check.py` found besides times."""
    counts = result.get("checks", {})
    for part in ("correct", "sanitize"):
        if part in counts:
            yield f"\nChecks ({part}): {', '.join(f'{count} {word}' for word, count in counts[part].items())}."
    for row in result.get("rows", []):
        if str(row.get("status", "ok")).startswith(("wrong", "failed", "crashed", "out of memory")):
            yield f"\n* {row['part']} {row['item']}: {row['status']}"


def _targets(result: dict[str, Any]) -> Iterator[str]:
    rows = [one for one in targets() if one.kind == result["device"]["kind"]]
    yield "\n### Targets\n\n| target | wanted | measured | |\n| --- | --- | --- | --- |"
    for one in rows:
        case = find(result, one.case)
        value = None if case is None else one.measured(case)
        sign = "at least" if one.at_least else "at most"
        verdict = "" if value is None else "met" if one.met(value) else "**missed**"
        if case is not None and value is not None and turns(case) < ENOUGH_TURNS:
            verdict = f"no verdict: turns are {turns(case)}"
        found = ("not measured" if value is None else f"{value:.2f}", verdict)
        yield f"| {one.text} | {sign} {one.bound:.2f} | {found[0]} | {found[1]} |"


def _cases(cases: list[dict[str, Any]], wanted: list[dict[str, Any] | None]) -> Iterator[str]:
    """Shows the first case and those of targets, and folds the others away."""
    measured = [case for case in cases if "contenders" in case]
    shown = [case for case in measured if case is measured[0] or any(case is one for one in wanted)]
    for case in shown:
        yield from _case(case)
    folded = [case for case in measured if not any(case is one for one in shown)]
    if folded:
        # markdown="1": the site renders what is inside as well; GitHub does so by itself.
        yield f'\n<details markdown="1"><summary>Other gates and sizes ({len(folded)})</summary>'
        for case in folded:
            yield from _case(case)
        yield "\n</details>"
    for status in dict.fromkeys(case["status"] for case in cases if "contenders" not in case):
        names = "; ".join(title(case) for case in cases if case.get("status") == status and "contenders" not in case)
        yield f"\n{status[0].upper()}{status[1:].replace(': ', ', ')}: {names}."


def _case(case: dict[str, Any]) -> Iterator[str]:
    yield f"\n**{title(case)}**; floor {seconds(case['floor_s'])}"
    base, floor = eager(case), timed(case).get(FLOOR)
    yield (
        "\n| contender | time | times eager's speed | times the products | memory | predicted time, memory | floor | "
        "error |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    order = sorted(case["contenders"].items(), key=lambda item: item[1].get("median_s") or float("inf"))
    for name, one in order:
        median = one.get("median_s")
        if not median:
            yield f"| {name} | {one['status']} | | | | | | |"
            continue
        cells = [
            f"{seconds(median)} ({_spread(one)}{one['turns']})",
            f"{base[1] / median:.2f}" if base else "",
            f"{median / floor['median_s']:.2f}" if floor else "",
            memory(one.get("peak_bytes")),
            f"{seconds(one['predicted_s'])}, {memory(one['predicted_bytes'])}" if "predicted_s" in one else "",
            f"{100 * case['floor_s'] / median:.0f} %",
            f"{one['error']:.1e}" if one.get("error") is not None else "",
        ]
        bold = "**" * name.startswith("ours")
        yield f"| {bold}{name}{bold} | {' | '.join(cells)} |"


def _spread(one: dict[str, Any]) -> str:
    return f"{seconds(one['p20_s'])} to {seconds(one['p80_s'])}; " if one["turns"] > 1 else "turns: "


def _growth(result: dict[str, Any], plots: list[str]) -> Iterator[str]:
    found = list(exponents(result))
    if not found:
        return
    yield "\n### How it grows\n"
    yield from (f"![{name.rpartition('-')[2].removesuffix('.svg')} against each size]({name})" for name in plots)
    base = next(case for case in result["cases"] if case["sweep"] == SWEEPS[0])
    yield (
        f"\nOne size varies, the others stay (n_tokens {_common(result, 'n_tokens')}, d_in {base['d_in']}, "
        f"d_sae {_common(result, 'd_sae')}, (3, 2) shared; groups at (5, 4)). Exponents: the slope on logarithmic axes "
        "over the larger half of the sizes; time, then memory.\n"
    )
    names = list(dict.fromkeys(name for _, name, _, _ in found))
    yield f"| contender | {' | '.join(SWEEPS)} |\n| --- |{' --- |' * len(SWEEPS)}"
    table = {(sweep, name, what): slope for sweep, name, what, slope in found}
    for name in names:
        cells = []
        for sweep in SWEEPS:
            pair = [table.get((sweep, name, what)) for what in ("median_s", "peak_bytes")]
            cells.append(", ".join("-" if one is None else f"{one:.2f}" for one in pair))
        yield f"| {name} | {' | '.join(cells)} |"


def _common(result: dict[str, Any], name: str) -> int:
    other = next(sweep for sweep in SWEEPS if sweep != name)
    return next(case[name] for case in result["cases"] if case["sweep"] == other)


def _unmeasured() -> Iterator[str]:
    yield "\n## GPU: not measured\n"
    yield (
        "`make bench-gpu`, or `make gpu-check` in ten minutes with nothing installed, fills this section. Until then "
        "there are predictions of the cost model with estimated ceilings of an H100 (bf16, without Adam; the sparse "
        f"step at an l0 of {SPARSE_L0} and a support of {SPARSE_SUPPORT} entries for every active code), and nothing "
        "measured.\n"
    )
    yield (
        "| step | eager | torch.compile | ours, split | ours, fused | ours, sparse | measured |\n| --- |" + " --- |" * 6
    )
    for n, d_in, d_sae in ((4096, 768, 24576), (4096, 2304, 65536), (8192, 4096, 131072)):
        for (degree, groups), name in ((SHARED, "shared"), (FEATURE, "per feature")):
            active = SPARSE_L0 / d_sae
            step = Step(
                n, d_in, d_sae, *degree, shared=groups == 1, active=active, support=SPARSE_SUPPORT * active
            )  # fmt: skip
            ways = ("eager", "compiled", "split", "fused", "sparse")
            found = [cost(step, one).seconds(CEILINGS["H100"]) for one in ways]
            yield f"| {n} x {d_in} x {d_sae}, {degree} {name} | {' | '.join(map(seconds, found))} | not measured |"
    yield "\n### Targets\n\n| target | wanted | measured |\n| --- | --- | --- |"
    for one in targets():
        if one.kind == "cuda":
            yield f"| {one.text} | {'at least' if one.at_least else 'at most'} {one.bound:.2f} | not measured |"


SPARSE_L0, SPARSE_SUPPORT = 64, 2.1
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
README_COLUMNS = (
    "eager, Horner",
    "torch.compile",
    "SAELens JumpReLU",
    "ours",
    "ours, chunked",
    "ours, streamed",
    FLOOR,
)


def readme_table(results: dict[str, dict[str, Any]]) -> str:
    """Whole steps at the largest sizes: time and transient memory of the main contenders."""
    lines = [
        f"| training step | {' | '.join(README_COLUMNS)} |",
        f"| --- |{' --- |' * len(README_COLUMNS)}",
    ]
    wanted = [(one.kind, one.case) for one in targets() if one.text.endswith("times faster than eager")]
    seen: list[Any] = []
    for kind, wanted_case in wanted:
        if wanted_case in seen or wanted_case["work"] != "step":
            continue
        seen.append(wanted_case)
        of_kind = [one for one in results.values() if one["device"]["kind"] == kind]
        if not of_kind:
            if not any(line.startswith(f"| {DEVICES[kind]}") for line in lines):
                lines.append(f"| {DEVICES[kind]}: not measured yet |{' |' * len(README_COLUMNS)}")
            continue
        case = next((case for one in of_kind if (case := find(one, wanted_case))), None)
        name = plainly(case or wanted_case)
        cells = [_short(timed(case).get(column)) if case else "not measured" for column in README_COLUMNS]
        if case and turns(case) < ENOUGH_TURNS:
            name += f" (turns: {turns(case)})"
        lines.append(f"| {DEVICES[kind]}: {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "Loss, backward and Adam; median time and transient memory (beyond weights, gradients and optimiser state). "
        "All contenders, sizes and settings, also where we lose: [benchmarks](benchmarks.md).",
    ]
    return "\n".join(lines)


def plainly(case: dict[str, Any]) -> str:
    """A whole step's sizes in words; with n_tokens if known."""
    tokens = f"{case['n_tokens']} tokens, " if "n_tokens" in case else ""
    sets = "shared" if case["groups"] == 1 else "per feature"
    p, q = case["degree"]
    return f"{tokens}d_in {case['d_in']}, d_sae {case['d_sae']}, ({p}, {q}) {sets}, {case['dtype']}"


def _short(one: dict[str, Any] | None) -> str:
    return "-" if one is None else f"{seconds(one['median_s'])}, {memory(one.get('peak_bytes'))}"


def seconds(value: float) -> str:
    """Formats a time."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def memory(value: float | None) -> str:
    """Formats a number of bytes; an empty string for None."""
    if value is None:
        return ""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"
