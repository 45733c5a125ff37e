"""The whole pipeline on the real language model, small: what `make demo` promises, checked in its files."""

import json

import pytest

from rsae_triton import FusedRationalSAE
from rsae_triton.activations import extract_splits, load_corpus, load_host
from rsae_triton.commands.cli import main
from rsae_triton.evaluation import reconstruction
from rsae_triton.teachers import load_teacher

SCORES = {"mse", "fvu", "cosine", "l0", "l1", "alive_fraction", "delta_ce", "loss_recovered", "loss_recovered_mean"}

pytestmark = pytest.mark.xdist_group("demo")  # `quick` of tests/conftest.py, made once


@pytest.mark.slow
@pytest.mark.network
def test_metrics_have_the_promised_schema(quick):
    metrics = json.loads((quick / "metrics.json").read_text())
    for group in (metrics, metrics["matched_l0"]):
        for name in ("teacher", "init", "rsae", "control", "rectangle", "rounds", "rsae-rounds", "rectangle-rounds"):
            assert set(group[name]) >= SCORES
            assert all(isinstance(group[name][score], float) for score in SCORES)


@pytest.mark.slow
@pytest.mark.network
def test_stage_one_copies_and_reproduces(quick):
    metrics = json.loads((quick / "metrics.json").read_text())
    assert metrics["stage1"]["weights_bit_equal"] is True
    assert metrics["init"]["mse"] == pytest.approx(metrics["teacher"]["mse"], rel=0.01)
    assert metrics["init"]["l0"] == pytest.approx(metrics["teacher"]["l0"], rel=0.05)
    rsae, teacher = metrics["matched_l0"]["rsae"], metrics["matched_l0"]["teacher"]
    assert rsae["mse"] < teacher["mse"]


@pytest.mark.slow
@pytest.mark.network
def test_saved_saes_read_the_models_own_activations(quick):
    rsae, teacher = FusedRationalSAE.from_pretrained(quick / "rsae"), load_teacher(quick / "teacher")
    assert rsae.metadata["hook_name"] == "blocks.16.hook_resid_pre"
    # The store's rows in the model's units: the errors must be those of metrics.json, which are in the store's.
    metrics = json.loads((quick / "metrics.json").read_text())
    sizes = {"n_train": 12_000, "n_validation": 1_200, "n_test": 1_200}
    test = extract_splits(load_host(), load_corpus("demo"), **sizes).test
    resid = test.tensor() / test.scale
    for name, sae in (("rsae", rsae), ("teacher", teacher)):
        score = reconstruction(sae, resid)
        assert score.mse * test.scale**2 == pytest.approx(metrics[name]["mse"], rel=1e-3)
        assert score.l0 == pytest.approx(metrics[name]["l0"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.network
def test_report_and_picture_are_there(quick):
    page = (quick / "report.html").read_text()
    assert "<svg" in page
    assert "://" not in page
    assert (quick / "figure.png").stat().st_size > 20_000


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--hook", "blocks.99.hook_resid_pre"], "blocks.99.hook_resid_pre"),
        (["--text", "/no/such/text.txt"], "/no/such/text.txt"),
    ],
)
def test_wrong_hook_and_text_leave_the_cache_usable(quick, arguments, part, capsys, tmp_path):
    assert main(["demo", "--quick", "--out", str(tmp_path), *arguments]) == 2
    assert part in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.network
def test_empty_text_and_a_foreign_teacher_are_one_line(quick, capsys, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    assert main(["demo", "--quick", "--text", str(tmp_path / "empty.txt"), "--out", str(tmp_path / "o")]) == 2
    assert "empty" in capsys.readouterr().err
    from rsae_triton.teachers import ReluSAE

    ReluSAE(16, 32).save_pretrained(tmp_path / "teacher")
    assert main(["demo", "--quick", "--teacher", str(tmp_path / "teacher")]) == 2
    assert "d_in=16" in capsys.readouterr().err
