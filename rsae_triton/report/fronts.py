"""A sweep's table and plots: error against sparsity, and paired differences over seeds."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from rsae_triton.common.files import make_folder, write_text
from rsae_triton.report.style import COLOURS, DASHES, NAMES
from rsae_triton.report.svg import svg_file

METRICS = (
    *("mse", "fvu", "fvu_by_dimension", "cosine", "l0", "l1", "alive_fraction", "delta_ce", "loss_recovered", "kl"),
    *("negative", "dense_features", "size_p5", "size_p50", "size_p95"),
)
# Downstream scores exist only where sequences were spliced.
PAIRED = {"mse": "mse", "delta_ce": "Δ CE (nats)"}
# The contenders that every other one is compared with, as far as they are present.
BASES = ("teacher", "teacher@2", "init", "control", "control-compute", "control@2", "rectangle", "rectangle-refined",
         "rectangle@2", "rsae", "rsae@2", "thresholds", "scratch")  # fmt: skip


def summarise(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per setting (everything but the seed): mean and spread over seeds, and paired differences.

    Each row has `scores[contender][metric] = {mean, sd, n}` at equal l0 and as shipped, and
    `against[metric][contender] = {mean, low, high, n}`: the RSAE's difference to that contender, relative for mse
    and in nats for delta_ce, with a 95 % Student interval over seeds (none for one seed). Negative is better.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for cell in cells:
        place = cell["hook_name"], cell["d_sae"], cell["cell"]["teacher"], cell["cell"]["sparsity"]
        groups[*place, *training_of(cell["cell"]).values()].append(cell)
    rows = []
    for (hook, d_sae, teacher, sparsity, *_), some in groups.items():
        members = one_each(some)
        matched = members[0]["scores"]["matched_l0"]
        names = list(matched)
        rows.append(
            {
                "hook_name": hook,
                "d_sae": d_sae,
                "teacher": teacher,
                "sparsity": sparsity,
                "training": training_of(members[0]["cell"]),
                "seeds": [one["cell"]["seed"] for one in members],
                "l0": spread([one["scores"]["teacher"]["l0"] for one in members]),
                "scores": {
                    name: {
                        "matched": _all_metrics([one["scores"]["matched_l0"][name] for one in members]),
                        "shipped": _all_metrics([one["scores"][name] for one in members]),
                    }
                    for name in names
                },
                "against": {
                    metric: {
                        name: paired(members, name, metric)
                        for name in names
                        if name != "rsae" and metric in members[0]["scores"]["matched_l0"][name]
                    }
                    for metric in PAIRED
                    if metric in matched.get("rsae", {})
                },
                "pairs": {
                    metric: {
                        ours: {
                            theirs: paired(members, theirs, metric, ours)
                            for theirs in BASES
                            if theirs in names and theirs != ours and metric in matched[theirs]
                        }
                        for ours in names
                        if metric in matched[ours]
                    }
                    for metric in (*PAIRED, "kl")
                    if metric in matched["teacher"]
                },
            }
        )
    return rows


def training_of(cell: Mapping[str, Any]) -> dict[str, Any]:
    """How the contenders of a cell were trained: cells that differ here are of different rows."""
    usual = {"objective": "mse", "trainable": "all", "steps": 0, "batch_size": 0, "tokens": 0}
    teacher = (cell.get("plan") or {}).get("steps", 0)
    return {**{name: cell.get(name, value) for name, value in usual.items()}, "teacher_steps": teacher}


def different(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each row, the part of its training in which the rows differ, as ", mse+kl" or ", steps 100"."""
    known = [row.get("training", training_of({})) for row in rows]  # older results do not say
    names = [name for name in training_of({}) if len({one[name] for one in known}) > 1]
    return ["".join(f", {one[n]}" if n == "objective" else f", {n} {one[n]}" for n in names) for one in known]


def one_each(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Joins the cells of each seed into one: cells of the same setting and seed differ in their contenders.

    A contender that some seeds lack is left out, so that all means are over the same seeds.
    """
    joined: dict[int, dict[str, Any]] = {}
    for cell in cells:
        seed, scores = cell["cell"]["seed"], cell["scores"]
        before = joined.get(seed, {}).get("scores", {"matched_l0": {}})
        both = {**before, **{name: score for name, score in scores.items() if name not in before}}
        both["matched_l0"] = {**before["matched_l0"], **scores["matched_l0"]}
        joined[seed] = {**cell, **joined.get(seed, {}), "scores": both}
    everywhere = set.intersection(*(set(one["scores"]["matched_l0"]) for one in joined.values()))
    for one in joined.values():
        scores = one["scores"]
        equal = {name: score for name, score in scores["matched_l0"].items() if name in everywhere}
        one["scores"] = {**{name: scores[name] for name in equal}, "matched_l0": equal}
    return list(joined.values())


def _all_metrics(scores: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    everywhere = [metric for metric in METRICS if all(metric in one for one in scores)]
    return {metric: spread([one[metric] for one in scores]) for metric in everywhere}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation (None for a single value) of n values."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "sd": sd, "n": len(values)}


def paired(members: Sequence[Mapping[str, Any]], name: str, metric: str, ours: str = "rsae") -> dict[str, Any]:
    """Contender `ours` minus contender `name` at equal l0, seed by seed: relative for mse, absolute otherwise."""
    pairs = [(one["scores"]["matched_l0"][ours][metric], one["scores"]["matched_l0"][name][metric]) for one in members]
    return student([own / other - 1 if metric == "mse" else own - other for own, other in pairs])


def student(values: Sequence[float]) -> dict[str, Any]:
    """Mean of n values with its 95 % Student interval (no interval for a single value)."""
    differences = np.array(values)
    mean, n = float(differences.mean()), len(differences)
    if n < 2:
        return {"mean": mean, "low": None, "high": None, "n": n}
    half = float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / np.sqrt(n))
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def write_sweep_report(folder: Path, cells: Sequence[Mapping[str, Any]]) -> Path:
    """Writes sweep.json (all cells and the summary), sweep.md, and mse.svg and delta_ce.svg; returns sweep.md."""
    rows = summarise(cells)
    make_folder(folder)
    text = json.dumps({"rows": rows, "cells": list(cells)}, indent=1)
    write_text(folder / "sweep.json", text + "\n")
    for metric in PAIRED:
        if all(metric in cell["scores"]["teacher"] for cell in cells):
            write_front(folder / f"{metric}.svg", rows, metric)
    page = sweep_tables(rows)
    write_text(folder / "sweep.md", page)
    return folder / "sweep.md"


def sweep_tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: reconstruction and downstream at equal l0, and the RSAE's paired differences."""
    parts = ["## Reconstruction: mse at equal l0\n", _table(rows, "mse", ".2f")]
    if any("delta_ce" in row["scores"]["teacher"]["matched"] for row in rows):
        parts += ["\n## Downstream: delta CE at equal l0, nats\n", _table(rows, "delta_ce", ".3f")]
        parts += ["\n## Downstream: loss recovered at equal l0\n", _table(rows, "loss_recovered", ".4f")]
    parts += ["\n## Alive fraction, as shipped\n", _table(rows, "alive_fraction", ".3f", kind="shipped")]
    return "\n".join(parts) + "\n"


def _table(rows: Sequence[Mapping[str, Any]], metric: str, digits: str, kind: str = "matched") -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    others = [name for name in names if name not in ("rsae", "init", "teacher")]
    versus = [name for name in others if metric in PAIRED]
    header = ["hook", "d_sae", "teacher", "l0", *(NAMES.get(name, name) for name in names)]
    # For sweeps in which nothing is trained: what rounds change.
    pairs = [("rsae", name) if "rsae" in names else (name, "teacher") for name in versus]
    header += [f"{NAMES.get(ours, ours)} − {NAMES.get(theirs, theirs)}" for ours, theirs in pairs]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    rows = sorted(rows, key=lambda r: (r["hook_name"], r["d_sae"], str(r["teacher"]), r["l0"]["mean"]))
    for row, training in zip(rows, different(rows), strict=True):
        line = [row["hook_name"], f"{row['d_sae']}", Path(row["teacher"]).name + training, f"{row['l0']['mean']:.1f}"]
        for name in names:
            score = row["scores"].get(name, {}).get(kind, {}).get(metric)
            line.append("" if score is None else with_sd(score, digits))
        for ours, theirs in pairs:
            found = row["pairs"].get(metric, {}).get(ours, {}).get(theirs)
            line.append(interval(found, relative=metric == "mse"))
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def with_sd(score: Mapping[str, Any], digits: str) -> str:
    """Formats "mean ± sd", or the value alone if there is only one."""
    return f"{score['mean']:{digits}}" + ("" if score["sd"] is None else f" ± {score['sd']:{digits}}")


def interval(difference: Mapping[str, Any] | None, relative: bool, better: int = -1) -> str:
    """Formats a paired difference with its interval, in per cent if relative; bold if the whole interval is on the
    better side of zero (-1: below)."""
    if difference is None:
        return ""
    factor, digits, unit = (100, "+.1f", " %") if relative else (1, "+.3f", "")
    mean = f"{factor * difference['mean']:{digits}}{unit}"
    if difference["low"] is None:
        return mean
    low, high = factor * difference["low"], factor * difference["high"]
    shown = f"{mean} ({low:{digits}} to {high:{digits}})"
    return f"**{shown}**" if min(better * low, better * high) > 0 else shown


def write_front(path: Path, rows: Sequence[Mapping[str, Any]], metric: str) -> None:
    """Writes `front_figure` as an SVG; the same rows give the same file."""
    write_text(path, svg_file(front_figure(rows, metric), metric))


def front_figure(rows: Sequence[Mapping[str, Any]], metric: str) -> Any:
    """Plots a metric against l0: a panel per teacher family, a line per contender, bars of one standard deviation.

    Values are at the teacher's l0; a code that is sparser than the teacher is shown at its own l0.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    titles = [
        f"{Path(row['teacher']).name}, {row['hook_name']}, {row['d_sae']}{training}"
        for row, training in zip(rows, different(rows), strict=True)
    ]
    settings = list(dict.fromkeys(titles))
    columns = min(3, len(settings))
    lines = -(-len(settings) // columns)
    figure = Figure(figsize=(2.9 * columns, 2.6 * lines), layout="constrained")
    panels = np.atleast_1d(figure.subplots(lines, columns, squeeze=False)).ravel()
    for axes, setting in zip(panels, settings, strict=False):
        own = [row for row, title in zip(rows, titles, strict=True) if title == setting]
        own.sort(key=lambda row: row["l0"]["mean"])
        for name in dict.fromkeys(name for row in own for name in row["scores"]):
            points = [
                (matched["l0"]["mean"], matched[metric]["mean"], matched[metric]["sd"] or 0.0)
                for row in own
                if metric in (matched := row["scores"].get(name, {}).get("matched", {}))
            ]
            if not points:
                continue
            l0, value, sd = np.array(points).T
            axes.errorbar(
                l0, value, yerr=sd, marker="o", markersize=3, linewidth=1.3, capsize=2,
                color=COLOURS.get(name, "#777777"), linestyle=DASHES.get(name, ":"), label=NAMES.get(name, name),
            )  # fmt: skip
        axes.set(title=setting, xlabel="l0", ylabel=PAIRED[metric])
        axes.title.set_fontsize("small")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(color=COLOURS["grid"], linewidth=0.5)
    for axes in panels[len(settings) :]:
        axes.remove()
    panels[0].legend(fontsize="small", frameon=False)
    return figure
