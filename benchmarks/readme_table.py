"""Writes the tables of README.md, docs/demo.md and docs/experiments.md from the committed results.

    rsae demo --figure docs/demo.svg && python benchmarks/readme_table.py --metrics out/demo/metrics.json

copies the demo's metrics to benchmarks/results/; without --metrics everything is rendered from what is committed there.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import bench_rounds
import language_table
import numpy as np
import probing_table
import rounds_table
import tyro

from rsae_triton.common.files import write_text
from rsae_triton.report.fronts import interval, one_each, paired, spread, student, with_sd, write_front
from rsae_triton.report.scores import paired_difference

COMMITTED = Path("benchmarks/results/demo-smollm2.json")
GRID = Path("benchmarks/results/reproduce-smollm2.json")
LONG = Path("benchmarks/results/reproduce-smollm2-long.json")
# By table and column.
FORMS = {
    "gate-forms": ("relu", "jumprelu", "topk"),
    "gate-forms-sparsity": ("relu-x2", "jumprelu-x2", "topk-x2"),
}
README, EXPERIMENTS, DEMO, ROUNDS = (
    Path("README.md"),
    *(Path(f"docs/{name}.md") for name in ("experiments", "demo", "rounds")),
)
FORMATS = Path("docs/formats.md")
# Families of the layouts in docs/formats.md, as far as a layout has one; the rest are sweeps over several.
LAYOUTS = {
    "jumprelu": ("gemma_2", "gemma_3", "llama_scope", "llama_scope_r1_distill"),
    "topk": ("qwen_scope",),
    "relu": (),
}
FAMILY_NAMES = {"jumprelu": "JumpReLU", "topk": "TopK", "relu": "ReLU"}
NAMES = {
    "teacher": "teacher",
    "rounds": "**teacher + a round, nothing trained**",
    "init": "RSAE, stage 1, one round",
    "rsae": "**RSAE**, trained with one round",
    "rsae-rounds": "**RSAE + a round**, added after training",
    "control": "control: teacher, same steps",
    "rectangle": "second control: JumpReLU's rectangle in place of the rational, same recipe",
    "rectangle-rounds": "the same + a round, added after training",
}


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
        if key not in metrics:
            continue
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
    paired = paired_difference(metrics, "delta_ce")
    nats = "" if paired is None else "; Δ CE differs by {:+.3f} ({:+.3f} to {:+.3f}, paired by sequence)"
    l0 = metrics["teacher"]["l0"]
    lines += [
        "",
        f"The RSAE's error at equal l0 ({l0:.2f} features a token) is {verdict} the control's"
        f"{nats.format(*(paired or ()))}. "
        f"{meta['model']}, {meta['hook']}, {meta['teacher']} teacher, {meta['configuration']['d_sae']} features; "
        f"{meta['train_tokens']:,} training and {meta['test_tokens']:,} held-out tokens, "
        f"{rsae['n_sequences']} spliced sequences, seed {meta['seed']} (one run); {meta['machine']}, "
        f"torch {meta['torch']}. mse is ||x - x_hat||^2 with x scaled to a mean norm of sqrt(d_in).",
    ]
    return "\n".join(lines)


def grid_table(result: dict[str, Any], sparsities: tuple[float, ...] | None = None) -> str:
    """A table.json of `rsae reproduce` in Markdown: a table of errors, one of Δ CE, and where they come from."""
    errors, nats = [], []
    rows = [row for row in result["rows"] if sparsities is None or row["sparsity"] in sparsities]
    for row in sorted(rows, key=row_order):
        equal = {name: kinds["matched"] for name, kinds in row["scores"].items()}
        against = row["against"]
        own = f"{FAMILY_NAMES[row['teacher']]}, layer {layer(row)}, {row['d_sae']:,}"
        errors.append([own, f"{row['l0']['mean']:.1f}"])
        errors[-1] += [mse_cell(equal, name) for name in ("teacher", "control", "rectangle", "rsae")]
        errors[-1] += [interval(against["mse"][name], relative=True) for name in ("control", "rectangle")]
        nats.append([*errors[-1][:2], *(with_sd(equal[name]["delta_ce"], ".3f") for name in ("control", "rsae"))])
        nats[-1].append(interval(against["delta_ce"]["control"], relative=False))
    titles = ("teacher, features", "l0", "teacher's mse", "control", "rectangle", "**RSAE**")
    first = rounds_table.lines_of((*titles, "RSAE − control (95 %)", "RSAE − rectangle"), errors)
    second = rounds_table.lines_of(("Δ CE", "l0", "control", "RSAE", "RSAE − control (95 %)"), nats)
    sparser = "@: the l0 of a code more than 1 % sparser than the teacher, which stays as it is. "
    sparser *= any(" @ " in line for line in first)
    return "\n".join([*first, "", *second, "", sparser + origin(result)])


def families_table(rounds: dict[str, Any], formats: str) -> str:
    """Three rows: what one more round, with nothing trained, does to a teacher of each family, and training on top."""
    titles = ("teacher", "share of public SAEs", "error (mse)", "loss added to the model (Δ CE, nats)")
    titles += ("trained too: error", "rectangle + a round", "control + a round")
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    rows = {row["teacher"]: row for row in rounds_table.ordered(rounds)}
    for name, label in FAMILY_NAMES.items():
        row = rows[name]
        scores = {code: kinds["matched"] for code, kinds in row["scores"].items()}
        members = one_each(cell for cell in rounds["cells"] if is_of(cell, row))
        line = [label, share(name, formats)]
        for metric, digits in (("mse", ".1f"), ("delta_ce", ".3f")):
            before, after = (scores[code][metric]["mean"] for code in ("teacher", "teacher@2"))
            found = student([relative(one, metric) for one in members])
            reach = f"({100 * found['low']:+.0f} to {100 * found['high']:+.0f})"
            line.append(f"{before:{digits}} → {after:{digits}}, **{100 * found['mean']:+.0f} %** {reach}")
        for code in ("rsae@2", "rectangle@2", "control@2"):
            found = row["pairs"]["mse"][code]["control"]
            line.append(f"{100 * found['mean']:+.1f} %")
        lines.append("| " + " | ".join(line) + " |")
    seeds = max(len(row["seeds"]) for row in rows.values())
    note = (
        "Error: squared distance to the activation. Δ CE: increase in cross-entropy when the reconstruction replaces "
        "it. Both: the teacher's → with one more round, **nothing trained**, at equal l0 (features per token); "
        f"{seeds} seeds, 95 % intervals (`{rounds['command']}`). Trained too: one round trained and one added, against "
        "the control. SmolLM2-135M, layer 16, 2,304 features, test split. Shares: [docs/formats.md](docs/formats.md)."
    )
    return "\n".join([*lines, "", note])


def relative(cell: dict[str, Any], metric: str) -> float:
    """The relative change that one more round makes to the teacher's score at equal l0."""
    scores = cell["scores"]["matched_l0"]
    return float(scores["teacher@2"][metric] / scores["teacher"][metric] - 1)


def share(family: str, formats: str) -> str:
    """Counts the SAEs in SAELens' registry whose layout has this family only, as docs/formats.md counts them."""
    rows = re.findall(r"^\| (\w+) \| [\d,]+ \| ([\d,]+) \| sae \|", formats, re.MULTILINE)
    counts = {name: int(number.replace(",", "")) for name, number in rows}
    own = sum(counts.get(layout, 0) for layout in LAYOUTS[family])
    return f"{100 * own / sum(counts.values()):.0f} %" if own else "most older ones"


def origin(result: dict[str, Any]) -> str:
    """Where the numbers of a table.json are from."""
    one = result["cells"][0]["cell"]
    seeds = {len(row["seeds"]) for row in result["rows"]}
    spread = (
        "mean ± standard deviation over seeds, differences paired by seed with a Student interval (bold: below zero)"
    )
    return (
        f"`{result['command']}`: {one['tokens']:,} training tokens, teachers of {one['plan']['steps']:,} steps, then "
        f"{one['steps']} steps for every contender, {one['batch_size']} tokens a step; test split, "
        f"{'one seed' if seeds == {1} else spread}. {', '.join(result['machine'])}, "
        f"torch {', '.join(result['torch'])}, {' and '.join(result['date'])}."
    )


def controls_table(result: dict[str, Any]) -> str:
    """The further controls of the places that have them: "thresholds", and "scratch" carried to the teacher's l0.

    A teacher that is trained for longer ends sparser, and no threshold makes a code denser: its scores are carried
    along the front of its family's teachers at that place (a power of l0, fitted to their means), as are the RSAE's.
    """
    found: dict[str, list[list[str]]] = {"mse": [], "delta_ce": []}
    for row in sorted(result["rows"], key=row_order):
        if "scratch" not in row["scores"]:
            continue
        equal = {name: kinds["matched"] for name, kinds in row["scores"].items()}
        slopes = {metric: front_slope(result["rows"], row, metric) for metric in ("mse", "delta_ce")}
        members = [carried(cell, slopes) for cell in result["cells"] if is_of(cell, row)]
        for metric, digits in (("mse", ".2f"), ("delta_ce", ".3f")):
            scratch = [one["scores"]["matched_l0"]["scratch"][metric] for one in members]
            line = [FAMILY_NAMES[row["teacher"]], f"{row['l0']['mean']:.1f}"]
            line += [with_sd(equal["thresholds"][metric], digits)]
            line += [f"{with_sd(equal['scratch'][metric], digits)} @ {equal['scratch']['l0']['mean']:.1f}"]
            line += [with_sd(spread(scratch), digits)]
            line += [with_sd(equal[name][metric], digits) for name in ("control", "rsae")]
            found[metric].append([*line, interval(paired(members, "scratch", metric), relative=metric == "mse")])
    titles = ("l0", "thresholds", "scratch", "carried to l0", "control", "**RSAE**", "RSAE − scratch (95 %)")
    first, second = (
        rounds_table.lines_of((name, *titles), found[metric]) for name, metric in (("mse", "mse"), ("Δ CE", "delta_ce"))
    )
    return "\n".join([*first, "", *second, "", origin(result)])


def is_of(cell: dict[str, Any], row: dict[str, Any]) -> bool:
    own = cell["hook_name"], cell["d_sae"], cell["cell"]["teacher"], cell["cell"]["sparsity"]
    return own == tuple(row[name] for name in ("hook_name", "d_sae", "teacher", "sparsity"))


def front_slope(rows: list[dict[str, Any]], row: dict[str, Any], metric: str) -> float:
    """The power of l0 with which the metric of a row's family falls, over its teachers' sparsities at that place."""
    same = [one for one in rows if all(one[name] == row[name] for name in ("hook_name", "d_sae", "teacher"))]
    points = [one["scores"]["teacher"]["matched"] for one in same]
    l0, value = (np.log([point[name]["mean"] for point in points]) for name in ("l0", metric))
    return float(np.polyfit(l0, value, 1)[0])


def carried(cell: dict[str, Any], slopes: dict[str, float]) -> dict[str, Any]:
    """A cell whose codes at equal l0 are carried to the teacher's l0 where they are sparser."""
    equal = cell["scores"]["matched_l0"]
    moved = {
        name: {metric: score[metric] * (equal["teacher"]["l0"] / score["l0"]) ** slopes[metric] for metric in slopes}
        for name, score in equal.items()
    }
    return {"scores": {"matched_l0": moved}}


def mse_cell(equal: dict[str, Any], name: str) -> str:
    """A code's mse at equal l0, with its l0 where it is sparser than the teacher to begin with."""
    l0, target = equal[name]["l0"]["mean"], equal["teacher"]["l0"]["mean"]
    return with_sd(equal[name]["mse"], ".2f") + (f" @ {l0:.1f}" if l0 < 0.99 * target else "")


def fronts(result: dict[str, Any]) -> None:
    """docs/front-*.svg: error against sparsity where the grid has several sparsities."""
    settings = [(row["hook_name"], row["d_sae"]) for row in result["rows"]]
    most = max(settings, key=settings.count)
    shown = ("teacher", "control", "rectangle", "rsae")
    rows = [
        {**row, "scores": {name: row["scores"][name] for name in shown}}
        for row, setting in zip(result["rows"], settings, strict=True)
        if setting == most
    ]
    rows.sort(key=family)
    for metric in ("mse", "delta_ce"):
        write_front(EXPERIMENTS.with_name(f"front-{metric.replace('_', '-')}.svg"), rows, metric)


def family(row: dict[str, Any]) -> int:
    """The place of the row's teacher in tables and plots."""
    return {"relu": 0, "jumprelu": 1, "topk": 2}.get(row["teacher"], 9)


def row_order(row: dict[str, Any]) -> tuple[float, ...]:
    """What the rows of tables are sorted by."""
    return family(row), -layer(row), -row["d_sae"], row["l0"]["mean"]


def layer(row: dict[str, Any]) -> int:
    return int(re.findall(r"\d+", row["hook_name"])[0])


def forms(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(Path(f"benchmarks/results/gate-forms-{name}.json").read_text())
    return result


def forms_table(results: dict[str, dict[str, Any]]) -> str:
    """One table of the gate-forms files by teacher family: mse @ l0 of every contender, mean over a file's seeds."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for family, result in results.items():
        for row in result["rows"]:
            found.setdefault(row["contender"], {}).setdefault(family, []).append(row["matched"])
    own = [f"{result['teacher']['mse']:.2f} @ {result['teacher']['l0']:.2f}" for result in results.values()]
    lines = ["| contender | " + " | ".join(results) + " |", "|" + "---|" * (1 + len(results))]
    lines.append("| the teacher, 1,000 steps | " + " | ".join(own) + " |")
    for name, families in found.items():
        cells = [mse_at_l0(families.get(family, [])) for family in results]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    one = next(iter(results.values()))
    lines += ["", f"{one['options']['steps']} steps, seed 1 where no spread is given; {one['machine']}."]
    return "\n".join(lines)


def mse_at_l0(scores: list[dict[str, Any]]) -> str:
    """ "mse @ l0", with the standard deviation of mse where there are several seeds; empty where there is none."""
    if not scores:
        return ""
    values = [one["mse"] for one in scores]
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread} @ {mean([one['l0'] for one in scores]):.2f}"


def place(path: Path, name: str, text: str) -> None:
    """Puts `text` between the markers `<!-- NAME table: ... -->` and `<!-- /NAME table -->` of a page."""
    pattern = rf"(<!-- {name} table:.*?-->\n).*?(<!-- /{name} table -->)"
    page, count = re.subn(pattern, lambda m: f"{m[1]}{text}\n{m[2]}", path.read_text(), flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{path} has {count} places for the {name} table; it must have one")
    write_text(path, page)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def tables() -> list[tuple[Path, str, str]]:
    """(page, name, text) of every table, from what is committed."""
    grid, second = read(GRID), read(language_table.SECOND)
    rounds, known = read(rounds_table.ROUNDS), read(rounds_table.KNOWN)
    trained = read(rounds_table.KNOWN_TRAINED)
    places = [row for row in rounds["rows"] if not rounds_table.is_main(row)]
    of_experiments = {
        "first-rounds": rounds_table.first_rounds_table(rounds),
        "first-known": rounds_table.first_known_table(known, trained),
        "first-trained": rounds_table.first_trained_table(rounds),
        "first-gate": rounds_table.first_gate_table(grid["rows"]),
        "untrained": rounds_table.untrained_table(rounds),
        "known": rounds_table.known_table(known),
        "known-trained": rounds_table.known_table(trained),
        "known-settings": rounds_table.settings_table(read(rounds_table.KNOWN_SETTINGS)),
        "known-synthsaebench": rounds_table.known_table(read(rounds_table.KNOWN_SYNTHSAEBENCH)),
        "probes": rounds_table.probes_table(rounds_table.probes()),
        "absorption": probing_table.absorption_table(probing_table.absorbed()),
        "absorption-seeds": probing_table.absorption_seeds_table(probing_table.absorbed()),
        "trained": rounds_table.trained_table(rounds),
        "language": language_table.language_table(read(language_table.LANGUAGE)),
        "places": rounds_table.places_table(places),
        "second": language_table.second_table(second),
        "second-trained": language_table.second_trained_table(read(language_table.SECOND_TRAINED)),
        "bound": rounds_table.bound_table(rounds),
        "grid": grid_table(grid),
        "controls": controls_table(grid),
        "long": rounds_table.places_table(read(LONG)["rows"]),
        **{name: forms_table({column: forms(column) for column in columns}) for name, columns in FORMS.items()},
    }
    return [
        (README, "families", families_table(rounds, FORMATS.read_text())),
        (DEMO, "demo", table(read(COMMITTED))),
        (ROUNDS, "time", bench_rounds.table(read(bench_rounds.RESULTS))),
        (ROUNDS, "weighed", language_table.weighed_table(second, rounds)),
        *((EXPERIMENTS, name, text) for name, text in of_experiments.items()),
    ]


def main(options: Options) -> None:
    if options.metrics is not None:
        write_text(COMMITTED, options.metrics.read_text(encoding="utf-8"))
    for page, name, text in tables():
        place(page, name, text)
    fronts(read(GRID))
    rounds_table.picture()


if __name__ == "__main__":
    main(tyro.cli(Options))
