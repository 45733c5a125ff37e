"""The table of docs/experiments.md that compares training with and without the language model in the loop.

rsae reproduce --host smollm2-kl --out out/kl    # its table.json is results/reproduce-smollm2-kl.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rounds_table import FAMILIES, lines_of

LANGUAGE = Path("benchmarks/results/reproduce-smollm2-kl.json")
LABELS = {
    "teacher": "teacher",
    "teacher@2": "teacher + a round, nothing trained",
    "control": "control",
    "control@2": "control + a round",
    "rsae": "RSAE, one round",
    "rsae@2": "RSAE + a round",
    "refined": "RSAE, two rounds trained",
}
COLUMNS = {"mse": ".2f", "delta_ce": ".3f", "kl": ".3f"}


def language_table(result: dict[str, Any]) -> str:
    """Every contender at the teacher's l0, trained by mse, and by mse and KL; what is not trained stands once."""
    by = {(row["teacher"], row["training"]["objective"]): row for row in result["rows"]}
    titles = ("teacher", "SAE", "mse", "with KL: mse", "Δ CE", "with KL: Δ CE", "KL", "with KL: KL")
    rows = []
    for family, label in FAMILIES.items():
        kinds = [by.get((family, objective)) for objective in ("mse", "mse+kl")]
        if None in kinds:
            continue
        for name, said in LABELS.items():
            line = [label, said]
            for metric, digits in COLUMNS.items():
                plain, ours = (row["scores"][name]["matched"][metric]["mean"] for row in kinds if row is not None)
                line += [f"{plain:{digits}}", f"{ours:{digits}}" if "teacher" not in name else ""]
            rows.append(line)
    seeds = sorted({seed for row in result["rows"] for seed in row["seeds"]})
    steps = result["rows"][0]["training"]["steps"]
    note = (
        f"`{result['command']}`: layer 16, 2,304 features, {steps} steps for every contender; test split, at the "
        f"teacher's l0, {'one seed' if len(seeds) == 1 else f'{len(seeds)} seeds'}. "
        f"{', '.join(result['machine'])}, torch {', '.join(result['torch'])}, {' and '.join(result['date'])}."
    )
    return "\n".join([*lines_of(titles, rows), "", note])
