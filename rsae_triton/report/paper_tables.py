"""The paper's two tables (arXiv:2606.14990, reconstruction and downstream), with a row for every control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rsae_triton.report.fronts import different, interval, with_sd
from rsae_triton.report.style import NAMES

RECONSTRUCTION = {"mse": ".2f", "fvu": ".4f", "cosine": ".4f", "l0": ".1f", "l1": ".1f", "alive_fraction": ".3f"}
DOWNSTREAM = {"delta_ce": ".3f", "loss_recovered": ".4f", "kl": ".3f"}
TITLES = {"alive_fraction": "alive", "delta_ce": "delta CE", "loss_recovered": "loss recovered", "kl": "KL"}


def paper_tables(rows: Sequence[Mapping[str, Any]], published: Mapping[str, Any]) -> str:
    """Markdown: both tables at equal l0, mean and standard deviation over seeds, and the paper's numbers.

    Args:
        rows: of `fronts.summarise`. published: the paper's [teacher, RSAE] by family and metric.
    """
    parts = ["# Reconstruction, at the teacher's l0\n", _table(rows, RECONSTRUCTION)]
    if any("delta_ce" in row["scores"]["teacher"]["matched"] for row in rows):
        parts += ["\n# Downstream, at the teacher's l0\n", _table(rows, DOWNSTREAM)]
    if published:
        parts += ["\n# What arXiv:2606.14990 reports for this host\n", _published(published)]
    return "\n".join(parts) + "\n"


def _table(rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, str]) -> str:
    main = next(iter(metrics))
    header = ["place", "d_sae", "teacher", "SAE", *(TITLES.get(name, name) for name in metrics), "RSAE against it"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    rows = sorted(rows, key=lambda r: (r["hook_name"], r["d_sae"], str(r["teacher"]), r["l0"]["mean"]))
    for row, training in zip(rows, different(rows), strict=True):
        for name, kinds in row["scores"].items():
            scores = kinds["matched"]
            line = [row["hook_name"], f"{row['d_sae']}", teacher_name(row["teacher"]) + training, NAMES.get(name, name)]
            line += [with_sd(scores[metric], digits) if metric in scores else "" for metric, digits in metrics.items()]
            line.append(interval(row["against"].get(main, {}).get(name), relative=main == "mse"))
            lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def _published(published: Mapping[str, Any]) -> str:
    lines = ["| teacher | metric | teacher | RSAE |", "|---|---|---|---|"]
    for family, metrics in published.items():
        for metric, (before, after) in metrics.items():
            lines.append(f"| {family} | {TITLES.get(metric, metric)} | {before} | {after} |")
    return "\n".join(lines)


def teacher_name(teacher: str) -> str:
    """A family's name as it is; of a folder or hub id, the part that distinguishes it."""
    return "/".join(Path(teacher).parts[-3:])
