"""`rsae reproduce`: which cells a host has, its tables, and that its configuration is checked."""

import json
import re
from dataclasses import replace

import pytest
import torch

from rsae_triton.common.errors import ConfigError, FormatError
from rsae_triton.experiments import reproduce as module
from rsae_triton.experiments.reproduce import Reproduce, reproduce, sweeps_of
from rsae_triton.experiments.sweep import Sweep
from rsae_triton.teachers import ReluSAE

TOML = """
[small]
model = "synthetic"
widths = [64]
teacher_steps = 30
steps = 10
batch_size = 128
sequences = 0

[[small.sweeps]]
teachers = ["relu"]
sparsities = [1.0]
seeds = [0, 1]

[[small.sweeps]]
teachers = ["topk"]
sparsities = [1.0]
contenders = ["rsae", "control"]
seeds = [0, 1]

[[small.sweeps]]
teachers = ["topk"]
sparsities = [1.0]
contenders = ["thresholds", "scratch"]
seeds = [0, 1]

[small.published.relu]
mse = [0.5, 0.25]
"""


@pytest.fixture
def small(tiny, tmp_path):
    hosts = tmp_path / "hosts.toml"
    hosts.write_text(TOML)
    return Reproduce(host="small", hosts=hosts, out=tmp_path / "out")


def test_both_families_get_their_rows_and_the_published_numbers_stand_beside(small, capsys):
    page = reproduce(small).read_text()
    table = json.loads((small.out / "table.json").read_text())
    assert [(row["teacher"], row["seeds"]) for row in table["rows"]] == [("relu", [0, 1]), ("topk", [0, 1])]
    # The page's number is the mean of the cells'.
    relu = [cell["scores"]["matched_l0"] for cell in table["cells"] if cell["cell"]["teacher"] == "relu"]
    values = [scores["rsae"]["mse"] for scores in relu]
    row = next(line for line in page.splitlines() if "| relu | RSAE |" in line)
    assert float(row.split("|")[5].split("±")[0]) == pytest.approx(sum(values) / 2, abs=0.006)
    # Contenders of another sweep of the same teachers stand in the same row, and are compared seed by seed.
    topk = table["rows"][1]
    assert list(topk["scores"]) == ["teacher", "init", "rsae", "control", "thresholds", "scratch"]
    assert topk["against"]["mse"]["scratch"]["n"] == 2
    equal = [cell["scores"]["matched_l0"] for cell in table["cells"]]
    scratch = [scores["scratch"]["mse"] for scores in equal if "scratch" in scores]
    assert topk["scores"]["scratch"]["matched"]["mse"]["mean"] == pytest.approx(sum(scratch) / 2)
    assert "thresholds" in page
    assert "| relu | mse | 0.5 | 0.25 |" in page
    reproduce(small)
    assert "6 cells, 6 of them done before" in capsys.readouterr().out


def test_cells_of_a_known_table_are_not_computed_again(small, tmp_path, monkeypatch, capsys):
    reproduce(small)
    table = small.out / "table.json"
    fresh = replace(small, out=tmp_path / "fresh", known=table)
    capsys.readouterr()
    reproduce(replace(fresh, list=True))
    assert all(line.startswith("done") for line in capsys.readouterr().out.splitlines())
    monkeypatch.setattr("rsae_triton.experiments.sweep.run_cell", lambda *_: pytest.fail("computed"))
    reproduce(fresh)
    assert json.loads((fresh.out / "table.json").read_text()) == json.loads(table.read_text())
    # Other steps are another cell.
    small.hosts.write_text(TOML.replace("steps = 10", "steps = 11"))
    with pytest.raises(pytest.fail.Exception, match="computed"):
        reproduce(replace(fresh, out=tmp_path / "other"))
    for text in ("[]", "{}", '{"cells": [{"cell": {}}]}'):
        table.write_text(text)
        with pytest.raises(FormatError, match=re.escape(str(table))):
            reproduce(replace(fresh, out=tmp_path / "never"))
    assert not (tmp_path / "never").exists()


def test_a_known_cell_whose_saes_are_asked_for_but_missing_is_computed(small, tmp_path, monkeypatch, capsys):
    reproduce(small)
    small.hosts.write_text(TOML.replace("steps = 10", "steps = 10\nsave = true"))
    fresh = replace(small, out=tmp_path / "fresh", known=small.out / "table.json", seeds=(1,))

    def listed():
        capsys.readouterr()
        reproduce(replace(fresh, list=True))
        return [line.split()[0] for line in capsys.readouterr().out.splitlines()]

    assert listed() == ["waiting"] * 3
    with monkeypatch.context() as never:
        never.setattr("rsae_triton.experiments.sweep.run_cell", lambda *_: pytest.fail("computed"))
        with pytest.raises(pytest.fail.Exception, match="computed"):
            reproduce(fresh)
    reproduce(fresh)
    assert len(list(fresh.out.glob("saes/*/teacher/cfg.json"))) == 3
    for scores in fresh.out.glob("cells/*.json"):
        scores.unlink()
    assert listed() == ["done"] * 3  # the SAEs are there, and the table has the scores


def test_a_saved_teachers_cell_is_finished_without_an_sae_from_scratch(small, tmp_path):
    ReluSAE(16, 32).save_pretrained(tmp_path / "mine")
    names = {"teachers": (str(tmp_path / "mine"),), "contenders": ("scratch", "pursuit", "rsae"), "save": True}
    cell = next(iter(Sweep(**names, out=tmp_path / "out").cells()))
    for name in ("teacher", "rsae"):
        assert not cell.saved()
        ReluSAE(16, 32).save_pretrained(cell.folder / name)
    assert cell.saved()


def test_seeds_choose_cells_and_a_list_computes_nothing(small, capsys):
    reproduce(replace(small, seeds=(1,), list=True))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("waiting") and line.endswith("seed1") for line in lines)
    assert not small.out.exists()
    with pytest.raises(ConfigError, match="seeds"):
        sweeps_of(replace(small, seeds=(7,)))


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("not toml [", FormatError, "cannot be read"),
        ("[other]\n", ConfigError, "'small'; hosts.toml has other"),
        ("[small]\nmodel = 'a'\n", ConfigError, "no sweep"),
        ("[small]\nstepps = 3\n[[small.sweeps]]\n", FormatError, "stepps"),
        ("[small]\nout = 'x'\n[[small.sweeps]]\n", FormatError, "out"),
    ],
)
def test_a_bad_configuration_is_named(small, text, error, words):
    small.hosts.write_text(text)
    with pytest.raises(error, match=re.escape(words)):
        reproduce(small)
    with pytest.raises(FormatError, match="cannot be read"):
        reproduce(replace(small, hosts=small.hosts.with_name("missing.toml")))


def test_the_longer_run_is_the_grids_first_place_but_for_its_length():
    longer, _ = sweeps_of(Reproduce(host="smollm2-long"))
    (first, *_), _ = sweeps_of(Reproduce(host="smollm2"))
    for one in longer:
        assert (one.hooks, one.widths, {*one.teachers}) == (first.hooks, first.widths, {*first.teachers})
        # Four times the tokens, of a teacher as of a contender.
        for steps in ("steps", "teacher_steps"):
            assert getattr(one, steps) * one.batch_size == 4 * getattr(first, steps) * first.batch_size


@pytest.mark.parametrize("host", ["smollm2", "gpt2", "pythia-160m", "gemma-2-2b"])
def test_the_hosts_that_come_along_are_whole(host):
    sweeps, published = sweeps_of(Reproduce(host=host))
    cells = [cell for one in sweeps for cell in one.cells()]
    assert len({cell.path for cell in cells}) == len(cells) >= 3
    for one in sweeps:
        assert len(one.seeds) >= 3
    trained: dict = {}
    for cell in cells:
        trained.setdefault((cell.hook, cell.width, cell.teacher, cell.sparsity), set()).update(cell.sweep.contenders)
    assert all({"rsae", "control", "rectangle"} <= names for names in trained.values())
    if host == "smollm2":
        # 3 families x 3 seeds: 3 sparsities, the middle one at 2 layers x 2 widths.
        assert len(cells) == 9 * (4 + 2)
        assert not published
    else:
        assert published
        assert all(teacher.count("/") >= 2 for one in sweeps for teacher in one.teachers)


def test_offline_a_public_teacher_is_asked_for_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(module, "run_cells", lambda *_: pytest.fail("computed"))
    from rsae_triton.common.errors import SourceError

    with pytest.raises(SourceError, match="jbloom"):
        reproduce(Reproduce(host="gpt2", out=tmp_path))


def test_centred_gpt2_has_a_stream_without_mean_and_the_same_logits():
    from tiny_models import gpt2

    from rsae_triton.activations.centring import center_writing_weights_

    model = gpt2()
    with torch.no_grad():  # as trained ones are: with a plain last norm a tied unembedding would not show
        model.transformer.ln_f.weight.normal_(generator=torch.Generator().manual_seed(1))
        model.transformer.ln_f.bias.normal_(generator=torch.Generator().manual_seed(2))
    tokens = torch.randint(0, model.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    before = model(tokens, output_hidden_states=True)
    assert before.hidden_states[1].mean(-1).abs().max() > 1e-2
    center_writing_weights_(model)
    after = model(tokens, output_hidden_states=True)
    assert after.hidden_states[1].mean(-1).abs().max() < 1e-5
    assert (after.logits - before.logits).abs().max() < 1e-4
    expected = before.hidden_states[1] - before.hidden_states[1].mean(-1, keepdim=True)
    torch.testing.assert_close(after.hidden_states[1], expected, atol=1e-5, rtol=1e-5)


def test_centring_refuses_what_it_would_change():
    from tiny_models import llama

    from rsae_triton.activations.centring import center_writing_weights_

    with pytest.raises(ConfigError, match="llama"):
        center_writing_weights_(llama())
