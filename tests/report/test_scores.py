"""What the page and the terminal say about the numbers: who wins, what is missing, what is not comparable."""

from __future__ import annotations

import copy
import math

import pytest
from rich.console import Console

from rsae_triton.report import summary_table
from rsae_triton.report.scores import COLUMNS, best, headline, rows
from rsae_triton.report.style import NAMES


def metrics_of(rsae=60.0, control=64.0, l0=(50.0, 50.0), **downstream):
    base = {"mse": 70.0, "fvu": 0.3, "cosine": 0.9, "l0": 50.0, "l1": 20.0, "alive_fraction": 0.9, "n_tokens": 100}
    four = {
        "teacher": dict(base),
        "init": dict(base),
        "rsae": {**base, "mse": rsae, "l0": l0[0], **downstream},
        "control": {**base, "mse": control, "l0": l0[1], **downstream},
    }
    return {**four, "matched_l0": copy.deepcopy(four), "stage1": {"anything": 1}, "meta": None}


@pytest.mark.parametrize(
    ("rsae", "control", "said"),
    [
        (60.0, 64.0, "the RSAE wins: its error is 6.2\u00a0% below the control's (mse 60.00 against 64.00)"),
        (66.0, 60.0, "the control wins: the RSAE's error is 10.0\u00a0% above it (mse 66.00 against 60.00)"),
        (60.0, 60.01, "reconstruct equally well"),
    ],
)
def test_headline_says_who_wins(rsae, control, said):
    sentence, _ = headline(metrics_of(rsae, control))
    assert sentence.startswith("At equal l0 (50.0 features per token)")
    assert said in sentence


@pytest.mark.parametrize(
    ("l0", "said"), [((45.0, 50.0), "holds all the more"), ((50.0, 45.0), "does not settle which code is better")]
)
def test_unequal_l0_is_said(l0, said):
    sentence, notes = headline(metrics_of(l0=l0))
    assert sentence.startswith("At unequal l0")
    assert said in notes[0]


def test_teacher_can_be_the_better_one():
    assert any("14.3\u00a0% higher" in note for note in headline(metrics_of(rsae=80.0))[1])


def test_the_cost_in_the_language_model_is_compared_by_pairs():
    """The codes' own intervals may overlap where the paired difference is clear."""
    metrics = metrics_of(delta_ce=0.04, delta_ce_low=0.03, delta_ce_high=0.05)
    assert "control 0.0400." in next(note for note in headline(metrics)[1] if "nats" in note)
    metrics["paired"] = {"matched_l0": {"control": {"rsae": {"delta_ce": [0.01, 0.002, 0.018]}}}}
    note = next(note for note in headline(metrics)[1] if "nats" in note)
    assert "difference of −0.0100, paired by sequence (95\u00a0% interval −0.0180 to −0.0020)" in note
    metrics["paired"]["matched_l0"]["control"]["rsae"]["delta_ce"] = [-0.01, -0.03, 0.01]
    assert "+0.0300, which includes zero" in next(note for note in headline(metrics)[1] if "nats" in note)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "broken"])
def test_a_missing_number_is_a_dash_and_decides_nothing(value):
    metrics = metrics_of()
    metrics["matched_l0"]["rsae"]["mse"] = metrics["rsae"]["mse"] = value
    assert "cannot be compared" in headline(metrics)[0]
    assert best(metrics, COLUMNS[0]) is None
    assert rows(metrics)[2][2][0].text == "–"


def test_best_marks_the_better_direction():
    metrics = metrics_of()
    metrics["control"]["cosine"] = 0.95
    marked = {column.key: best(metrics, column) for column in COLUMNS}
    assert marked["mse"] == "rsae"
    assert marked["cosine"] == "control"
    assert marked["fvu"] is None  # equal
    assert marked["l0"] is None  # neither direction is better


def test_summary_table_fits_a_terminal():
    console = Console(width=80, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(summary_table(metrics_of(delta_ce=-0.04)))
    text = capture.get()
    assert "60.00" in text
    assert "−0.0400" in text
    assert "the RSAE wins" in text
    assert "…" not in text
    console.print(summary_table({}))


def test_the_untrained_round_is_the_first_line_of_the_headline():
    """With it the comparison of what was trained is the first note; without it nothing changes."""
    metrics = metrics_of()
    plain, notes = headline(metrics)
    told = copy.deepcopy(metrics)
    told["rounds"] = told["matched_l0"]["rounds"] = {**told["matched_l0"]["teacher"], "mse": 56.0}
    first, more = headline(told)
    assert first.startswith("One more round on the teacher's own weights, without training: error −20.0")
    assert more == [plain, *notes]
    names = [name for _, name, _ in rows(told)]
    assert names.index(NAMES["rounds"]) == names.index(NAMES["teacher"]) + 1
    assert len(names) == len(rows(metrics)) + 1
    console = Console(width=200, record=True)
    console.print(summary_table(told))
    shown = console.export_text()
    assert NAMES["rounds"] in shown
    assert "without training" in shown
    assert "the RSAE wins" in shown


def test_the_headline_compares_with_the_rectangle():
    metrics = metrics_of()
    told = copy.deepcopy(metrics)
    told["matched_l0"]["rectangle"] = {**told["matched_l0"]["rsae"], "mse": told["matched_l0"]["rsae"]["mse"] / 0.9}
    assert "the rational gate itself changes it by −10.0\u00a0%" in " ".join(headline(told)[1])
    assert "rectangle" not in " ".join(headline(metrics)[1])
