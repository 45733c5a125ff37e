"""Tables and the picture of rounds in README.md and docs/experiments.md, from committed results.

rsae reproduce --host smollm2-rounds --out out/rounds   # its table.json is results/reproduce-smollm2-rounds.json
rsae known --data saelens --l0s 5 --out out/known       # its known.json is results/known-features.json
    (with --contenders rsae rsae@2 ... it is results/known-features-trained.json, with --data synthsaebench
    results/known-features-synthsaebench.json)
python benchmarks/bench_rounds.py              # measures, and writes benchmarks/results/rounds-time.json
python benchmarks/readme_table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench_rounds import COUNTS, ONE, PLAIN
from bench_rounds import RESULTS as TIME

from rsae_triton.common.files import write_text
from rsae_triton.report.fronts import interval, with_sd
from rsae_triton.report.svg import svg_file

RESULTS = Path("benchmarks/results")
ROUNDS, KNOWN = (RESULTS / f"{name}.json" for name in ("reproduce-smollm2-rounds", "known-features"))
KNOWN_TRAINED = RESULTS / "known-features-trained.json"
KNOWN_SETTINGS = RESULTS / "known-features-settings.json"
KNOWN_SYNTHSAEBENCH = RESULTS / "known-features-synthsaebench.json"
DATA = {
    "saelens": "sae_lens.synthetic",
    "synthsaebench": "sae_lens.synthetic with SynthSAEBench's settings",
    "planted": "our own",
}
ALIVE = "At least {:.1f} % of the features of every SAE are alive."
PICTURE = Path("docs/rounds.svg")
MAIN = ("blocks.16.hook_resid_pre", 2304, 1.0)
"""Place, width and sparsity of the teachers that every contender was made from."""
FAMILIES = {"jumprelu": "JumpReLU", "topk": "TopK", "relu": "ReLU"}
COLOURS = {"jumprelu": "#0b63ce", "topk": "#2d8a4e", "relu": "#c4361c"}
TRAINED = {
    "control": "control: the teacher, same steps",
    "control-compute": "control, as many seconds as two rounds trained",
    "control@2": "control + a round",
    "rectangle": "rectangle, one round",
    "rectangle@2": "rectangle's weights + a round",
    "rectangle-refined": "rectangle, two rounds trained",
    "rsae": "RSAE, one round",
    "rsae@2": "**RSAE + a round**",
    "refined": "RSAE, two rounds trained",
}

ALL_NAMES = {"teacher": "teacher", "teacher@2": "teacher + a round, nothing trained", **TRAINED}


def is_main(one: dict[str, Any]) -> bool:
    """Whether a row or a cell is of MAIN."""
    return (one["hook_name"], one["d_sae"], one.get("cell", one)["sparsity"]) == MAIN


def ordered(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the place that has every contender."""
    rows = [row for row in result["rows"] if is_main(row)]
    return sorted(rows, key=lambda row: list(FAMILIES).index(row["teacher"]))


def lines_of(titles: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles), *(f"| {' | '.join(row)} |" for row in rows)]


def untrained_table(result: dict[str, Any]) -> str:
    """What rounds do to a teacher with nothing trained: a table of errors and one of Δ CE, paired over seeds."""
    errors, nats = [], []
    for row in ordered(result):
        scores = {name: kinds["matched"] for name, kinds in row["scores"].items()}
        if "teacher@2" not in scores:
            continue
        mse, ce, kl = (row["pairs"].get(metric, {}) for metric in ("mse", "delta_ce", "kl"))
        errors.append([FAMILIES[row["teacher"]], f"{row['l0']['mean']:.1f}", with_sd(scores["teacher"]["mse"], ".2f")])
        errors[-1] += [interval(mse.get(f"teacher@{n}", {}).get("teacher"), relative=True) for n in COUNTS]
        nats.append([FAMILIES[row["teacher"]]])
        nats[-1] += [with_sd(scores[name]["delta_ce"], ".3f") for name in ("teacher", "teacher@2")]
        nats[-1].append(interval(ce.get("teacher@2", {}).get("teacher"), relative=False))
        nats[-1].append("; ".join(by_sequence(result, row["teacher"])))
        nats[-1].append(interval(kl.get("teacher@2", {}).get("teacher"), relative=False))
    first = lines_of(("teacher", "l0", "mse", "**+ 1 round**", "+ 2", "+ 3", "+ 5"), errors)
    titles = ("teacher", "Δ CE", "**+ 1 round**", "difference (95 %)", "of each seed, by sequence", "KL, difference")
    return "\n".join([*first, "", *lines_of(titles, nats), "", source(result)])


def first_rounds_table(result: dict[str, Any]) -> str:
    """The first page's table: what rounds do to a teacher with nothing trained, without intervals."""
    titles = ("teacher", "error (mse)", "+ 1 round", "+ 3 rounds", "+ 5 rounds", "Δ CE (nats)", "+ 1 round")
    lines, halves = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)], []
    for row in ordered(result):
        scores = {name: kinds["matched"] for name, kinds in row["scores"].items()}
        found = [row["pairs"]["mse"][name]["teacher"] for name in ("teacher@2", "teacher@4", "teacher@6")]
        halves += [100 * (one["high"] - one["low"]) / 2 for one in found]
        line = [FAMILIES[row["teacher"]], f"{scores['teacher']['mse']['mean']:.1f}"]
        line += [f"{100 * one['mean']:+.1f} %" for one in found]
        line += [f"{scores[name]['delta_ce']['mean']:.3f}" for name in ("teacher", "teacher@2")]
        lines.append("| " + " | ".join(line) + " |")
    note = f"Three seeds; no 95 % interval of a percentage is wider than ± {max(halves):.1f} points."
    return "\n".join([*lines, "", note])


def first_trained_table(result: dict[str, Any]) -> str:
    """The first page's table of training: one line a contender, a column a family, error against the control."""
    names = {
        "control": "control: the teacher, as many steps",
        "control-compute": "control, as much time as two rounds take",
        "rectangle": "JumpReLU's rectangle, one round",
        "rsae": "rational gate, one round",
        "teacher@2": "**nothing trained: teacher + a round**",
        "control@2": "control + an untrained round",
        "rectangle@2": "rectangle + an untrained round",
        "rsae@2": "rational gate + an untrained round",
        "rectangle-refined": "rectangle, trained through two rounds",
        "refined": "**rational gate, trained through two rounds**",
    }
    rows = {row["teacher"]: row for row in ordered(result)}
    titles = (
        "SAE",
        *(f"{label} error" for label in FAMILIES.values()),
        *(f"{label} Δ CE" for label in FAMILIES.values()),
    )
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for name, label in names.items():
        line = [label]
        for family in FAMILIES:
            found = rows[family]["pairs"]["mse"][name].get("control")
            line.append("0" if found is None else f"{100 * found['mean']:+.1f} %")
        for family in FAMILIES:
            score = rows[family]["scores"][name]["matched"]
            line.append(f"{score['delta_ce']['mean']:.3f}" if "delta_ce" in score else "")
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join([*lines, "", "Error: mse minus the control's. Δ CE in nats. Three seeds; intervals are below."])


def first_known_table(untrained: dict[str, Any], trained: dict[str, Any]) -> str:
    """The first page's table of features: F1 and MCC minus the teacher's, a line a contender, a column a family."""
    names = {
        "teacher@2": "**nothing trained: teacher + a round**",
        "control": "control",
        "control@2": "control + an untrained round",
        "rsae/gate": "rational gate, one round, only thresholds trained",
        "rsae": "rational gate, one round",
        "rsae@2": "rational gate + an untrained round",
        "refined": "**rational gate, trained through two rounds**",
    }
    found: dict[str, dict[str, Any]] = {family: {} for family in FAMILIES}
    for result in (untrained, trained):
        for row in result["rows"]:
            found[row["teacher"]] |= row["to_teacher"]
    titles = ("SAE", *(f"{label} F1" for label in FAMILIES.values()), *(f"{label} MCC" for label in FAMILIES.values()))
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for name, label in names.items():
        line = [f"{found[family][name][metric]['mean']:+.3f}" for metric in ("f1", "mcc") for family in FAMILIES]
        lines.append("| " + " | ".join([label, *line]) + " |")
    own = {row["teacher"]: row["scores"]["teacher"]["f1"]["mean"] for row in untrained["rows"]}
    own_f1 = ", ".join(f"{own[family]:.3f} ({label})" for family, label in FAMILIES.items())
    return "\n".join(
        [*lines, "", f"Differences to the teacher, whose F1 is {own_f1}. Three seeds; intervals are below."]
    )


def first_gate_table(rows: list[dict[str, Any]]) -> str:
    """The first page's table of the gate alone: an SAE of one round against both controls, from the grid."""
    titles = ("teacher", "l0", "rational − control", "rational − rectangle", "Δ CE: rational − control")
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in sorted((row for row in rows if is_main(row)), key=lambda row: list(FAMILIES).index(row["teacher"])):
        line = [FAMILIES[row["teacher"]], f"{row['l0']['mean']:.0f}"]
        line += [interval(row["against"]["mse"][name], relative=True) for name in ("control", "rectangle")]
        line.append(interval(row["against"]["delta_ce"]["control"], relative=False))
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join([*lines, "", "Three seeds with 95 % intervals; bold where the interval is below zero."])


def by_sequence(result: dict[str, Any], teacher: str) -> list[str]:
    """Returns, for every seed, the difference in Δ CE that one round makes, with its interval over the spliced
    sequences."""
    cells = [cell for cell in result["cells"] if cell["cell"]["teacher"] == teacher and is_main(cell)]
    found = [cell["scores"].get("to_teacher", {}).get("teacher@2", {}).get("delta_ce") for cell in cells]
    return [f"{mean:+.3f} ({low:+.3f} to {high:+.3f})" for mean, low, high in filter(None, found)]


def trained_table(result: dict[str, Any]) -> str:
    """What training adds: every contender at the teacher's l0, against the control and the rectangle, by family."""
    titles = ("teacher", "SAE", "mse", "− control (95 %)", "− rectangle, refined", "Δ CE", "Δ CE − control (95 %)")
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in ordered(result):
        for name, label in ALL_NAMES.items():
            if name not in row["scores"]:
                continue
            score, pairs = row["scores"][name]["matched"], row["pairs"]
            against = pairs["mse"].get(name, {})
            line = [FAMILIES[row["teacher"]], label, with_sd(score["mse"], ".2f")]
            line += [interval(against.get(base), relative=True) for base in ("control", "rectangle-refined")]
            line.append(with_sd(score["delta_ce"], ".3f") if "delta_ce" in score else "")
            line.append(interval(pairs["delta_ce"].get(name, {}).get("control"), relative=False))
            lines.append("| " + " | ".join(line) + " |")
    return "\n".join([*lines, "", source(result)])


def places_table(rows: list[dict[str, Any]]) -> str:
    """One row for each teacher: a table of errors and one of Δ CE."""
    after, spliced = (
        ("control@2", "rectangle@2", "rsae@2", "refined"),
        ("teacher", "teacher@2", "control", "rsae@2", "refined"),
    )
    errors, nats = [], []
    for row in sorted(rows, key=place_order):
        scores, pairs = {name: kinds["matched"] for name, kinds in row["scores"].items()}, row["pairs"]["mse"]
        seeds = f", {len(row['seeds'])} seeds" * (len(row["seeds"]) > 1)
        density = {0.5: ", half as dense", 2.0: ", twice as dense"}.get(row["sparsity"], "")
        own = f"{FAMILIES[row['teacher']]}, layer {row['hook_name'].split('.')[1]}, {row['d_sae']:,}{density}{seeds}"
        errors.append([own, f"{row['l0']['mean']:.1f}", with_sd(scores["teacher"]["mse"], ".2f")])
        errors[-1] += [interval(pairs.get(name, {}).get("teacher"), relative=True) for name in ("teacher@2", "control")]
        errors[-1] += [interval(pairs.get(name, {}).get("control"), relative=True) for name in after]
        nats.append([own])
        nats[-1] += [f"{scores[name]['delta_ce']['mean']:.3f}" if name in scores else "" for name in spliced]
    titles = ("teacher, features", "l0", "mse", "**+ 1 round**", "control", "control + a round")
    titles += ("rectangle + a round", "RSAE + a round", "RSAE, two rounds trained")
    first = lines_of(titles, errors)
    titles = ("Δ CE", "teacher", "**+ 1 round**", "control", "RSAE + a round", "RSAE, two rounds trained")
    note = "mse: '+ 1 round' and 'control' against the teacher, the four columns after them against the control."
    return "\n".join([*first, "", *lines_of(titles, nats), "", note])


def place_order(row: dict[str, Any]) -> tuple[Any, ...]:
    return list(FAMILIES).index(row["teacher"]), -row["sparsity"], row["hook_name"], -row["d_sae"]


def bound_table(result: dict[str, Any]) -> str:
    """How far from matching pursuit on the same dictionary."""
    cells = [cell for cell in result["cells"] if "pursuit" in cell]
    names = {"teacher": "teacher", **{f"teacher@{n}": f"+ {n - 1}" for n in COUNTS}, "pursuit": "matching pursuit"}
    lines = ["| teacher | l0 | " + " | ".join(names.values()) + " | negative codes of the pursuit |", "|" + "---|" * 8]
    for cell in sorted(cells, key=lambda one: list(FAMILIES).index(one["cell"]["teacher"])):
        found = cell["pursuit"]
        line = [FAMILIES[cell["cell"]["teacher"]], f"{found['l0']:.1f}"]
        line += [f"{found['mse'][name]:.2f}" if name in found["mse"] else "" for name in names]
        lines.append("| " + " | ".join([*line, f"{100 * found['negative']:.0f} %"]) + " |")
    tokens = cells[0]["pursuit"]["n_tokens"] if cells else 0
    return "\n".join([*lines, "", f"mse on the first {tokens:,} test tokens, seed 0; nothing trained."])


def known_table(result: dict[str, Any]) -> str:
    """F1 and MCC of detecting known features, and their differences to the teacher, paired over seeds."""
    titles = ("teacher", "l0", "SAE", "F1", "F1 − teacher (95 %)", "MCC − teacher", "precision", "recall")
    titles += ("mse − teacher",)
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    rows = sorted(result["rows"], key=lambda row: (list(FAMILIES).index(row["teacher"]), row["l0"]))
    for row in rows:
        for name, scores in row["scores"].items():
            differences = row["to_teacher"].get(name, {})
            line = [FAMILIES[row["teacher"]], f"{row['l0']:g}", known_name(name), with_sd(scores["f1"], ".3f")]
            line += [interval(differences.get(metric), relative=False, better=1) for metric in ("f1", "mcc")]
            line += [f"{scores[metric]['mean']:.3f}" for metric in ("precision", "recall")]
            line.append(interval(differences.get("mse"), relative=True))
            lines.append("| " + " | ".join(line) + " |")
    one = result["cells"][0]["cell"]
    count = max(len(row["seeds"]) for row in rows)
    seeds = f"{count} seeds" if count > 1 else "one seed"
    alive = min(1 - score["dead"] / one["d_sae"] for cell in result["cells"] for score in cell["scores"].values())
    return "\n".join(
        [
            *lines,
            "",
            f"`{result['command']}`: d_in {one['d_in']}, {one['n_features']:,} true features, {one['d_sae']} features; "
            f"{one['tokens']:,} tokens, teachers of {one['teacher_steps']:,} steps; data of {DATA[one['data']]}; at "
            f"the teacher's l0, {seeds}. " + (ALIVE.format(100 * alive) if alive < 1 else "All features are alive."),
        ]
    )


def settings_table(result: dict[str, Any]) -> str:
    """On other data: F1 - teacher of every way of having two rounds, and what training through them does."""
    ways = {
        "teacher@2": "untrained", "control@2": "control + 1", "rectangle@2": "rectangle + 1", "rsae@2": "RSAE + 1",
        "rectangle-refined": "rectangle, through", "refined": "**RSAE, through**",
    }  # fmt: skip
    titles = ("data", "teacher", "F1", *ways.values(), "MCC, RSAE, through", "mse, RSAE + 1", "mse, RSAE, through")
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for run in result["runs"]:
        for row in sorted(run["rows"], key=lambda row: list(FAMILIES).index(row["teacher"])):
            data = f"{row['data']}, l0 {row['l0']:g}" + (
                f", correlated {row['correlation']:g}" * bool(row["correlation"])
            )
            to = row["to_teacher"]
            line = [data, FAMILIES[row["teacher"]], f"{row['scores']['teacher']['f1']['mean']:.3f}"]
            line += [interval(to[name]["f1"], relative=False, better=1) for name in ways]
            line.append(interval(to["refined"]["mcc"], relative=False, better=1))
            line += [interval(to[name]["mse"], relative=True) for name in ("rsae@2", "refined")]
            lines.append("| " + " | ".join(line) + " |")
    commands = "; ".join(f"`{run['command']}`" for run in result["runs"])
    return "\n".join([*lines, "", f"F1, MCC and mse as differences to the teacher, three seeds. {commands}."])


def known_name(name: str) -> str:
    base, _, rounds = name.partition("@")
    base, _, trainable = base.partition("/")
    said = {"teacher": "teacher", "refined": "RSAE, two rounds trained", "rsae": "RSAE, one round"}.get(base, base)
    said += f", {trainable} only" if trainable else ""
    return said + (f" + {int(rounds) - 1} untrained" if rounds else "")


def probes_table(results: dict[str, dict[str, Any]]) -> str:
    """By family, the mean difference in accuracy to the teacher that rounds make, over the data sets."""
    lines = ["| teacher | rounds on top | k = 1 | k = 2 | k = 5 | k = 16 |", "|" + "---|" * 6]
    kinds = {
        "{}-2-rounds": ("1", "{}-teacher"),
        "{}-6-rounds": ("5", "{}-teacher"),
        "rsae@2": ("1, added after training", "teacher"),
        "refined": ("1, trained through both", "teacher"),
    }
    for family, result in results.items():
        for name, (label, base) in kinds.items():
            line = [FAMILIES[family], label]
            for k in ("1", "2", "5", "16"):
                pairs = result["mean"]["paired"][k][name.format(family)]
                mean, low, high = pairs[base.format(family)]["accuracy"]
                line.append(f"{mean:+.3f} ({low:+.3f} to {high:+.3f})")
            lines.append("| " + " | ".join(line) + " |")
    one = next(iter(results.values()))
    where = (
        f"`rsae probe TEACHER ROUNDS --sets ...`, {len(one['tasks'])} sets of sae-probes, "
        f"{one['meta']['items_per_label']} prompts of each label, seed 0"
    )
    return "\n".join([*lines, "", f"{where}; mean over the sets, intervals resample within them."])


def probes() -> dict[str, dict[str, Any]]:
    """What is committed, by family: rounds without training, and with training in files of their own."""
    found = {}
    for family in FAMILIES:
        untrained, trained = (
            json.loads((RESULTS / f"probing-{kind}-{family}.json").read_text()) for kind in ("rounds", "trained")
        )
        for k, pairs in trained["mean"]["paired"].items():
            untrained["mean"]["paired"][k] |= pairs
        found[family] = untrained
    return found


def source(result: dict[str, Any]) -> str:
    one = result["cells"][0]["cell"]
    return (
        f"`{result['command']}`: layer 16, 2,304 features, {one['tokens']:,} training tokens, teachers of "
        f"{one['plan']['steps']:,} steps, contenders of {one['steps']}; test split, at the teacher's l0, mean ± "
        "standard deviation over seeds, differences paired by seed with a Student interval (bold: better). "
        f"{', '.join(result['machine'])}, torch {', '.join(result['torch'])}, {' and '.join(result['date'])}."
    )


def picture() -> None:
    """docs/rounds.svg: error, F1 and time against the number of rounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 2.7), layout="constrained", facecolor="white")
    error, features, seconds = figure.subplots(1, 3)
    for row in ordered(json.loads(ROUNDS.read_text())):
        found = [(1, 0.0)] + [(n, 100 * row["pairs"]["mse"][f"teacher@{n}"]["teacher"]["mean"]) for n in COUNTS]
        draw(error, found, row["teacher"])
    for row in sorted(json.loads(KNOWN.read_text())["rows"], key=lambda row: list(FAMILIES).index(row["teacher"])):
        if row["l0"] == 5:
            found = [(1, 0.0)] + [(n, row["to_teacher"][f"teacher@{n}"]["f1"]["mean"]) for n in COUNTS]
            draw(features, found, row["teacher"])
    if TIME.is_file():
        for place, (d_sae, kinds) in enumerate(json.loads(TIME.read_text())["seconds"].items()):
            by, x = kinds["encode"], [1, *COUNTS]
            y = [by[name] / by[PLAIN] for name in (ONE, *(f"{n} rounds" for n in COUNTS))]
            seconds.plot(
                x, y, "o-", color=("#5b3fd0", "#a87500")[place], markersize=4, label=f"{int(d_sae):,} features"
            )
        seconds.legend(fontsize="small", frameon=False)
    error.set(title="error at the teacher's l0", ylabel="change to the teacher, %", xlabel="rounds")
    features.set(title="F1 on known features", ylabel="difference to the teacher", xlabel="rounds")
    seconds.set(title="time to encode", ylabel="times the teacher's encoder", xlabel="rounds", ylim=(0, None))
    error.legend(fontsize="small", frameon=False)
    for axes in (error, features, seconds):
        axes.grid(color="#d5d9de", linewidth=0.5)
        axes.set_xticks((1, *COUNTS))
    features.axhline(0, color="#24292e", linewidth=0.8)
    write_text(PICTURE, svg_file(figure, "rounds"))


def draw(axes: Any, points: list[tuple[int, float]], family: str) -> None:
    x, y = zip(*points, strict=True)
    axes.plot(x, y, "o-", color=COLOURS[family], markersize=4, linewidth=1.4, label=FAMILIES[family])
