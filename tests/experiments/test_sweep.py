"""Sweeps: which cells there are, that finished ones are kept, what is compared, and the statistics over seeds."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy import stats
from tiny_sweep import Host, Splits

from rsae_triton import upgrade
from rsae_triton.common.errors import ConfigError, FormatError
from rsae_triton.evaluation.held_out import load_sae
from rsae_triton.experiments import sweep as module
from rsae_triton.experiments.contenders import (
    Contender,
    contender,
    jumprelu_like,
    parse_contender,
    rectangle_gated,
    steps_for,
)
from rsae_triton.experiments.sweep import Sweep, sweep
from rsae_triton.report import style
from rsae_triton.report.fronts import front_figure, paired, summarise, sweep_tables
from rsae_triton.report.paper_tables import paper_tables
from rsae_triton.teachers import ReluSAE, TopKSAE
from rsae_triton.training.metrics import TrainLog
from rsae_triton.training.recipes import RECIPES


def test_a_sweep_is_resumed_and_widened(tiny, capsys, monkeypatch):
    before = torch.get_float32_matmul_precision()
    page = sweep(tiny)
    assert torch.get_float32_matmul_precision() == before  # a caller's own products stay as exact as they were
    cells = sorted((tiny.out / "cells").iterdir())
    assert len(cells) == 4
    assert "4 cells, 0 of them done before" in capsys.readouterr().out
    text = page.read_text()
    assert "| RSAE − control | RSAE − rectangle |" in text
    assert (tiny.out / "mse.svg").stat().st_size > 5_000
    assert not (tiny.out / "delta_ce.svg").exists()
    stamps = {path: path.stat().st_mtime_ns for path in cells}
    cells[0].unlink()  # as if the run had been killed there
    sweep(tiny)
    assert "4 cells, 3 of them done before" in capsys.readouterr().out
    assert sorted((tiny.out / "cells").iterdir()) == cells
    assert {path: path.stat().st_mtime_ns for path in cells[1:]} == {path: stamps[path] for path in cells[1:]}
    wider = replace(tiny, seeds=(0, 1, 2))
    sweep(wider)
    assert "6 cells, 4 of them done before" in capsys.readouterr().out
    # Another setting is another cell, never a stale one.
    assert all(not cell.path.exists() for cell in replace(tiny, steps=11).cells())


def test_sparsities_multiply_k_and_divide_weights():
    cells = list(Sweep(teachers=("relu", "jumprelu", "topk"), sparsities=(0.5, 2.0)).cells())
    plans = {(cell.teacher, cell.sparsity): cell.plan() for cell in cells}
    assert len(plans) == 6
    assert [plans["topk", factor].k for factor in (0.5, 2.0)] == [16, 64]
    for family in ("relu", "jumprelu"):
        usual = RECIPES[family].weight
        assert [plans[family, factor].weight for factor in (0.5, 2.0)] == [2 * usual, usual / 2]
        assert plans[family, 2.0].recipe().weight == usual / 2


def test_l0_is_held_on_other_hosts_than_the_embedded_one():
    """The usual weights were chosen on SmolLM2; on another host they gave an l0 of 4."""
    of = {"teachers": ("relu", "jumprelu", "topk", "batchtopk"), "sparsities": (0.5,), "model": "other"}
    plans = {cell.teacher: cell.plan() for cell in Sweep(**of).cells()}
    assert {family: plan.l0 for family, plan in plans.items()} == {
        "relu": 16,
        "jumprelu": 16,
        "topk": None,
        "batchtopk": None,
    }
    assert [plans[family].recipe().target_l0 for family in ("relu", "jumprelu")] == [16, 16]
    assert all(plan.weight is None for plan in plans.values())
    assert all(cell.plan().l0 is None for cell in Sweep(**{**of, "model": "smollm2"}).cells())


def test_contenders_are_saved_in_the_models_units(tiny, monkeypatch):
    monkeypatch.setattr(Splits.train, "scale", 0.25)
    names = ("teacher@2", "rsae")
    config = replace(tiny, sparsities=(1.0,), seeds=(0,), contenders=names)
    sweep(config)
    cell = next(iter(replace(config, save=True).cells()))
    assert cell.path.is_file()
    assert not cell.finished()  # the scores are there, the SAEs are not
    result = module.run_cell(cell, Host(), Splits())
    assert cell.finished()
    assert sorted(path.name for path in cell.folder.iterdir()) == ["rsae", "teacher", "teacher@2"]
    x = Splits.test.tensor()
    for name in ("teacher", *names):
        own = load_sae(cell.folder / name)
        assert own.metadata["hook_name"] == "blocks.1.hook_resid_pre"
        error = (own(x / 0.25).detach() * 0.25 - x).square().sum(1).mean()
        assert float(error) == pytest.approx(result["scores"][name]["mse"], rel=2e-2)  # scored in bfloat16 products


def test_a_cell_repeats_to_the_bit(tiny):
    one = replace(tiny, sparsities=(1.0,), seeds=(0,))
    cell = next(iter(one.cells()))
    first, again = (module.run_cell(cell, Host(), Splits())["scores"] for _ in range(2))
    assert first == again


def test_scratch_and_thresholds_take_part(tiny):
    names = ("rsae", "control", "thresholds", "scratch")
    config = replace(tiny, teachers=("topk",), sparsities=(0.25,), seeds=(0,), contenders=names)
    result = module.run_cell(next(iter(config.cells())), Host(), Splits())
    assert set(result["scores"]["matched_l0"]) == {"teacher", "init", *config.contenders}
    assert set(result["training"]) == {"rsae", "control"}
    assert result["scores"]["teacher"]["l0"] == pytest.approx(8, rel=0.01)  # k = 32 / 4


def test_a_language_model_weighs_the_dimensions_of_rounds(tiny, monkeypatch):
    asked = []

    def weights(host, store):
        asked.append(store)
        return torch.linspace(0.2, 2, 16)

    monkeypatch.setattr(module, "dimension_weights", weights)
    names = ("teacher@2", "teacher@2w", "control@3w")
    config = replace(tiny, sparsities=(1.0,), seeds=(0,), contenders=names)
    splits = Splits()
    found = module.run_cell(next(iter(config.cells())), Host(), splits)["scores"]["matched_l0"]
    assert set(found) == {"teacher", "init", *names}
    assert found["teacher@2"]["mse"] != found["teacher@2w"]["mse"]
    assert asked == [splits.validation]
    assert parse_contender("control@12w") == ("control", 12, True)
    assert style.NAMES["teacher@2w"] == "teacher + 1 round, untrained, weighed"


def test_contenders_that_keep_their_weights(tiny):
    names = ("rsae", "control", "rectangle")
    config = replace(tiny, sparsities=(1.0,), seeds=(0,), contenders=names, trainable="gate")
    cell = next(iter(config.cells()))
    assert cell.path != next(iter(replace(config, trainable="all").cells())).path
    result = module.run_cell(cell, Host(), Splits())
    assert set(result["training"]) == {"rsae", "rectangle"}  # a ReLU SAE has no thresholds: the control is the teacher
    assert result["scores"]["control"] == result["scores"]["teacher"]
    assert result["scores"]["rectangle"] != result["scores"]["init"]  # the RSAE's l0 is set back on validation text


def test_a_saved_teacher_is_one_cell_a_seed(tiny, tmp_path):
    ReluSAE(16, 32).save_pretrained(tmp_path / "mine")
    config = replace(tiny, teachers=(str(tmp_path / "mine"), "relu"))
    labels = [cell.label for cell in config.cells()]
    assert sum(label.startswith("mine") for label in labels) == 2
    assert len(labels) == 2 + 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"teachers": ("./no/such/sae",)}, FormatError, "no/such/sae"),
        ({"teachers": ()}, ConfigError, "--teachers"),
        ({"seeds": ()}, ConfigError, "--seeds"),
        ({"contenders": ("magic",)}, ConfigError, "magic"),
        ({"steps": 0}, ConfigError, "--steps"),
        ({"sequences": 1}, ConfigError, "--sequences"),
        ({"split": "train"}, ConfigError, "--split"),
        ({"trainable": "decoder"}, ConfigError, "--trainable"),
        ({"objective": "kl"}, ConfigError, "--objective"),
        ({"contenders": ("rsae@1",)}, ConfigError, "2 to 64 rounds"),
        ({"contenders": ("teacher",)}, ConfigError, "NAME@ROUNDS"),
        ({"spliced": ("control@2",)}, ConfigError, "--spliced control@2"),
    ],
)
def test_bad_sweeps_are_refused_before_anything_is_done(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        sweep(Sweep(out=tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_contenders_start_from_the_teacher(activations):
    teacher = TopKSAE(16, 64, k=4, generator=torch.Generator().manual_seed(0))
    init = upgrade(teacher, activations, rounds=1)
    for name in ("rsae", "control", "rectangle", "thresholds"):
        entry = contender(name, teacher, init, activations)
        assert torch.equal(entry.sae.W_enc, teacher.W_enc)
        assert entry.sae is not teacher
        assert entry.sae is not init
    assert contender("control", teacher, init, activations).recipe == RECIPES["topk"]
    assert (
        contender("rectangle", teacher, init, activations).recipe
        == contender("rsae", teacher, init, activations).recipe
    )
    assert contender("thresholds", teacher, init, activations).recipe is None
    # The second control fires exactly where the Rational SAE fires.
    assert torch.equal(jumprelu_like(init).encode(activations) != 0, init.encode(activations) != 0)
    with pytest.raises(ConfigError, match="magic"):
        contender("magic", teacher, init, activations)


def test_the_rectangle_as_a_gate_is_jumprelus(activations):
    """To the value and to the gradient, so that rounds can be added to the control as well."""
    teacher = TopKSAE(16, 64, k=4, generator=torch.Generator().manual_seed(0))
    init = upgrade(teacher, activations, rounds=1)
    jump, gated = jumprelu_like(init, slope_to_h=True), rectangle_gated(init)
    weights = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    for sae in (jump, gated):
        z, counts = sae.encode_with_counts(activations[:256])
        ((z * weights).sum() + 2 * counts.sum()).backward()
    assert torch.equal(jump.encode(activations), gated.encode(activations))
    assert torch.allclose(jump.threshold.grad, gated.gate.threshold.grad, rtol=1e-4, atol=1e-2)
    assert torch.allclose(jump.W_enc.grad, gated.W_enc.grad, rtol=1e-4, atol=1e-3)
    assert jump.threshold.grad.abs().max() > 10


def test_the_control_with_equal_compute_has_the_seconds_of_the_refined_encoder():
    entry = Contender(TopKSAE(16, 64, k=4), RECIPES["topk"], as_long_as="refined")
    logs = {
        name: TrainLog("hard", 400, 512, 0, seconds=seconds) for name, seconds in (("refined", 30.0), ("control", 20.0))
    }
    assert steps_for(entry, 400, logs) == 600
    assert steps_for(replace(entry, as_long_as=None), 400, {}) == 400
    with pytest.raises(ConfigError, match="name them before it"):
        steps_for(entry, 400, {"control": logs["control"]})


def cells(ours, theirs):
    made = []
    for seed, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        scores = {name: {"mse": mse, "delta_ce": mse / 100, "l0": 20.0} for name, mse in (("rsae", a), ("control", b))}
        scores["teacher"] = {"mse": 2 * b, "delta_ce": 2.0, "l0": 20.0}
        made.append(
            {
                "hook_name": "h", "d_sae": 8, "cell": {"teacher": "relu", "sparsity": 1.0, "seed": seed},
                "scores": {**scores, "matched_l0": copy.deepcopy(scores)},
            }
        )  # fmt: skip
    return made


def test_differences_are_paired_by_seed():
    """Seeds that differ a lot but by the same factor give a narrow interval; checked against scipy's paired t."""
    ours, theirs = [90.0, 182.0, 36.5], [100.0, 200.0, 40.0]
    difference = paired(cells(ours, theirs), "control", "mse")
    relative = [a / b - 1 for a, b in zip(ours, theirs, strict=True)]
    interval = stats.ttest_1samp(relative, 0).confidence_interval(0.95)
    assert difference["mean"] == pytest.approx(sum(relative) / 3)
    assert (difference["low"], difference["high"]) == pytest.approx((interval.low, interval.high))
    absolute = paired(cells(ours, theirs), "control", "delta_ce")
    assert absolute["mean"] == pytest.approx(sum(a - b for a, b in zip(ours, theirs, strict=True)) / 300)
    assert paired(cells([90.0], [100.0]), "control", "mse")["low"] is None


def test_a_code_that_was_not_spliced_is_compared_by_its_error_alone():
    made = cells([90.0, 181.0], [100.0, 200.0])
    for one in made:
        del one["scores"]["matched_l0"]["rsae"]["delta_ce"]
    row = summarise(made)[0]
    assert row["against"]["mse"]["control"]["mean"] == pytest.approx(-0.0975)
    assert "delta_ce" not in row["against"]
    assert set(row["pairs"]["delta_ce"]) == {"control", "teacher"}


def test_contenders_that_were_trained_otherwise_are_other_rows():
    made = cells([90.0, 181.0], [100.0, 200.0])
    with_kl = cells([80.0, 161.0], [99.0, 198.0])
    for one in with_kl:
        one["cell"]["objective"] = "mse+kl"
    rows = summarise([*made, *with_kl])
    assert [row["seeds"] for row in rows] == [[0, 1], [0, 1]]
    assert [row["scores"]["rsae"]["matched"]["mse"]["mean"] for row in rows] == [135.5, 120.5]
    for page in (sweep_tables(rows), paper_tables(rows, {})):
        assert "| relu, mse |" in page
        assert "| relu, mse+kl |" in page
    assert len(front_figure(rows, "mse").axes) == 2
    assert "mse+kl" not in sweep_tables(rows[:1])


def test_tables_mark_only_what_the_interval_shows():
    clear = sweep_tables(summarise(cells([90.0, 181.0, 36.0], [100.0, 200.0, 40.0])))
    unclear = sweep_tables(summarise(cells([90.0, 221.0, 36.0], [100.0, 200.0, 40.0])))
    assert "**-9.8 %" in clear
    assert "**" not in unclear.split("## Downstream")[0]
    one = sweep_tables(summarise(cells([90.0], [100.0])))
    assert "-10.0 %" in one
    assert "±" not in one


def test_a_code_sparser_than_the_teacher_stands_at_its_own_l0_in_the_plot():
    made = cells([90.0, 182.0, 36.5], [100.0, 200.0, 40.0])
    for one in made:
        one["scores"]["matched_l0"]["rsae"]["l0"] = 15.0
    lines = {tuple(one.get_xdata()) for one in front_figure(summarise(made), "mse").axes[0].lines}
    assert {(15.0,), (20.0,)} <= lines


def test_a_saved_teacher_is_read_where_it_says(tiny, tmp_path):
    for name, metadata in (("placed", {"hook_name": "blocks.3.hook_resid_pre"}), ("placeless", {})):
        ReluSAE(16, 32, metadata=metadata).save_pretrained(tmp_path / name)
    teachers = (str(tmp_path / "placed"), str(tmp_path / "placeless"), "relu")
    config = replace(tiny, teachers=teachers, sparsities=(1.0,), seeds=(0,))
    assert [cell.hook for cell in config.cells()] == ["blocks.3.hook_resid_pre", "", ""]
    given = replace(config, hooks=("blocks.1.hook_resid_pre",))
    assert {cell.hook for cell in given.cells()} == {"blocks.1.hook_resid_pre"}


def test_sweep_json_holds_every_cell(tiny):
    page = sweep(replace(tiny, sparsities=(1.0,)))
    stored = json.loads((Path(page).parent / "sweep.json").read_text())
    assert [cell["cell"]["seed"] for cell in stored["cells"]] == [0, 1]
    assert stored["rows"][0]["seeds"] == [0, 1]
    assert stored["rows"][0]["against"]["mse"]["control"]["n"] == 2
