"""Data sets of sae-probes: read where they are installed, the last token of each prompt, nothing downloaded."""

import sys

import pytest
import torch
from tiny_models import llama, tokenizer

from rsae_triton.activations import HostModel
from rsae_triton.common.errors import ConfigError, FormatError, SourceError
from rsae_triton.evaluation.probe_items import read_rows
from rsae_triton.evaluation.probe_sets import probe_set, set_names


@pytest.fixture
def host(tmp_path):
    return HostModel(llama(), tokenizer(tmp_path), "tiny", default_hook="blocks.2.hook_resid_pre")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of that name and layout, with two sets of our own, and zstandard as far as it is used."""
    folder = tmp_path / "sae_probes"
    data = folder / "data" / "cleaned_data"
    data.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('it must not be imported')")
    rows = [f'"w{k} w{k + 1}{" w3" * (k % 4)}",{"yes" if k % 3 else "no"}' for k in range(1, 40)]
    (data / "7_words.csv.zst").write_bytes("\n".join(["prompt,target", *rows, "w1 w2,"]).encode())
    (data / "12_many.csv.zst").write_bytes(b"prompt,target\na,1\nb,2\nc,3")
    (data / "30_bad.csv.zst").write_bytes(b"text,label\na,1")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("RSAE_CACHE", str(tmp_path / "cache"))

    class Plain:
        ZstdError = ValueError
        open = staticmethod(open)

    monkeypatch.setitem(sys.modules, "zstandard", Plain)
    return data


def test_a_set_is_prompts_with_their_last_token(package, host):
    assert set_names() == ["7_words", "12_many", "30_bad"]
    task, items = probe_set("7_words", host, per_label=10, context=4)
    assert task.classes == ("no", "yes")
    assert items.labels.tolist() == [False] * 10 + [True] * 10
    assert items.tokens.shape == (20, 4)
    assert bool((items.tokens[:, 0] == host.bos_token_id).all())
    assert items.pooled.sum(1).tolist() == [1] * 20
    again = probe_set("7_words", host, per_label=10, context=4)[1]
    assert torch.equal(items.tokens, again.tokens)
    assert not torch.equal(items.tokens, probe_set("7_words", host, per_label=10, context=4, seed=1)[1].tokens)


def test_padding_after_a_prompt_does_not_change_its_last_token(package, host):
    """Prompts are as long as they are; the rows are those of each prompt by itself."""
    _, items = probe_set("7_words", host, per_label=12, context=8)
    rows = read_rows(items, host)
    for row in range(len(items)):
        last = int(items.pooled[row].nonzero())
        alone = host.residual(items.tokens[row : row + 1, : last + 1])[0, -1]
        assert torch.allclose(rows.rows[rows.items == row][0].float(), alone.float(), atol=1e-4)
    assert len({int(one.nonzero()) for one in items.pooled}) > 1


def test_unknown_or_unsuitable_probe_sets_are_errors(package, host, monkeypatch):
    with pytest.raises(ConfigError, match="did you mean 7_words"):
        probe_set("7_word", host)
    with pytest.raises(ConfigError, match="3 labels"):
        probe_set("12_many", host)
    with pytest.raises(FormatError, match="no columns prompt and target"):
        probe_set("30_bad", host)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(SourceError, match="pip install zstandard"):
        probe_set("7_words", host)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SourceError, match="pip install --no-deps sae-probes"):
        set_names()
