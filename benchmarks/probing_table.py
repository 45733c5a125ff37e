"""Writes the table of docs/evaluation.md from the committed probing results.

    rsae probe out/demo/teacher out/demo/control out/demo/rsae --out probing.json
    python benchmarks/probing_table.py --results probing.json

copies the results to benchmarks/results/ and renders them; without --results it renders what is committed there.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rounds_table import ALL_NAMES, FAMILIES, lines_of

from rsae_triton.common.files import make_folder, write_text
from rsae_triton.report.fronts import interval, student

COMMITTED = Path("benchmarks/results/probing-smollm2.json")
PAGE = Path("docs/evaluation.md")
KEYS = {"fraction": -1, "carried": 1, "f1": 1}
"""What is shown of absorption, and whether less (-1) or more (1) of it is better."""


@dataclass(frozen=True)
class Options:
    results: Path | None = None


def table(results: dict[str, Any]) -> str:
    """The Markdown tables of what `rsae probe --out` wrote, and where it comes from."""
    meta = results["meta"]
    ks = list(results["mean"]["scores"])
    names = list(results["mean"]["scores"][ks[0]])
    lines = [
        f"Accuracy with k = {', '.join(ks)} features ({meta['model']}, {meta['hook']}).",
        "",
        f"| task | items | {' | '.join(names)} | all raw |",
        "|---|---|" + "---|" * (len(names) + 1),
    ]
    for task, found in results["tasks"].items():
        cells = [_accuracies(found["scores"], name) for name in names]
        every = found["all_raw_dimensions"]["accuracy"][0]
        lines.append(f"| {task} | {found['n_items']} | {' | '.join(cells)} | {every:.2f} |")
    means = [_accuracies(results["mean"]["scores"], name) for name in names]
    lines.append(f"| **mean** | | {' | '.join(means)} | |")
    lines += ["", "| mean difference in accuracy (95 %) | " + " | ".join(f"k = {k}" for k in ks) + " |"]
    lines.append("|---|" + "---|" * len(ks))
    for position, ours in enumerate(names):
        for theirs in names[:position]:
            cells = []
            for k in ks:
                mean, low, high = results["mean"]["paired"][k][ours][theirs]["accuracy"]
                text = f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
                cells.append(f"**{text}**" if low > 0 or high < 0 else text)
            lines.append(f"| {ours} - {theirs} | {' | '.join(cells)} |")
    lines.append("")
    for name, by_k in results["raw_wins"].items():
        won = [f"k = {k}: {', '.join(tasks)}" for k, tasks in by_k.items() if tasks]
        text = "; ".join(won) or "at no k"
        lines.append(f"- Raw dimensions beat {name}, the task's own interval excluding zero, on {text}.")
    lines += [
        "",
        f"`{meta['command']}`, {meta['machine']}, torch {meta['torch']}, {meta['date']}; seed {meta['seed']}, at most "
        f"{meta['items_per_label']} items of a label.",
    ]
    return "\n".join(lines)


def _accuracies(scores: dict[str, Any], name: str) -> str:
    return " ".join(f"{found[name]['accuracy'][0]:.2f}" for found in scores.values())


def absorption_table(results: dict[str, dict[str, Any]]) -> str:
    """By teacher and SAE, how much of words' first letters is absorbed, from what `rsae absorption --out` wrote."""
    titles = ("teacher", "SAE", "l0", "absorbed", "− teacher (95 %)", "carried", "by main", "main silent", "F1 of main")
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for family, result in results.items():
        for name, mean in result["mean"].items():
            difference = interval(result["to_first"].get(name, {}).get("fraction"), relative=False)
            line = [
                FAMILIES[family],
                ALL_NAMES[name],
                f"{result['l0'][name]:.1f}",
                f"{mean['fraction']:.3f}",
                difference,
            ]
            line += [f"{mean[key]:.3f}" for key in ("carried", "by_main", "silent", "f1")]
            lines.append("| " + " | ".join(line) + " |")
    one = next(iter(results.values()))
    meta, f1 = one["meta"], one["probe_f1"]
    words = f"{meta['n_test']:,} of {meta['n_words']:,} words held out, seed {meta['seed']}"
    probes = f"{len(f1)} letters; F1 of the probes on the activations {sum(f1) / len(f1):.3f}"
    where = f"`rsae absorption teacher teacher@2 ...`: {meta['model']}, {meta['hook']}; {words}; {probes}."
    return "\n".join([*lines, "", f"{where} {meta['machine']}, torch {meta['torch']}, {meta['date']}."])


def absorption_seeds_table(results: dict[str, dict[str, Any]]) -> str:
    """What a round does to teachers of other seeds, with nothing trained; seed 0 is that of `absorption_table`."""
    titles = ("teacher", "absorbed, by seed", "+ a round", "difference (95 %)", "carried", "F1 of main")
    rows = []
    for family, first in results.items():
        found = [first, *(json.loads(path.read_text()) for path in _other_seeds(family))]
        means = [(one["mean"]["teacher"], one["mean"]["teacher@2"]) for one in found]
        difference = {key: student([after[key] - before[key] for before, after in means]) for key in KEYS}
        line = [FAMILIES[family], *(", ".join(f"{pair[k]['fraction']:.3f}" for pair in means) for k in (0, 1))]
        rows.append([*line, *(interval(difference[key], relative=False, better=KEYS[key]) for key in KEYS)])
    note = (
        f"`rsae absorption teacher teacher@2`, {len(means)} seeds of the teacher, the same words; Student's intervals."
    )
    return "\n".join([*lines_of(titles, rows), "", note])


def _other_seeds(family: str) -> list[Path]:
    return sorted(COMMITTED.parent.glob(f"absorption-{family}-seed*.json"))


def absorbed() -> dict[str, dict[str, Any]]:
    """What is committed, by family of the teacher."""
    paths = {family: COMMITTED.with_name(f"absorption-{family}.json") for family in FAMILIES}
    return {family: json.loads(path.read_text()) for family, path in paths.items() if path.is_file()}


def main(options: Options) -> None:
    if options.results is not None:
        make_folder(COMMITTED.parent)
        write_text(COMMITTED, options.results.read_text(encoding="utf-8"))
    rendered = table(json.loads(COMMITTED.read_text()))
    pattern = r"(<!-- probing table:.*?-->\n).*?(<!-- /probing table -->)"
    text, count = re.subn(pattern, lambda m: f"{m[1]}{rendered}\n{m[2]}", PAGE.read_text(), flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{PAGE} has {count} places for the table; it must have one")
    write_text(PAGE, text)


if __name__ == "__main__":
    main(tyro.cli(Options))
