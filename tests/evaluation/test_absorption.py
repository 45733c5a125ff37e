"""Absorption of first letters where it is planted: none, all of a word's letter, two thirds of it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from rsae_triton.commands import absorption as command
from rsae_triton.common.errors import ConfigError
from rsae_triton.evaluation.absorption import absorption, letter_probes, letter_words
from rsae_triton.teachers import ReluSAE

D, LETTERS, WORDS, GROUPS = 96, 4, 60, 10
LOUD = 6.0


class Host:
    """A language model whose activations are planted: a letter's direction, for a third of the words also one that two
    words share, and the same mean in all of them."""

    name, default_hook, bos_token_id, device, dtype = "planted", "blocks.1.hook_resid_pre", 0, "cpu", torch.float32

    def __init__(self):
        basis = np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))[0].astype(np.float32)
        self.letters, self.mean = basis[:LETTERS], 20 * basis[-1]
        self.groups = basis[LETTERS : LETTERS * (1 + GROUPS)].reshape(LETTERS, GROUPS, D)
        vocabulary = {"<s>": 0, "x": 1, "Ġ1st": 2}
        for letter, word in np.ndindex(LETTERS, WORDS):
            text = "".join(chr(ord("a") + int(digit)) for digit in f"{word:02d}")
            vocabulary[f"Ġ{'abcd'[letter]}{text}"] = len(vocabulary)
        self.tokenizer = type("T", (), {"get_vocab": lambda _: vocabulary, "__call__": lambda *_, **__: self.prompt})()
        self.prompt = {"input_ids": [1, 1]}

    def fingerprint(self):
        return "planted"

    def hook_width(self):
        return D

    def place(self, token):
        letter, word = divmod(token - 3, WORDS)
        return letter, word // 2 if word < 2 * GROUPS else None

    def residual(self, tokens):
        rows = []
        for token in tokens[:, -1].tolist():
            letter, group = self.place(token)
            x = self.mean + LOUD * self.letters[letter]
            x = x if group is None else x + LOUD * self.groups[letter, group]
            rows.append(x + 0.1 * np.random.default_rng(token).normal(size=D).astype(np.float32))
        return torch.tensor(np.stack(rows))[:, None].expand(-1, tokens.shape[1], -1)


def sae(host, kept):
    """Rows and codes of an SAE whose letter features keep this share of their code on words with a group of their own;
    the group's feature carries the rest, so that the reconstruction is the same."""
    rows = [*host.letters]
    for letter, group in np.ndindex(LETTERS, GROUPS):
        rows.append(host.groups[letter, group] + (1 - kept) * host.letters[letter])

    def code(tokens):
        z = np.zeros((len(tokens), len(rows)), dtype=np.float32)
        for one, token in zip(z, tokens, strict=True):
            letter, group = host.place(token)
            one[letter] = LOUD * (1 if group is None else kept)
            if group is not None:
                one[LETTERS + letter * GROUPS + group] = LOUD
        return z

    return np.stack(rows), code


@pytest.mark.parametrize(("kept", "fraction", "full"), [(1.0, 0, 0), (0.0, 1, 1), (1 / 3, 2 / 3, 0)])
def test_planted_absorption_is_measured(kept, fraction, full):
    host = Host()
    items = letter_words(host, seed=1)
    assert len(items) == LETTERS * WORDS
    assert items.tokens[:, :3].tolist() == [[0, 1, 1]] * len(items)
    x = host.residual(items.tokens)[:, -1].numpy()
    probes = letter_probes(x, items)
    assert list(probes.f1) == [0, 1, 2, 3]
    assert min(probes.f1.values()) > 0.99
    assert np.abs(probes.directions[:4] @ host.mean / 20).max() < 1e-2  # what all words have in common is no letter
    rows, code = sae(host, kept)
    tokens = items.tokens[:, -1].tolist()
    for factor in (1.0, 50.0):  # in any units
        found = absorption(factor * code(tokens), rows, factor * x, probes)
        own = np.array([host.place(token)[1] is not None for token in tokens])
        share = np.array([own[probes.test & (probes.letters == letter)].mean() for letter in range(LETTERS)])
        assert min(share) > 0
        assert found["main"].tolist() == [1] * LETTERS
        assert found["fraction"] == pytest.approx(fraction * share, abs=0.02)
        assert found["full"] == pytest.approx(full * share)
        assert found["carried"] == pytest.approx(np.ones(4), abs=0.05)
        assert found["by_main"] == pytest.approx(1 - (1 - kept) * share, abs=0.05)
        assert found["silent"] == pytest.approx((kept == 0) * share)
    assert found["f1"] == pytest.approx(np.ones(4) if kept else found["f1_one"])


def test_capitals_do_not_put_a_word_on_both_sides():
    host = Host()
    vocabulary = host.tokenizer.get_vocab()
    vocabulary |= {token[0] + token[1:].title(): index + 400 for token, index in vocabulary.items() if index > 2}
    items = letter_words(host)
    assert len(items) == 2 * LETTERS * WORDS
    rng = np.random.default_rng(0)
    x = rng.normal(size=(len(items), D)) + 20 + 5 * np.eye(D)[np.asarray(items.labels)]
    probes = letter_probes(x, items)
    words = np.array(items.units)
    assert not set(words[probes.test]) & set(words[~probes.test])


def test_absorption_that_cannot_be_measured_is_a_config_error():
    host = Host()
    items = letter_words(host)
    noise = np.random.default_rng(0).normal(size=(len(items), D))
    with pytest.raises(ConfigError, match="no first letter"):
        letter_probes(noise, items)
    dead = absorption(np.zeros((len(items), 5)), np.eye(5, D), host.residual(items.tokens)[:, -1].numpy(),
                      letter_probes(host.residual(items.tokens)[:, -1].numpy(), items))  # fmt: skip
    assert dead["main"].tolist() == [0] * LETTERS
    assert dead["fraction"].tolist() == [0] * LETTERS
    host.tokenizer.get_vocab().clear()
    with pytest.raises(ConfigError, match="0 words"):
        letter_words(host)


def test_the_command_measures_saved_saes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RSAE_CACHE", str(tmp_path / "cache"))
    host = Host()
    monkeypatch.setattr(command, "open_host", lambda *_: host)
    for name, kept in (("clean", 1.0), ("absorbed", 0.0)):
        rows, _ = sae(host, kept)
        made = ReluSAE(D, len(rows))
        with torch.no_grad():
            made.W_dec.copy_(torch.tensor(rows))
            made.b_dec.copy_(torch.tensor(host.mean))
            # One row a letter less what the groups of it explain, one a group: exact where words have both.
            encoder = np.concatenate([host.letters - (1 - kept) * host.groups.sum(1), rows[LETTERS:]])
            encoder[LETTERS:] = host.groups.reshape(-1, D)
            made.W_enc.copy_(torch.tensor(encoder.T))
            made.b_enc.fill_(-1.0)
        made.save_pretrained(tmp_path / name)
    paths = (tmp_path / "clean", tmp_path / "absorbed")
    options = command.Absorption(paths=paths, out=tmp_path / "a.json")
    result = command.run_absorption(options)
    assert result["mean"]["clean"]["fraction"] == 0
    assert result["mean"]["absorbed"]["full"] > 0.2
    difference = result["to_first"]["absorbed"]["fraction"]
    assert 0 < difference["low"] < difference["mean"] == pytest.approx(result["mean"]["absorbed"]["fraction"])
    assert result["letters"] == list("abcd")
    assert json.loads((tmp_path / "a.json").read_text())["meta"]["n_words"] == LETTERS * WORDS
    assert "absorbed" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--per-letter"):
        command.run_absorption(replace(options, per_letter=3))
