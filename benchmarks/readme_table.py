"""Writes the README's table from the committed metrics of the demo.

    rsae demo --figure docs/demo.svg && python benchmarks/readme_table.py --metrics out/demo/metrics.json

copies the metrics to benchmarks/results/ and renders them; without --metrics it renders what is committed there.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

COMMITTED = Path("benchmarks/results/demo-smollm2.json")
README = Path("README.md")
NAMES = {"teacher": "teacher", "init": "RSAE, stage 1", "rsae": "**RSAE**", "control": "control: teacher, same steps"}


@dataclass(frozen=True)
class Options:
    metrics: Path | None = None


def table(metrics: dict[str, Any]) -> str:
    """The Markdown table of a metrics.json, and one line on where it comes from."""
    lines = [
        "| code | mse @ l0, as shipped | mse at equal l0 | Δ CE at equal l0 (95 %) | loss recovered | alive |",
        "|---|---|---|---|---|---|",
    ]
    for key, name in NAMES.items():
        own, equal = metrics[key], metrics["matched_l0"][key]
        lines.append(
            f"| {name} | {own['mse']:.2f} @ {own['l0']:.2f} | {equal['mse']:.2f} | {equal['delta_ce']:.3f} "
            f"({equal['delta_ce_low']:.3f} to {equal['delta_ce_high']:.3f}) | {100 * equal['loss_recovered']:.1f} % "
            f"| {100 * own['alive_fraction']:.1f} % |"
        )
    meta = metrics["meta"]
    rsae, control = metrics["matched_l0"]["rsae"], metrics["matched_l0"]["control"]
    gain = 100 * (1 - rsae["mse"] / control["mse"])
    verdict = f"{gain:.1f} % below" if gain >= 0 else f"{-gain:.1f} % above"
    lines += [
        "",
        f"The RSAE's error at equal l0 ({metrics['teacher']['l0']:.2f} features a token) is {verdict} the control's. "
        f"{meta['model']}, {meta['hook']}, {meta['teacher']} teacher, {meta['configuration']['d_sae']} features; "
        f"{meta['train_tokens']:,} training and {meta['test_tokens']:,} held-out tokens, "
        f"{rsae['n_sequences']} spliced sequences, seed {meta['seed']} (one run); {meta['machine']}, "
        f"torch {meta['torch']}. mse is ||x - x_hat||^2 with x scaled to a mean norm of sqrt(d_in).",
    ]
    return "\n".join(lines)


def main(options: Options) -> None:
    if options.metrics is not None:
        COMMITTED.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(options.metrics, COMMITTED)
    rendered = table(json.loads(COMMITTED.read_text()))
    pattern = r"(<!-- demo table:.*?-->\n).*?(<!-- /demo table -->)"
    text, count = re.subn(pattern, lambda m: f"{m[1]}{rendered}\n{m[2]}", README.read_text(), flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{README} has {count} places for the table; it must have one")
    README.write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Options))
