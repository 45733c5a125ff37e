"""Stores for long runs: several places in one pass, BOS kept, shares of processes, reading ahead."""

import json
import shutil
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from rsae_triton.activations import ActivationStore, extract, extract_hooks, layers, store_tensor, writing
from rsae_triton.activations.order import EpochOrder
from rsae_triton.activations.prefetch import prefetched
from rsae_triton.commands.cli import main
from rsae_triton.common.errors import ConfigError, FormatError, NumericsError, ShapeError

OPTIONS = {"n_tokens": 1500, "context": 16, "dtype": "float32", "batch": 4, "progress": False}
HOOKS = ["blocks.2.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"]


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(writing, "_SHARD_BYTES", 100 * 32 * 4)


def files(stored):
    return {path.name: path.read_bytes() for path in sorted(stored.folder.glob("shard-*"))}


def count_passes(model, monkeypatch):
    """How often each layer of the model runs."""
    counts = [0] * len(layers.decoder_layers(model))
    for number, layer in enumerate(layers.decoder_layers(model)):
        forward = layer.forward

        def counted(*arguments, _number=number, _forward=forward, **options):
            counts[_number] += 1
            return _forward(*arguments, **options)

        monkeypatch.setattr(layer, "forward", counted)
    return counts


def test_several_places_in_one_pass_are_the_places_one_by_one(host, documents, small_shards, tmp_path, monkeypatch):
    alone = [extract(host, documents, hook, root=tmp_path / "alone", **OPTIONS) for hook in HOOKS]
    counts = count_passes(host.model, monkeypatch)
    stores = extract_hooks(host, documents, HOOKS, root=tmp_path / "together", **OPTIONS)
    passes = int(stores[0].contexts.max()) // 4 + 1
    # Layers up to the deepest place, once each; nothing behind it.
    assert counts == [passes] * 2 + [0] * (len(counts) - 2)
    for one, other, hook in zip(alone, stores, HOOKS, strict=True):
        assert other.manifest["hook_name"] == hook
        assert one.manifest["key"] == other.manifest["key"]
        assert files(one) == files(other)
    with pytest.raises(ConfigError, match="each once"):
        extract_hooks(host, documents, [HOOKS[0], HOOKS[0]], **OPTIONS)


def test_places_of_a_bridge_in_one_pass(llama):
    from rsae_triton.activations import load_host

    lens = load_host(str(llama), library="transformer_lens")
    tokens = torch.randint(3, 12, (2, 8), generator=torch.Generator().manual_seed(0))
    names = ["blocks.1.hook_mlp_out", "blocks.0.hook_resid_pre", "blocks.1.hook_resid_mid"]
    for found, name in zip(lens.residuals(tokens, names), names, strict=True):
        torch.testing.assert_close(found, lens.residual(tokens, name))


@pytest.mark.parametrize("after", [1, 33])
def test_a_killed_pass_goes_on_at_the_next_shard_of_each_place(
    host, documents, small_shards, tmp_path, monkeypatch, after
):
    whole = extract_hooks(host, documents, HOOKS, root=tmp_path / "whole", **OPTIONS)
    save, count = writing.Extraction._save, []

    def killed(self, state, pending):
        if len(count) == after:
            raise KeyboardInterrupt
        count.append(1)
        save(self, state, pending)

    monkeypatch.setattr(writing.Extraction, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        extract_hooks(host, documents, HOOKS, root=tmp_path / "b", **OPTIONS)
    monkeypatch.setattr(writing.Extraction, "_save", save)
    counts = count_passes(host.model, monkeypatch)
    stores = extract_hooks(host, documents, HOOKS, root=tmp_path / "b", **OPTIONS)
    assert [files(one) for one in stores] == [files(one) for one in whole]
    passes = int(whole[0].contexts.max()) // 4 + 1
    assert counts[0] < passes if after == 33 else counts[0] == passes


def test_bos_is_kept_where_asked_and_the_manifest_says_so(host, documents, tmp_path):
    plain = extract(host, documents, root=tmp_path, **OPTIONS)
    kept = extract(host, documents, root=tmp_path, keep_bos=True, drop_outliers=1.5, **OPTIONS)
    assert (plain.manifest["bos"], kept.manifest["bos"]) == ("dropped", "kept")
    assert int((plain.positions == 0).sum()) == 0
    assert int((kept.positions == 0).sum()) > 30
    first = kept.tensor()[kept.positions == 0]
    others = kept.tensor()[kept.tokens != host.bos_token_id]
    # Units are those of the other positions.
    assert float(others.norm(dim=1).mean()) == pytest.approx(32**0.5, rel=1e-4)
    assert torch.allclose(first, first[0].expand_as(first), atol=1e-4)
    assert kept.manifest["bos_dropped"] == 0


def test_processes_read_parts_of_the_same_batches(tmp_path):
    stored = store_tensor(torch.randn(1000, 8), tmp_path / "s", rows_per_shard=170)
    whole = list(stored.batches(120, seed=3, epochs=2))
    parts = [list(stored.batches(120, seed=3, epochs=2, part=(rank, 4))) for rank in range(4)]
    assert all(torch.equal(torch.cat(rows), batch) for *rows, batch in zip(*parts, whole, strict=True))
    with pytest.raises(ConfigError, match="multiple of 7"):
        next(stored.batches(120, part=(0, 7)))


def test_processes_open_their_shards_only(tmp_path):
    x = torch.randn(1000, 8)
    store_tensor(x, tmp_path / "s", rows_per_shard=170)
    seen = []
    for rank in range(3):
        mine = shutil.copytree(tmp_path / "s", tmp_path / f"node{rank}")
        for number in range(6):
            if number % 3 != rank:
                (mine / f"shard-{number:05d}.safetensors").unlink()
        stored = ActivationStore(mine, shards=(rank, 3))
        assert stored.n_tokens == sum(min(170, 1000 - 170 * number) for number in range(rank, 6, 3))
        epoch = list(stored.batches(30, epochs=1, part=(rank, 3)))
        assert {len(batch) for batch in epoch} == {10}
        seen.append(torch.cat(epoch) / stored.scale)
        with pytest.raises(ConfigError, match="part"):
            next(stored.batches(30))
    rows = {tuple(row) for row in torch.cat(seen).mul(1e4).round().tolist()}
    assert len(rows) >= 985
    assert rows <= {tuple(row) for row in x.mul(1e4).round().tolist()}
    with pytest.raises(FormatError, match="missing"):
        ActivationStore(tmp_path / "node0")
    with pytest.raises(ConfigError, match="6 shards for 9"):
        ActivationStore(tmp_path / "s", shards=(0, 9))


@pytest.mark.parametrize("window", [64, 300, 5000])
def test_windows_cover_an_epoch_and_any_place_is_found(window):
    shards = [100, 70, 130, 0, 55, 145]
    order = EpochOrder(shards, seed=4, window=window)
    whole = order.rows(0, 500)
    assert sorted(whole.tolist()) == list(range(500))
    assert whole.tolist() != list(range(500))
    for first, last in ((490, 500), (0, 3), (95, 310), (299, 301)):
        assert torch.equal(EpochOrder(shards, seed=4, window=window).rows(first, last), whole[first:last])
        assert torch.equal(order.rows(first, last), whole[first:last])
    assert not torch.equal(EpochOrder(shards, seed=5, window=window).rows(0, 500), whole)
    if window == 5000:
        assert torch.equal(whole, torch.randperm(500, generator=torch.Generator().manual_seed(4)))
    if window == 64:  # rows come from windows of whole shards, in random order of the shards
        first = set((torch.bucketize(whole[:64], torch.tensor(shards).cumsum(0), right=True)).tolist())
        assert len(first) <= 2


@pytest.mark.parametrize("depth", [1, 3])
def test_reading_ahead_changes_nothing_and_ends_with_the_reader(tmp_path, depth):
    stored = store_tensor(torch.randn(300, 8), tmp_path / "s", rows_per_shard=100)
    ahead = list(stored.batches(64, seed=1, epochs=3, start=2, prefetch=depth))
    plain = list(stored.batches(64, seed=1, epochs=3, start=2, prefetch=0))
    assert all(torch.equal(a, b) for a, b in zip(ahead, plain, strict=True))
    made = []

    def items():
        for number in range(100):
            made.append(number)
            yield number

    reader = prefetched(items, depth)
    assert next(reader) == 0
    time.sleep(0.1)
    assert 1 <= len(made) <= depth + 2
    reader.close()
    assert not [one for one in threading.enumerate() if one.name == "rsae-prefetch"]

    def broken():
        yield 1
        raise FormatError("shard-00003 is bad")

    reader = prefetched(broken, depth)
    assert next(reader) == 1
    with pytest.raises(FormatError, match="shard-00003"):
        next(reader)


@pytest.mark.parametrize("change", ["width", "dtype", "rows", "name"])
def test_a_foreign_shard_of_the_right_size_is_named_even_unverified(tmp_path, change):
    stored = store_tensor(torch.randn(64, 8), tmp_path / "s", rows_per_shard=32)
    path = stored.folder / "shard-00001.safetensors"
    rows = load_file(path)["activations"]
    changed = {"width": rows.view(16, 16), "dtype": rows.view(torch.int32), "rows": rows[:31], "name": rows}[change]
    save_file({"weights" if change == "name" else "activations": changed.contiguous()}, path)
    manifest = json.loads((stored.folder / "manifest.json").read_text())
    manifest["files"][path.name]["bytes"] = path.stat().st_size
    (stored.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match=r"shard-00001.* instead of \(32, 8\) float32"):
        ActivationStore(stored.folder, verify=False).tensor()


def test_store_tensor_keeps_values_and_metadata_and_refuses_bad_tensors(tmp_path):
    x = 3 * torch.randn(50, 8)
    stored = store_tensor(x.bfloat16(), tmp_path / "s", provenance={"hook_name": "mine"})
    assert torch.allclose(stored.tensor() / stored.scale, x, rtol=1e-2)
    assert float(stored.tensor().norm(dim=1).mean()) == pytest.approx(8**0.5, rel=1e-3)
    assert stored.manifest["hook_name"] == "mine"
    for name in ("sequences", "document_info", "tokens"):
        with pytest.raises(FormatError, match="has no text"):
            getattr(stored, name)
    for bad, error in ((x[0], ShapeError), (x * torch.inf, NumericsError), (0 * x, NumericsError)):
        with pytest.raises(error):
            store_tensor(bad, tmp_path / "t")
    with pytest.raises(ConfigError, match="there already"):
        store_tensor(x, tmp_path / "s")


def test_the_command_prints_the_folders(llama, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    for number in range(12):
        text = " ".join(["king queen stone ravens sang bread rain snow"[: 8 + number % 5 * 7]] * 60)
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    arguments = ["extract", "--model", str(llama), "--text", str(tmp_path / "texts"), "--tokens", "300"]
    arguments += ["--context", "16", "--hook", *HOOKS[:2], "--root", str(tmp_path / "stores"), "--whole-text"]
    assert main(arguments) == 0
    first, second = (ActivationStore(line) for line in capsys.readouterr().out.splitlines()[-2:])
    assert [one.manifest["hook_name"] for one in (first, second)] == HOOKS[:2]
    assert first.n_tokens == second.n_tokens == 300
    assert main([*arguments, "--tokens", "0"]) == 2
