"""rsae eval, rsae probe and rsae match end to end, offline: a tiny language model, text of two kinds, SAEs on disk."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rsae_triton.activations import extract, load_corpus, load_host
from rsae_triton.commands.cli import main
from rsae_triton.evaluation import reconstruction
from rsae_triton.evaluation.held_out import load_sae, load_saes
from rsae_triton.sae.rational import FusedRationalSAE
from rsae_triton.teachers import ReluSAE

TABLE = Path(__file__).parents[2] / "benchmarks" / "probing_table.py"
HOOK = "blocks.1.hook_resid_pre"
GLAD, SAD = (
    ["the", "sun", "and", "birds", "sang", "while", "children", "danced"],
    ["the", "rain", "and", "ravens", "wept", "while", "widows", "mourned"],
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with model/, texts.jsonl (mood: glad or sad) and the SAEs teacher/, rsae/ and narrow/."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("commands")
    torch.manual_seed(0)
    words = ["<unk>", "<s>", *dict.fromkeys(GLAD + SAD)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>").save_pretrained(
        folder / "model"
    )
    config = GPT2Config(
        vocab_size=len(words), n_embd=16, n_layer=2, n_head=2, n_positions=256, bos_token_id=1, eos_token_id=1
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    model.save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    with open(folder / "texts.jsonl", "w") as lines:
        for number in range(24):
            mood, pool = ("glad", GLAD) if number % 2 else ("sad", SAD)
            picks = torch.randint(len(pool), (400,), generator=generator).tolist()
            text = " ".join(pool[i] for i in picks)
            lines.write(json.dumps({"text": text, "mood": mood, "title": f"work {number}"}) + "\n")
    metadata = {"model_name": str(folder / "model"), "hook_name": HOOK}
    teacher = ReluSAE(16, 24, generator=generator, metadata=metadata)
    rsae = FusedRationalSAE(16, 24, generator=generator, metadata=metadata)
    for name, sae in (("teacher", teacher), ("rsae", rsae), ("narrow", ReluSAE(8, 4, metadata=metadata))):
        sae.save_pretrained(folder / name)
    other = ReluSAE(16, 24, metadata={**metadata, "hook_name": "blocks.0.hook_resid_pre"})
    other.save_pretrained(folder / "elsewhere")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch, place):
    monkeypatch.setenv("RSAE_CACHE", str(place / "cache"))
    monkeypatch.chdir(place)


TEXT = ["--text", "texts.jsonl", "--whole-text", "--tokens", "2000"]


def run(arguments, capsys):
    assert main([str(one) for one in arguments]) == 0
    return capsys.readouterr().out


def test_eval_writes_what_it_shows(place, capsys, tmp_path):
    out = tmp_path / "new" / "eval.json"
    shown = run(["eval", "teacher", "rsae", *TEXT, "--sequences", "6", "--out", out], capsys)
    result = json.loads(out.read_text())
    assert list(result["saes"]) == ["teacher", "rsae"]
    host = load_host(str(place / "model"), hook_name=HOOK)
    store = extract(host, load_corpus("texts.jsonl"), n_tokens=2000, split="eval")
    for name in ("teacher", "rsae"):
        scores = result["saes"][name]
        expected = reconstruction(load_sae(name).fold_activation_scale_(1 / store.scale), store.tensor())
        assert scores["mse"] == pytest.approx(expected.mse, rel=1e-4)
        assert scores["l0"] == pytest.approx(expected.l0)
        assert f"{scores['mse']:#.4g}" in shown
        assert scores["n_sequences"] == 6
        assert scores["kl"] >= 0
        assert scores["delta_ce_low"] <= scores["delta_ce"] <= scores["delta_ce_high"]
        assert len(result["features"][name]["dead"]) == scores["dead_features"]
        assert len(result["features"][name]["dense"]) == scores["dense_features"]
    paired = result["paired"]["matched_l0"]["rsae"]["teacher"]
    difference = result["matched_l0"]["rsae"]["mse"] - result["matched_l0"]["teacher"]["mse"]
    assert paired["mse"][0] == pytest.approx(difference, rel=1e-4)
    assert result["meta"]["hook"] == HOOK
    table = shown[shown.index("Paired differences") :]
    assert "rsae − teacher" in table
    assert re.search(r"mse.*-?\d.* to ", table)
    assert "…" not in table


def test_eval_takes_the_units_an_sae_was_trained_in(place, capsys, tmp_path):
    run(["eval", "teacher", *TEXT, "--sequences", "0", "--out", "plain.json"], capsys)
    plain = json.loads((place / "plain.json").read_text())
    scaled = load_sae("teacher")
    scaled.metadata["activation_scale"] = 2 * plain["meta"]["activation_scale"]
    scaled.save_pretrained(tmp_path / "scaled")
    run(["eval", tmp_path / "scaled", *TEXT, "--sequences", "0", "--out", "scaled.json"], capsys)
    found = json.loads((place / "scaled.json").read_text())["saes"]["scaled"]
    assert found["mse"] == pytest.approx(4 * plain["saes"]["teacher"]["mse"], rel=1e-4)
    assert found["fvu"] == pytest.approx(plain["saes"]["teacher"]["fvu"], rel=1e-4)
    assert "delta_ce" not in found


def test_probe_of_your_own_labels(place, capsys, tmp_path):
    out = tmp_path / "probe.json"
    arguments = ["probe", "teacher", "rsae", "--text", "texts.jsonl", "--label", "mood", "--items", "30"]
    shown = run([*arguments, "--context", "16", "--out", out], capsys)
    (found,) = json.loads(out.read_text())["tasks"].values()
    assert found["classes"] == ["glad", "sad"]
    assert (found["n_items"], found["n_units"], found["folds"]) == (60, 24, 5)
    assert found["all_raw_dimensions"]["accuracy"][0] > 0.95  # the two moods share few words
    assert set(found["scores"]["16"]) == {"teacher", "rsae", "raw"}
    assert found["scores"]["16"]["teacher"]["accuracy"][0] > 0.8
    assert set(found["paired"]["1"]["raw"]) == {"teacher", "rsae"}
    assert "raw − rsae" in shown
    again = tmp_path / "again.json"
    run([*arguments, "--context", "16", "--out", again], capsys)
    assert json.loads(again.read_text())["tasks"] == json.loads(out.read_text())["tasks"]
    page = tmp_path / "docs" / "evaluation.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- probing table: made -->\nold\n<!-- /probing table -->\nafter\n")
    command = [sys.executable, TABLE, "--results", out]
    subprocess.run([str(one) for one in command], cwd=tmp_path, check=True)
    accuracy = found["all_raw_dimensions"]["accuracy"][0]
    assert f"| 60 | {found['scores']['1']['teacher']['accuracy'][0]:.2f} " in page.read_text()
    assert f" {accuracy:.2f} |\n" in page.read_text()
    assert "old" not in page.read_text()


def test_match_of_a_teacher_and_its_copy(place, capsys, tmp_path):
    copy = load_sae("teacher")
    with torch.no_grad():
        copy.W_dec[3] *= -1
    copy.save_pretrained(tmp_path / "copy")
    shown = run(["match", "teacher", tmp_path / "copy", *TEXT, "--changed", "1", "--out", tmp_path / "m.json"], capsys)
    result = json.loads((tmp_path / "m.json").read_text())
    (changed,) = result["most_changed"]
    assert changed["feature"] == 3
    assert result["summary"]["kept_meaning"] == 23 - result["summary"]["never_active"]
    assert "kept their meaning" in shown
    assert len(result["features"]["partner"]) == 24


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["eval"], ["no SAE", "at least one"]),
        (["eval", "nowhere"], ["nowhere"]),
        (["eval", "teacher", "./teacher"], ["twice"]),
        (["eval", "teacher", "elsewhere"], ["different places", "--hook", "blocks.0.hook_resid_pre"]),
        (["eval", "narrow"], ["narrow has d_in=8", "16", "--hook"]),
        (["eval", "teacher", "--sequences", "1"], ["--sequences is 1"]),
        (["eval", "teacher", "--tokens", "0"], ["--tokens is 0"]),
        (["eval", "teacher", "--out", "."], ["--out .", "is a folder"]),
        (["probe", "teacher", "--tasks", "astrology"], ["'astrology'", "party", "noun or verb"]),
        (["probe", "teacher", "--text", "texts.jsonl"], ["--text and --label"]),
        (["probe", "teacher", "--text", "texts.jsonl", "--label", "tone"], ["'tone'", "mood"]),
        (["probe", "teacher", "--text", "texts.jsonl", "--label", "title"], ["24 values"]),
        (["probe", "teacher", "--items", "3"], ["--items 3"]),
        (["match", "teacher", "narrow"], ["d_in=8"]),
        (["match", "teacher", "rsae", "--changed", "-1"], ["--changed is -1"]),
        (["match", "teacher", "rsae", "--tokens", "1"], ["--tokens is 1"]),
    ],
)
def test_mistakes_take_one_line(arguments, parts, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("rsae: ")
    for part in parts:
        assert part in error


def test_saes_are_named_by_the_shortest_end_that_tells_them_apart(place, tmp_path):
    for run_name in ("a", "b"):
        load_sae("teacher").save_pretrained(tmp_path / run_name / "rsae")
    assert list(load_saes([tmp_path / "a" / "rsae", tmp_path / "b" / "rsae"])) == ["a/rsae", "b/rsae"]
    assert list(load_saes([tmp_path / "a" / "rsae", place / "teacher"])) == ["rsae", "teacher"]
