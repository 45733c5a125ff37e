"""Tables of `rsae known`: how well each SAE detects the known features, and its error."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rsae_triton.report.fronts import interval, spread, student

SCORES = {"f1": ".3f", "mcc": ".3f", "precision": ".3f", "recall": ".3f", "mse": ".2f", "alive_fraction": ".3f"}
TITLES = {"f1": "F1", "mcc": "MCC", "alive_fraction": "alive"}
SETTING = ("data", "teacher", "l0", "correlation", "d_sae")


def summarise_known(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per setting (everything but the seed): means over seeds, and differences to the teacher, paired by seed
    with a Student interval (relative for mse)."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for cell in cells:
        groups[tuple(cell["cell"][name] for name in SETTING)].append(cell)
    rows = []
    for setting, members in groups.items():
        names = [name for name in members[0]["scores"] if all(name in one["scores"] for one in members)]
        rows.append(
            {
                **dict(zip(SETTING, setting, strict=True)),
                "seeds": [one["cell"]["seed"] for one in members],
                "scores": {
                    name: {
                        metric: spread([one["scores"][name][metric] for one in members]) for metric in (*SCORES, "l0")
                    }
                    for name in names
                },
                "to_teacher": {
                    name: {metric: _to_teacher(members, name, metric) for metric in SCORES}
                    for name in names
                    if name != "teacher"
                },
            }
        )
    return rows


def _to_teacher(members: Sequence[Mapping[str, Any]], name: str, metric: str) -> dict[str, Any]:
    pairs = [(one["scores"][name][metric], one["scores"]["teacher"][metric]) for one in members]
    return student([ours / theirs - 1 if metric == "mse" else ours - theirs for ours, theirs in pairs])


def known_tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown with a table for every setting."""
    parts = []
    for row in rows:
        title = f"{row['teacher']}, l0 {row['l0']:g}, correlation {row['correlation']:g}, {row['data']} data"
        header = [
            "SAE",
            *(TITLES.get(name, name) for name in SCORES),
            "F1 - teacher (95 %)",
            "MCC - teacher",
            "mse - teacher",
        ]
        lines = [
            f"## {title}, {len(row['seeds'])} seeds\n",
            "| " + " | ".join(header) + " |",
            "|" + "---|" * len(header),
        ]
        for name, scores in row["scores"].items():
            line = [name, *(f"{scores[metric]['mean']:{digits}}" for metric, digits in SCORES.items())]
            for metric in ("f1", "mcc", "mse"):
                difference = row["to_teacher"].get(name, {}).get(metric)
                line.append(interval(difference, relative=metric == "mse", better=-1 if metric == "mse" else 1))
            lines.append("| " + " | ".join(line) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
