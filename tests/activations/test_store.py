from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rsae_triton.activations import ActivationStore, Document, extract, extract_splits, store, writing
from rsae_triton.activations.packing import pack
from rsae_triton.common.errors import ConfigError, FormatError, NumericsError

OPTIONS = {"n_tokens": 1000, "context": 16, "dtype": "float32", "batch": 4, "progress": False}


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(writing, "_SHARD_BYTES", 250 * 32 * 4)


@pytest.fixture
def made(host, documents, small_shards):
    return extract(host, documents, **OPTIONS)


def everything(stored):
    """All columns of a store, in context order, so that stores can be compared whatever their shuffling."""
    order = np.lexsort((stored.positions, stored.contexts))
    columns = (stored.tensor(), stored.tokens, stored.documents, stored.positions, stored.contexts)
    return [column[order] for column in columns]


# --- contexts ---------------------------------------------------------------------------------------------------


def test_contexts_hold_every_token_once_with_its_document(host, documents):
    rows = list(pack(documents, host, 16, 5, seed=3))
    assert {len(batch.tokens) for batch in rows[:-1]} == {5}
    tokens, owners = (np.concatenate([getattr(batch, name) for batch in rows]) for name in ("tokens", "documents"))
    assert tokens.shape[1] == 16
    assert (tokens[:, 0] == host.bos_token_id).all()
    flat, owner = tokens[:, 1:].ravel(), owners[:, 1:].ravel()
    flat, owner = flat[flat != host.bos_token_id], owner[flat != host.bos_token_id]
    for index in range(len(documents)):
        expected = host.tokenizer(documents[index].text)["input_ids"]
        got = flat[owner == index].tolist()
        assert got == expected[: len(got)]
        assert len(got) == len(expected) or index == owner[-1]
    # wherever the document changes inside a context, a BOS stands between
    changes = owners[:, 1:] != owners[:, :-1]
    assert (tokens[:, 1:][changes] == host.bos_token_id).all()


def test_contexts_do_not_depend_on_the_batch(host, documents):
    def joined(batch):
        return np.concatenate([b.tokens for b in pack(documents, host, 16, batch, seed=3)])

    assert (joined(1) == joined(7)).all()
    assert joined(4).shape == joined(7).shape


def test_sources_come_in_equal_shares(host):
    documents = [Document("king " * 30, "many", f"m{i}") for i in range(60)]
    documents += [Document("queen " * 90, "few", f"f{i}") for i in range(8)]
    first = next(pack(documents, host, 31, 24, seed=0))
    counts = np.bincount([documents[i].source == "few" for i in first.documents.ravel()])
    assert abs(counts[0] - counts[1]) < 150


# --- extraction -------------------------------------------------------------------------------------------------


def test_rows_are_the_hosts_residuals_at_their_places(host, documents, made):
    assert (len(made), made.n_tokens, made.d_in) == (1000, 1000, 32)
    sequences = made.sequences
    residual = host.residual(sequences.tokens)
    expected = residual[made.contexts, made.positions] * made.scale
    torch.testing.assert_close(made.tensor(), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(sequences.tokens[made.contexts, made.positions], made.tokens)
    assert torch.equal(sequences.documents[made.contexts, made.positions], made.documents)
    assert (made.tokens != host.bos_token_id).all()
    assert (made.positions > 0).all()
    assert made.document_info[3] == {
        "source": "prose",
        "title": "work 1",
        "group": "prose/work 1",
        "labels": {"author": "a1", "source": "prose"},
    }
    assert made.labels("author")[:4] == ["a0", "a0", "a1", "a1"]
    assert made.labels("party") == [None] * 24
    assert not sequences.counted[sequences.tokens[:, 1:] == host.bos_token_id].any()


def test_scale_mean_and_manifest(made, host):
    rows = made.tensor()
    torch.testing.assert_close(rows.norm(dim=1).mean(), torch.tensor(32.0**0.5), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(made.mean, rows.mean(0), atol=1e-5, rtol=1e-4)
    assert made.manifest["hook_name"] == "blocks.2.hook_resid_pre"
    assert made.manifest["model_fingerprint"] == host.fingerprint()
    assert sum(made.manifest["sources"].values()) == 1000
    assert len(made.manifest["shards"]) > 2
    assert made.tensor(torch.bfloat16).dtype == torch.bfloat16


def test_rows_are_shuffled_within_shards(made):
    assert (made.contexts[:200].diff() < 0).float().mean() > 0.3


def test_outliers_are_dropped_and_counted(host, documents, tmp_path):
    plain = extract(host, documents, drop_outliers=None, **OPTIONS)
    norms = plain.tensor().norm(dim=1) / plain.scale
    assert plain.manifest["norm_limit"] is None
    factor = 1.02
    kept = extract(host, documents, drop_outliers=factor, **OPTIONS)
    limit = kept.manifest["norm_limit"]
    assert limit == pytest.approx(factor * kept.manifest["median_norm"])
    assert kept.manifest["outliers_dropped"] > 50
    assert (kept.tensor().norm(dim=1) / kept.scale).max() <= limit * 1.0001
    assert (norms > limit).any()


def test_heldout_text_is_in_the_training_texts_units(host, documents):
    splits = extract_splits(host, documents, heldout=0.4, n_train=600, n_validation=200, n_test=200, context=16,
                            dtype="float32", progress=False)  # fmt: skip
    groups = [{one.document_info[i]["group"] for i in one.documents.tolist()} for one in splits]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]
    assert splits.train.scale == splits.validation.scale == splits.test.scale
    assert splits.test.manifest["norm_limit"] == splits.train.manifest["norm_limit"]
    assert [one.n_tokens for one in splits] == [600, 200, 200]
    # every context that a held-out row came from is kept whole
    assert int(splits.test.contexts.max()) < len(splits.test.sequences.tokens)


def test_a_second_run_reuses_the_store_and_any_change_makes_another(host, documents, monkeypatch):
    first = extract(host, documents, **OPTIONS)
    calls = []
    residual = type(host).residual
    monkeypatch.setattr(type(host), "residual", lambda *a: calls.append(1) or residual(*a))
    assert extract(host, documents, **OPTIONS).folder == first.folder
    assert not calls
    folders = {first.folder}
    for change in ({"seed": 1}, {"context": 17}, {"n_tokens": 900}, {"dtype": "bf16"}, {"drop_outliers": 3.0},
                   {"split": "test"}, {"like": first}, {"hook_name": "blocks.1.hook_resid_pre"}):  # fmt: skip
        folders.add(extract(host, documents, **{**OPTIONS, **change}).folder)
    folders.add(extract(host, documents[1:], **OPTIONS).folder)
    assert len(folders) == 10
    assert calls


def test_extraction_is_deterministic_and_batches_do_not_matter(host, documents, tmp_path):
    first = extract(host, documents, root=tmp_path / "a", **OPTIONS)
    second = extract(host, documents, root=tmp_path / "b", **OPTIONS)
    other = extract(host, documents, root=tmp_path / "c", **{**OPTIONS, "batch": 7})
    for name in (shard["file"] for shard in first.manifest["shards"]):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()
    for a, b in zip(everything(first), everything(other), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_killed_run_leaves_no_store_and_goes_on(host, documents, small_shards, tmp_path, monkeypatch, after):
    whole = extract(host, documents, root=tmp_path / "whole", **OPTIONS)
    save, count = writing.Extraction._save, []

    def killed(self, state, pending):
        if len(count) == after:
            raise KeyboardInterrupt
        count.append(1)
        save(self, state, pending)

    monkeypatch.setattr(writing.Extraction, "_save", killed)
    root = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        extract(host, documents, root=root, **OPTIONS)
    assert not [path for path in root.iterdir() if (path / store.MANIFEST).exists()]
    monkeypatch.setattr(writing.Extraction, "_save", save)
    (partial,) = root.glob(".*.partial")
    shards = json.loads((partial / writing._PROGRESS).read_text())["shards"] if after else []
    assert len(shards) == after
    calls = []
    residual = type(host).residual
    monkeypatch.setattr(type(host), "residual", lambda *a: calls.append(1) or residual(*a))
    resumed = extract(host, documents, root=root, **OPTIONS)
    for a, b in zip(everything(resumed), everything(whole), strict=True):
        torch.testing.assert_close(a, b)
    assert resumed.scale == pytest.approx(whole.scale)
    total, skipped = int(whole.contexts.max()) + 1, shards[-1]["contexts"] if shards else 0
    assert len(calls) == -(-total // 4) - skipped // 4
    assert sorted(p.name for p in root.iterdir() if not p.name.endswith(".lock")) == [resumed.folder.name]


def test_damaged_leftovers_of_a_killed_run_are_thrown_away(host, documents, small_shards, tmp_path, monkeypatch):
    whole = extract(host, documents, root=tmp_path / "whole", **OPTIONS)
    monkeypatch.setattr(writing.Extraction, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        extract(host, documents, root=tmp_path / "b", **OPTIONS)
    monkeypatch.undo()
    (partial,) = (tmp_path / "b").glob("*.partial")
    (partial / "shard-00001.safetensors").write_bytes(b"torn")
    again = extract(host, documents, root=tmp_path / "b", **OPTIONS)
    torch.testing.assert_close(everything(again)[0], everything(whole)[0])


def test_too_little_text(host, documents):
    with pytest.warns(UserWarning, match="ended after"):
        short = extract(host, documents[:2], **OPTIONS)
    assert 150 < short.n_tokens <= 240
    with pytest.raises(FormatError, match="fills no context"):
        extract(host, [Document("king", "s", "t")], **OPTIONS)
    with pytest.raises(FormatError, match="no text"):
        extract(host, [], **OPTIONS)


def test_bad_options(host, documents):
    for change, words in (
        ({"n_tokens": 0}, "n_tokens"),
        ({"context": 65}, "context <= 64"),
        ({"context": 1}, "context"),
        ({"drop_outliers": 0.5}, "drop_outliers"),
        ({"dtype": "int8"}, "int8"),
        ({"hook_name": "blocks.9.hook_resid_pre"}, "layers"),
    ):
        with pytest.raises(ConfigError, match=words):
            extract(host, documents, **{**OPTIONS, **change})


def test_activations_that_are_not_finite_are_refused(host, documents, monkeypatch, tmp_path):
    residual = type(host).residual
    monkeypatch.setattr(type(host), "residual", lambda *a: residual(*a) * float("inf"))
    with pytest.raises(NumericsError, match="NaN or infinity"):
        extract(host, documents, root=tmp_path, **OPTIONS)
    assert not list(tmp_path.glob("*/" + store.MANIFEST))


# --- reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("small", "in_memory"), [(True, None), (False, None), (True, False), (False, True)])
def test_batches_shuffle_resume_and_cover(made, monkeypatch, small, in_memory):
    if not small:
        monkeypatch.setattr(store, "_SMALL_BYTES", 0)
    opened = ActivationStore(made.folder, in_memory=in_memory)
    assert (opened._resident is not None) == (small if in_memory is None else in_memory)
    rows = opened.tensor()
    epoch = list(opened.batches(150, seed=5, epochs=1))
    assert [tuple(b.shape) for b in epoch] == [(150, 32)] * 6
    seen = torch.cat(epoch)
    known = {tuple(row.tolist()) for row in rows}
    assert all(tuple(row.tolist()) in known for row in seen)
    assert len({tuple(row.tolist()) for row in seen}) > 850
    two = list(opened.batches(150, seed=5, epochs=2))
    assert len(two) == 12
    assert not torch.equal(two[0], two[6])
    resumed = list(opened.batches(150, seed=5, epochs=2, start=7))
    assert len(resumed) == 5
    assert all(torch.equal(a, b) for a, b in zip(resumed, two[7:], strict=True))
    assert not torch.equal(next(opened.batches(150, seed=6)), two[0])
    assert next(opened.batches(10, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("size", [0, -3, 1001])
def test_an_impossible_batch_size_is_a_config_error(made, size):
    with pytest.raises(ConfigError, match="batch_size"):
        next(made.batches(size))


def _flip(path):
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "file", "words"),
    [
        (_flip, "shard-00001.safetensors", "checksum"),
        (lambda p: p.write_bytes(p.read_bytes()[:-9]), "shard-00000.safetensors", "bytes instead of"),
        (lambda p: p.unlink(), "shard-00002.safetensors", "is missing"),
        (_flip, "mean.safetensors", "checksum"),
        (lambda p: p.unlink(), "documents.jsonl", "is missing"),
        (lambda p: p.write_text("{"), "manifest.json", "cannot be read"),
        (lambda p: p.write_text("[]"), "manifest.json", "cannot be read"),
        (lambda p: p.write_text('{"schema": 99}'), "manifest.json", "schema"),
        (lambda p: p.write_text('{"schema": 1}'), "manifest.json", "d_in"),
    ],
)
def test_damage_is_named_with_the_folder_to_delete(made, host, documents, damage, file, words):
    damage(made.folder / file)
    with pytest.raises(FormatError, match=words) as caught:
        extract(host, documents, **OPTIONS)
    message = str(caught.value)
    assert str(made.folder / file) in message
    assert f"delete the folder {made.folder}" in message
    assert "\n" not in message
    shutil.rmtree(made.folder)
    assert extract(host, documents, **OPTIONS).n_tokens == 1000  # what the message says to do works


def test_a_shard_of_another_store_is_refused(made, host, documents):
    other = extract(host, documents, **{**OPTIONS, "seed": 9})
    shutil.copy(other.folder / "shard-00000.safetensors", made.folder / "shard-00000.safetensors")
    with pytest.raises(FormatError, match="shard-00000"):
        ActivationStore(made.folder)


def test_a_damaged_shard_that_was_not_verified_is_still_named(made):
    path = made.folder / "shard-00001.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(FormatError, match="shard-00001"):
        ActivationStore(made.folder, verify=False).tensor()


def test_a_folder_without_a_store_is_a_format_error(tmp_path):
    with pytest.raises(FormatError, match="no activation store"):
        ActivationStore(tmp_path)


def test_nothing_on_disk_is_a_pickle(made):
    assert {path.suffix for path in made.folder.iterdir()} == {".safetensors", ".json", ".jsonl"}
    assert json.loads((made.folder / store.MANIFEST).read_text())["n_tokens"] == 1000
    assert load_file(made.folder / "shard-00000.safetensors")["activations"].dtype == torch.float32
