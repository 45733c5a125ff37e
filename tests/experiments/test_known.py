"""`rsae known`: cells are kept, everyone is scored at the teacher's l0, tables hold the differences."""

import json
from dataclasses import replace

import pytest

from rsae_triton.common.errors import ConfigError
from rsae_triton.experiments.known import Known, known, split_name
from rsae_triton.report.known import summarise_known


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    config = Known(
        teachers=("jumprelu", "topk"), l0s=(3.0,), d_in=16, n_features=48, d_sae=32, seeds=(0, 1),
        contenders=("rsae", "control", "rsae/gate", "control/gate"), tokens=4000, teacher_steps=150, steps=20,
        batch_size=128, out=tmp_path_factory.mktemp("known"),
    )  # fmt: skip
    return config, known(config)


def test_cells_are_kept_and_scored_at_one_l0(done):
    config, page = done
    stamps = {cell.path: cell.path.stat().st_mtime_ns for cell in config.cells()}
    assert len(stamps) == 4
    known(replace(config))
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    found = json.loads((config.out / "known.json").read_text())
    said = found["command"].split()
    assert said[:2] == ["rsae", "known"]
    assert "--seeds 0 1 " in found["command"]
    assert "--out" not in said
    for cell in found["cells"]:
        teacher = cell["scores"]["teacher"]
        assert set(cell["scores"]) == {"teacher", *config.contenders}
        assert all(one["l0"] <= teacher["l0"] + 1e-3 for one in cell["scores"].values())
        assert 0.2 < teacher["f1"] < 1
        assert teacher["alive_fraction"] == 1 - teacher["dead"] / config.d_sae >= 0.9
        assert cell["training"]["teacher"]["steps"] == config.teacher_steps
        assert cell["scores"]["rsae/gate"]["mcc"] == teacher["mcc"]  # the dictionary is the teacher's
        if cell["cell"]["teacher"] == "topk":  # it has no gate to train
            assert cell["scores"]["control/gate"] == teacher
    text = page.read_text()
    assert "## jumprelu, l0 3, correlation 0, planted data, 2 seeds" in text
    assert "| rsae/gate |" in text
    assert "| SAE | F1 | MCC | precision | recall | mse | alive |" in text


def test_differences_are_paired_by_seed(done):
    config, _ = done
    cells = json.loads((config.out / "known.json").read_text())["cells"]
    row = summarise_known(cells)[0]
    own = [cell["scores"] for cell in cells if cell["cell"]["teacher"] == row["teacher"]]
    differences = [one["rsae"]["f1"] - one["teacher"]["f1"] for one in own]
    assert row["to_teacher"]["rsae"]["f1"]["mean"] == pytest.approx(sum(differences) / 2)
    assert row["to_teacher"]["rsae"]["mse"]["mean"] == pytest.approx(
        sum(one["rsae"]["mse"] / one["teacher"]["mse"] - 1 for one in own) / 2
    )


def test_names_of_contenders():
    assert split_name("teacher@3") == ("teacher", 3, "all")
    assert split_name("refined/gate@6") == ("refined", 6, "gate")
    for bad in ("teacher", "rsae/decoder", "scratch", "rsae@x", "magic", "teacher/gate@2", "rsae@2w"):
        with pytest.raises(ConfigError, match="contender is"):
            split_name(bad)
    with pytest.raises(ConfigError, match="--l0s"):
        Known(l0s=(200.0,)).check()


def test_synthsaebench_has_its_own_correlation():
    config = Known(data="synthsaebench", n_features=2048)
    assert {cell.correlation for cell in config.cells()} == {0.1}
    with pytest.raises(ConfigError, match="leave them out"):
        replace(config, correlations=(0.3,)).check()
    with pytest.raises(ConfigError, match="--n-features"):
        replace(config, n_features=64).check()
