"""Presents metrics.json: formatting, the best of each column, and the headline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rsae_triton.report.style import NAMES, roles_in

DASH = "–"
# Two codes count as at one l0 if they differ by less than this fraction.
L0_TOLERANCE = 0.01
Scores = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A score to show. better: -1 if low is good, 1 if high is good, 0 if neither."""

    key: str
    label: str
    digits: str
    better: int
    meaning: str


COLUMNS = (
    Column("mse", "mse", "#.4g", -1, "squared error of the reconstruction, summed over d_in, mean over tokens"),
    Column("fvu", "fvu", ".4f", -1, "fraction of variance unexplained: mse over the variance around the mean"),
    Column("cosine", "cosine", ".4f", 1, "cosine of activation and reconstruction"),
    Column("l0", "l0", ".2f", 0, "features active per token"),
    Column("l1", "l1", "#.4g", 0, "sum of code times decoder norm per token"),
    Column("alive_fraction", "alive", ".1%", 1, "features active on at least one held-out token"),
    Column(
        "delta_ce",
        "Δ ce",
        ".4f",
        -1,
        "increase in cross-entropy (nats per token) when the reconstruction replaces the activations",
    ),
    Column(
        "loss_recovered",
        "recovered",
        ".2%",
        1,
        "share of the increase in loss under zero ablation that the reconstruction avoids",
    ),
    Column(
        "loss_recovered_mean",
        "rec. (mean)",
        ".2%",
        1,
        "share of the increase in loss under mean ablation that the reconstruction avoids",
    ),
)


def number(scores: Scores, key: str) -> float:
    """The score, or NaN if it is missing, None or not a number."""
    value = scores.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def text(value: float, digits: str) -> str:
    """Formats a number with a true minus sign; an en dash for NaN and infinity."""
    return format(value, digits).replace("-", "−").replace("%", "\u00a0%") if math.isfinite(value) else DASH


def interval(scores: Scores) -> str:
    """The 95 % interval of delta_ce, or an empty string."""
    low, high = number(scores, "delta_ce_low"), number(scores, "delta_ce_high")
    return f"{text(low, '.4f')} to {text(high, '.4f')}" if math.isfinite(low) and math.isfinite(high) else ""


def best(metrics: Mapping[str, Any], column: Column) -> str | None:
    """Returns which of rsae and control is better in a column; None if they look equal or one is missing."""
    values = {role: number(metrics.get(role) or {}, column.key) for role in ("rsae", "control")}
    if not column.better or not all(map(math.isfinite, values.values())):
        return None
    if text(values["rsae"], column.digits) == text(values["control"], column.digits):
        return None
    return max(values, key=lambda role: column.better * values[role])


@dataclass(frozen=True)
class Cell:
    """A number as text, the interval under it, and whether it is the better of rsae and control."""

    text: str
    interval: str
    best: bool


def rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, list[Cell]]]:
    """The rows of the table, one per code: role, name, and cells in the order of COLUMNS."""
    winners = [best(metrics, column) for column in COLUMNS]
    table = []
    for role in roles_in(metrics):
        scores = metrics.get(role) or {}
        cells = [
            Cell(
                text(number(scores, column.key), column.digits),
                interval(scores) if column.key == "delta_ce" else "",
                winner == role,
            )
            for column, winner in zip(COLUMNS, winners, strict=True)
        ]
        table.append((role, NAMES[role], cells))
    return table


def headline(metrics: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Says in one sentence who wins at equal l0, and lists remarks of one sentence each.

    Args:
        metrics: metrics.json; parts that are missing are named or left out.
    """
    matched = metrics.get("matched_l0") or {}
    rsae, control, teacher = (matched.get(role) or {} for role in ("rsae", "control", "teacher"))
    first = _untrained(matched.get("rounds") or {}, teacher)
    ours, theirs = number(rsae, "mse"), number(control, "mse")
    if not (math.isfinite(ours) and math.isfinite(theirs) and theirs > 0):
        failed = "RSAE and control cannot be compared: at least one has no finite mse at equal l0."
        return (first, [failed]) if first else (failed, [])
    l0_ours, l0_theirs = number(rsae, "l0"), number(control, "l0")
    equal = abs(l0_ours - l0_theirs) <= L0_TOLERANCE * max(l0_ours, l0_theirs)
    where = f"At equal l0 ({l0_ours:.1f} features per token)"
    if not equal:
        where = f"At unequal l0 (RSAE {text(l0_ours, '.1f')}, control {text(l0_theirs, '.1f')})"
    change = (theirs - ours) / theirs
    numbers = f"mse {text(ours, '#.4g')} against {text(theirs, '#.4g')}"
    if abs(change) < 0.0005:
        sentence = f"{where} RSAE and control reconstruct equally well: {numbers}."
    elif change > 0:
        sentence = f"{where} the RSAE wins: its error is {text(change, '.1%')} below the control's ({numbers})."
    else:
        sentence = f"{where} the control wins: the RSAE's error is {text(-change, '.1%')} above it ({numbers})."
    notes = [] if equal else [_unequal(l0_ours, l0_theirs, ours, theirs)]
    notes += _against_teacher(ours, number(teacher, "mse"))
    notes += _against_rectangle(ours, matched.get("rectangle") or {})
    notes += _downstream(rsae, control, paired_difference(metrics, "delta_ce"))
    notes.append(
        "The control is the teacher itself, fine-tuned for as many steps on the same batches. All numbers come from "
        "one run and from text that no training has seen; another seed would give somewhat different ones."
    )
    return (first, [sentence, *notes]) if first else (sentence, notes)


def _untrained(rounds: Scores, teacher: Scores) -> str:
    """What an untrained round on the teacher changes; "" if there is none."""
    ours, theirs = number(rounds, "mse"), number(teacher, "mse")
    if not (math.isfinite(ours) and math.isfinite(theirs) and theirs > 0):
        return ""
    said = f"One more round on the teacher's own weights, without training: error {text(ours / theirs - 1, '+.1%')}"
    cost, before = number(rounds, "delta_ce"), number(teacher, "delta_ce")
    if math.isfinite(cost) and math.isfinite(before):
        said += f", cost in the language model {text(before, '.4f')} -> {text(cost, '.4f')} nats per token"
    return f"{said}, at l0 {text(number(rounds, 'l0'), '.1f')} (teacher {text(number(teacher, 'l0'), '.1f')})."


def _unequal(l0_ours: float, l0_theirs: float, ours: float, theirs: float) -> str:
    if not math.isfinite(l0_ours + l0_theirs):
        return "An l0 is missing, so this is not a comparison at equal sparsity."
    if (ours < theirs) == (l0_ours < l0_theirs):
        return "The winner uses fewer features, so the comparison holds all the more."
    return "The winner uses more features, so this does not settle which code is better."


def _against_teacher(ours: float, teacher: float) -> list[str]:
    if not (math.isfinite(teacher) and teacher > 0):
        return []
    change = (teacher - ours) / teacher
    word = "lower" if change >= 0 else "higher"
    return [f"Against the teacher as it was, the RSAE's error is {text(abs(change), '.1%')} {word}."]


def _against_rectangle(ours: float, rectangle: Scores) -> list[str]:
    theirs = number(rectangle, "mse")
    if not (math.isfinite(ours) and math.isfinite(theirs) and theirs > 0):
        return []
    change = (ours - theirs) / theirs
    worth = f"changes it by {text(change, '+.1%')}" if abs(change) >= 0.0005 else "makes no difference that shows"
    return [
        "The second control, trained by the same recipe with JumpReLU's rectangle in place of the rational, has an "
        f"error of {text(theirs, '#.4g')}: the rational gate itself {worth}."
    ]


def _downstream(rsae: Scores, control: Scores, paired: list[float] | None) -> list[str]:
    ours, theirs = number(rsae, "delta_ce"), number(control, "delta_ce")
    if not (math.isfinite(ours) and math.isfinite(theirs)):
        return []
    sentence = f"In the language model it costs {text(ours, '.4f')} nats per token, the control {text(theirs, '.4f')}"
    if paired is None:
        return [sentence + "."]
    mean, low, high = paired
    zero = ", which includes zero" if low <= 0 <= high else ""
    between = f"95\u00a0% interval {text(low, '+.4f')} to {text(high, '+.4f')}{zero}"
    return [f"{sentence}: a difference of {text(mean, '+.4f')}, paired by sequence ({between})."]


def paired_difference(metrics: Mapping[str, Any], key: str) -> list[float] | None:
    """RSAE minus control at equal l0 on the same text: mean, low and high of the 95 % interval; None if unknown."""
    found = metrics
    for name in ("paired", "matched_l0", "control", "rsae"):
        found = found.get(name) or {}
    ends = found.get(key)
    if not isinstance(ends, list) or len(ends) != 3 or not all(map(math.isfinite, ends)):
        return None
    mean, low, high = ends
    return [-mean, -high, -low]
