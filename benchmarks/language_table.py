"""The tables of the documentation that say what a language model loses.

rsae reproduce --host smollm2-kl --out out/kl    # each table.json is results/reproduce-HOST.json
rsae reproduce --host gemma3-270m --out out/gemma
rsae reproduce --host gemma3-270m-trained --out out/gemma
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rounds_table import FAMILIES, is_main, lines_of, place_order

from rsae_triton.report.fronts import interval, with_sd

RESULTS = Path("benchmarks/results")
LANGUAGE = RESULTS / "reproduce-smollm2-kl.json"
SECOND, SECOND_TRAINED = RESULTS / "reproduce-gemma3-270m.json", RESULTS / "reproduce-gemma3-270m-trained.json"
LABELS = {
    "teacher": "teacher",
    "teacher@2": "teacher + a round, nothing trained",
    "control": "control",
    "control@2": "control + a round",
    "control@2w": "control + a weighed round",
    "rsae": "RSAE, one round",
    "rsae@2": "RSAE + a round",
    "rsae@2w": "RSAE + a weighed round",
    "refined": "RSAE, two rounds trained",
    "rectangle-refined": "rectangle, two rounds trained",
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
        for name in (one for one in LABELS if all(row is not None and one in row["scores"] for row in kinds)):
            line = [label, LABELS[name]]
            for metric, digits in COLUMNS.items():
                plain, ours = (row["scores"][name]["matched"][metric]["mean"] for row in kinds if row is not None)
                line += [f"{plain:{digits}}", f"{ours:{digits}}" if "teacher" not in name else ""]
            rows.append(line)
    steps = result["rows"][0]["training"]["steps"]
    note = (
        f"`{result['command']}`: layer 16, 2,304 features, {steps} steps for every contender; test split, at the "
        f"teacher's l0, {seeds_of(result)}. {origin(result)}"
    )
    return "\n".join([*lines_of(titles, rows), "", note])


def seeds_of(result: dict[str, Any]) -> str:
    seeds = {seed for row in result["rows"] for seed in row["seeds"]}
    return "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"


def origin(result: dict[str, Any]) -> str:
    machine = ", ".join(result["machine"])
    return f"{machine}, torch {', '.join(result['torch'])}, {' and '.join(result['date'])}."


def weighed_table(gemma: dict[str, Any], smollm2: dict[str, Any]) -> str:
    """A plain round and one that weighs dimensions, on two models, with nothing trained."""
    titles = ("model", "teacher", "Δ CE", "plain round", "weighed round", "mse", "plain round", "weighed round")
    rows = []
    for model, found in (
        ("Gemma 3 270M", gemma["rows"]),
        ("SmolLM2", [one for one in smollm2["rows"] if is_main(one)]),
    ):
        for row in sorted(found, key=place_order):
            if "teacher@2w" not in row["scores"]:
                continue
            line = [model, FAMILIES[row["teacher"]]]
            for metric, digits in (("delta_ce", ".3f"), ("mse", ".2f")):
                line.append(with_sd(row["scores"]["teacher"]["matched"][metric], digits))
                pairs = row["pairs"][metric]
                line += [interval(pairs[name]["teacher"], metric == "mse") for name in ("teacher@2", "teacher@2w")]
            rows.append(line)
    note = (
        f"Differences to the teacher at its l0, {seeds_of(gemma)}, test split; Δ CE in nats. `{gemma['command']}` (32 "
        f"spliced sequences) and `{smollm2['command']}` (48). {origin(gemma)}"
    )
    return "\n".join([*lines_of(titles, rows), "", note])


def second_table(result: dict[str, Any]) -> str:
    """What rounds do to teachers of another model, with nothing trained."""
    titles = ("teacher", "SAE", "l0", "alive", "mse", "error by dimension", "Δ CE", "Δ CE − teacher (95 %)", "KL")
    names = {"teacher": "teacher", "teacher@2": "+ a round", "teacher@2w": "+ a weighed round"}
    rows = []
    for row in sorted(result["rows"], key=place_order):
        for name, label in names.items():
            score = row["scores"][name]["matched"]
            line = [FAMILIES[row["teacher"]], label, f"{score['l0']['mean']:.1f}"]
            line.append(f"{100 * score['alive_fraction']['mean']:.1f} %")
            line += [with_sd(score[metric], digits) for metric, digits in (("mse", ".2f"), ("fvu_by_dimension", ".3f"))]
            line.append(with_sd(score["delta_ce"], ".3f"))
            line.append(interval(row["pairs"]["delta_ce"][name].get("teacher"), relative=False))
            rows.append([*line, with_sd(score["kl"], ".3f")])
    note = (
        f"`{result['command']}`, nothing trained, test split, {seeds_of(result)}, {sequences(result)} spliced "
        f"sequences. {origin(result)}"
    )
    return "\n".join([*lines_of(titles, rows), "", note])


def second_trained_table(result: dict[str, Any]) -> str:
    """What training adds to teachers of another model."""
    titles = ("teacher", "SAE", "mse", "− control", "Δ CE", "KL", "alive")
    rows = []
    for row in sorted(result["rows"], key=place_order):
        control = row["scores"]["control"]["matched"]["mse"]["mean"]
        for name in (one for one in LABELS if one in row["scores"]):
            score = row["scores"][name]["matched"]
            line = [FAMILIES[row["teacher"]], LABELS[name], f"{score['mse']['mean']:.2f}"]
            line.append("" if name == "control" else f"{100 * (score['mse']['mean'] / control - 1):+.1f} %")
            line += [f"{score[one]['mean']:.3f}" if one in score else "" for one in ("delta_ce", "kl")]
            rows.append([*line, f"{100 * score['alive_fraction']['mean']:.1f} %"])
    note = f"`{result['command']}`, test split, at the teacher's l0, {seeds_of(result)}. {origin(result)}"
    return "\n".join([*lines_of(titles, rows), "", note])


def sequences(result: dict[str, Any]) -> int:
    return int(result["cells"][0]["cell"]["sequences"])
