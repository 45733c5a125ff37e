"""Every example that needs no peer does what it says; those that do are run by tests/interop."""

import ast

import pytest
from example_runs import EXAMPLES, prepare, run

from rsae_triton import FusedRationalSAE, load_teacher
from rsae_triton.teachers import JumpReluSAE, ReluSAE

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("examples"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RSAE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def teacher(tmp_path):
    sae = ReluSAE(32, 48, metadata={"hook_name": "blocks.2.hook_resid_pre"})
    return sae.save_pretrained(tmp_path / "teacher")


def test_load_teacher(teacher, capsys):
    run("load_teacher", teacher)
    assert "ReluSAE with d_in=32, d_sae=48" in (out := capsys.readouterr().out)
    assert "hook_name: blocks.2.hook_resid_pre" in out


def test_upgrade(teacher, places, tmp_path, capsys):
    found = run("upgrade", teacher, places[1], places[2], tmp_path / "mine")
    assert FusedRationalSAE.from_pretrained(tmp_path / "mine").metadata["hook_name"] == "blocks.2.hook_resid_pre"
    assert f"fvu {found['scores']['fvu']:.4f}" in capsys.readouterr().out
    assert 0 < found["scores"]["fvu"] < 1
    assert f"{found['scores']['l0']:.2f}" in (tmp_path / "mine" / "README.md").read_text()


def test_save(places, tmp_path, capsys):
    run("save", places[0], tmp_path / "again")
    assert capsys.readouterr().out.split() == ["README.md", "cfg.json", "sae_weights.safetensors"]
    assert FusedRationalSAE.from_pretrained(tmp_path / "again").metadata["author"] == "me"


def test_transformer_lens(places, capsys):
    pytest.importorskip("transformer_lens.model_bridge")
    found = run("transformer_lens", places[0], places[1])
    assert abs(float(found["spliced"] - found["clean"])) > 1e-2


def test_huggingface(places, capsys):
    run("huggingface", places[0], places[1], "w3 w4 w5")
    assert len(capsys.readouterr().out.split()) >= 10


def test_dense_export(places, tmp_path, capsys):
    found = run("dense_export", places[0], places[1], places[2], tmp_path / "dense")
    assert isinstance(load_teacher(tmp_path / "dense"), JumpReluSAE)
    assert found["loss"].summary in capsys.readouterr().out


def test_every_example_is_tested_and_short():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {
        *("load_teacher", "upgrade", "save", "transformer_lens", "huggingface", "dense_export"),  # above
        *("saelens", "saebench"),  # tests/interop/test_examples.py
    }
    for name in names:
        statements = ast.parse((EXAMPLES / f"{name}.py").read_text()).body
        own = [one for one in statements if not isinstance(one, ast.Import | ast.ImportFrom)]
        assert len(own) <= 11, name  # the docstring and ten statements
