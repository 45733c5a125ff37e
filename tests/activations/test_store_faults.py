"""Stores that lie about themselves, are replaced while they are read, or have two writers; what memory they take."""

import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
import threading
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from safetensors.torch import save_file

from rsae_triton import train
from rsae_triton.activations import ActivationStore, extract, load_corpus, load_host, store_tensor
from rsae_triton.common import files
from rsae_triton.common.errors import ConfigError, FormatError, StorageError
from rsae_triton.teachers import ReluSAE

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))


def rewritten(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


@pytest.mark.parametrize("rows", [2**40, 2**63])
def test_a_manifest_that_claims_missing_rows_is_refused_at_once(tmp_path, rows):
    """With prefetch= too, where a thread would take memory for their order before a shard is looked at."""
    store = store_tensor(X, tmp_path / "s")
    rewritten(store.folder, shards=[{**store.manifest["shards"][0], "rows": rows}], n_tokens=rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError, match=r"claims \d+ rows in shard-00000"):
        next(ActivationStore(store.folder).batches(8, prefetch=1))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10


def test_room_is_looked_at_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match=rf"the store takes 1,024 bytes, and {tmp_path}/a/s has 1,000 free"):
        store_tensor(X, tmp_path / "a" / "s")
    assert list(tmp_path.iterdir()) == []
    store_tensor(X[:60], tmp_path / "s")
    # A file system that does not say how much is free is written to.
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: (_ for _ in ()).throw(OSError))
    store_tensor(X, tmp_path / "t")


def test_room_is_looked_at_before_an_extraction(tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    host = load_host(str(tiny_models.saved(tiny_models.llama(), tmp_path / "model")), dtype="float32")
    documents = load_corpus([str(tiny_models.text(tmp_path / "text", n_files=2, n_words=120))])
    free = 100 * (32 * 4 + 16)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    options = {"context": 16, "root": tmp_path / "stores", "progress": False, "dtype": "float32"}
    read = []
    residuals = type(host).residuals
    monkeypatch.setattr(type(host), "residuals", lambda self, *rest: read.append(1) or residuals(self, *rest))
    with pytest.raises(StorageError, match=r"what is left to extract takes 14,544 bytes, and .*stores has 14,400 free"):
        extract(host, documents, n_tokens=101, **options)
    assert read == []
    assert len(extract(host, documents, n_tokens=100, **options)) == 100
    # Of a text that ends before, what it can hold counts.
    free = 4 * sum(len(one.text) for one in documents) * (32 * 4 + 16)
    with pytest.warns(UserWarning, match="text ended after"):
        extract(host, documents, n_tokens=10**9, **options)


def test_room_is_looked_at_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=900))
    sae = ReluSAE(4, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(StorageError, match=r"a checkpoint takes 912 bytes, and .* has 900 free"):
        train(sae, X, steps=2, batch_size=16, out=tmp_path / "run", progress=False)
    assert list(tmp_path.iterdir()) == []
    train(sae, X, steps=2, batch_size=16, progress=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"seqpos_slice": "x"}, {"seqpos_slice": [1, 2, 0]}, {"seqpos_slice": [1, "a"]}, {"seqpos_slice": []},
        {"exclude_tokens": {"a": 1}}, {"exclude_tokens": [2**70]}, {"prepend_bos": 3}, {"scale": 1e40},
        {"scale": 1e-60},
    ],
)  # fmt: skip
def test_invalid_positions_and_scales_in_a_manifest_are_refused(tmp_path, changes):
    store = store_tensor(X, tmp_path / "s")
    rewritten(store.folder, **changes)
    with pytest.raises(FormatError, match=r"positions|scale"):
        ActivationStore(store.folder)


def test_a_mean_that_is_not_finite_is_refused(tmp_path):
    store = store_tensor(X, tmp_path / "s")
    mean = store.folder / "mean.safetensors"
    save_file({"mean": torch.full((4,), float("nan"))}, mean)
    entry = {"bytes": mean.stat().st_size, "sha256": files.file_sha256(mean)}
    rewritten(store.folder, files={**store.manifest["files"], mean.name: entry})
    with pytest.raises(FormatError, match=r"mean\.safetensors holds NaN"):
        _ = ActivationStore(store.folder).mean


def test_text_that_is_no_documents_is_named_and_a_long_name_is_cut(tmp_path):
    (tmp_path / "text").mkdir()
    model = tmp_path / ("m" * 250)
    host = load_host(str(tiny_models.saved(tiny_models.llama(), model)), dtype="float32")
    options = {"context": 16, "root": tmp_path / "stores", "progress": False}
    with pytest.raises(ConfigError, match="documents holds a str; give what load_corpus returns"):
        extract(host, ["w1 w2 w3"], n_tokens=20, **options)
    documents = load_corpus([str(tiny_models.text(tmp_path / "text", n_files=2, n_words=120))])
    assert len(extract(host, documents, n_tokens=20, **options)) == 20


def test_a_shard_is_listed_once(tmp_path):
    store = store_tensor(X, tmp_path / "s")
    rewritten(store.folder, shards=store.manifest["shards"] * 1000, n_tokens=64_000)
    with pytest.raises(FormatError, match="lists a shard more than once"):
        ActivationStore(store.folder)


@pytest.mark.parametrize("changes", [{"dtype": "float8_e4m3fn"}, {"dtype": 3}, {"dtype": "int64"}])
def test_an_unknown_dtype_in_a_manifest_is_refused(tmp_path, changes):
    store = store_tensor(X, tmp_path / "s")
    rewritten(store.folder, **changes)
    with pytest.raises(FormatError, match="dtype"):
        ActivationStore(store.folder)


def test_a_name_longer_than_a_file_can_have(tmp_path):
    store = store_tensor(X, tmp_path / "s")
    rewritten(store.folder, files={**store.manifest["files"], "y" * 300: {"bytes": 1, "sha256": ""}})
    with pytest.raises(FormatError, match="longer than"):
        ActivationStore(store.folder)
    with pytest.raises(ConfigError, match="255 bytes"):
        ActivationStore("x" * 300)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    store = store_tensor(X, tmp_path / "s")
    shard = store.folder / "shard-00000.safetensors"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match="outside its folder"):
        ActivationStore(store.folder)


@pytest.mark.parametrize("read", ["before", "after"])
def test_a_store_made_anew_is_not_read_with_the_old_scale(tmp_path, read):
    store_tensor(X, tmp_path / "s")
    opened = ActivationStore(tmp_path / "s")
    if read == "before":
        assert torch.equal(next(opened.batches(64, epochs=1)).norm(dim=1).mean().round(), torch.tensor(2.0))
    shutil.rmtree(tmp_path / "s")
    store_tensor(5 * X + 3, tmp_path / "s")
    if read == "before":  # in memory, or mapped: the old rows
        assert abs(float(next(opened.batches(64, epochs=1)).norm(dim=1).mean()) - 2) < 0.01
    else:
        with pytest.raises(FormatError, match="when the store was opened"):
            opened.tensor()


def test_of_two_writers_of_one_store_one_wins(tmp_path, monkeypatch):
    """Both are in the middle of their shards at once; the store is whole and of one of them."""
    publish, meeting, said = files.publish, threading.Barrier(2, timeout=60), []

    def together(partial, final):
        meeting.wait()
        publish(partial, final)

    monkeypatch.setattr(files, "publish", together)

    def write(number):
        try:
            store_tensor(X + number, tmp_path / "s", rows_per_shard=16)
            said.append(number)
        except ConfigError as error:
            said.append(str(error))

    threads = [threading.Thread(target=write, args=(number,)) for number in (1, 2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    (winner,) = (one for one in said if isinstance(one, int))
    assert any("is there already" in one for one in said if isinstance(one, str))
    found = ActivationStore(tmp_path / "s", verify=True)
    assert torch.allclose(found.tensor() / found.scale, X + winner, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    (tmp_path / ".rsae-0123abcd.tmp" / "s").mkdir(parents=True)
    store_tensor(X, tmp_path / "s")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_the_umask_is_honoured(tmp_path):
    before = os.umask(0o027)
    try:
        store = store_tensor(X, tmp_path / "s")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in store.folder.iterdir()} == {0o640}


def test_a_store_takes_memory_for_a_shard_and_not_for_all_rows(tmp_path):
    """Rows in a file mapped into memory, 64 MiB of float16, shards of 4 MiB: what is taken besides the mapping."""
    code = """
        import sys, threading, time
        import numpy as np, torch
        from rsae_triton.activations import store_tensor
        def anonymous():
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
        rows = np.memmap(sys.argv[1], dtype=np.float16, mode="w+", shape=(1 << 18, 128))
        rows[:] = np.random.default_rng(0).standard_normal(128)
        x = torch.from_numpy(rows)
        store_tensor(x[:99], sys.argv[2] + "0")
        before, peak, ended = anonymous(), [0], []
        def watch():
            while not ended:
                peak[0] = max(peak[0], anonymous() - before)
                time.sleep(0.002)
        watcher = threading.Thread(target=watch)
        watcher.start()
        store_tensor(x, sys.argv[2], rows_per_shard=1 << 14)
        ended.append(1)
        watcher.join()
        print(peak[0] // 1024)
    """
    arguments = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        textwrap.dedent(code),
        str(tmp_path / "rows"),
        str(tmp_path / "s"),
    ]
    taken = int(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)
    assert taken < 40, taken
