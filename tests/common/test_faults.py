"""The machine fails in the middle: nothing that was there is lost, nothing half is left, the next run recovers.

Killed and full-disk training is in test_checkpoints.py, killed extraction in tests/activations/test_store.py.
"""

import ctypes
import hashlib
import http.server
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from valid_files import store

from rsae_triton import FusedRationalSAE, train
from rsae_triton.activations import ActivationStore, downloads
from rsae_triton.activations.downloads import Download, cache_dir, fetch
from rsae_triton.commands.cli import main
from rsae_triton.common.errors import FormatError, SourceError, StorageError
from rsae_triton.common.files import write_text, write_together
from rsae_triton.experiments import demo
from rsae_triton.training import loop

CONTENT = bytes(range(256)) * 2000
HALF = len(CONTENT) // 2
linux = pytest.mark.skipif(sys.platform != "linux", reason="forks and limits of Linux")


def sae(seed=0, d_sae=8):
    return FusedRationalSAE(4, d_sae, form="gated", generator=torch.Generator().manual_seed(seed))


def everything(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def in_a_child(action):
    """Runs `action` in a forked process and returns the text it returns; the process may limit itself first."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        # The threads of OpenMP stayed behind; work shared with them would be waited for for ever.
        torch.set_num_threads(1)
        signal.alarm(120)
        try:
            text = str(action())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writer, text.encode()[:60_000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        text = stream.read().decode()
    os.waitpid(child, 0)
    return text


def limited_to(size, action):
    """`action` where no file may grow beyond `size` bytes: what a full disk is to a program."""

    def run():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return action()

    return in_a_child(run)


# -- a full disk


@linux
@pytest.mark.parametrize("size", [0, 300, 1000])
def test_a_full_disk_leaves_the_saved_sae_as_it_was(tmp_path, size):
    sae(0).save_pretrained(tmp_path / "sae")
    before = everything(tmp_path)
    said = limited_to(size, lambda: sae(1).save_pretrained(tmp_path / "sae"))
    assert said.startswith("StorageError: ")
    assert "sae_weights.safetensors" in said or "cfg.json" in said
    assert "untouched" in said
    assert everything(tmp_path) == before
    sae(1).save_pretrained(tmp_path / "sae")
    assert torch.equal(FusedRationalSAE.from_pretrained(tmp_path / "sae").W_enc, sae(1).W_enc)


@linux
def test_a_full_disk_leaves_a_report_as_it_was(tmp_path):
    write_text(tmp_path / "report.html", "old")
    said = limited_to(1000, lambda: write_text(tmp_path / "report.html", "x" * 5000))
    assert said.startswith("StorageError: ")
    assert everything(tmp_path) == {"report.html": b"old"}


def mount_tmpfs(folder, size):
    """A file system of `size` bytes at `folder` for this process alone; root's right, or that of a user namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, new_user, private = 0x00020000, 0x10000000, 0x40000 | 0x4000
    if libc.unshare(new_namespace) and libc.unshare(new_namespace | new_user):
        raise PermissionError(ctypes.get_errno(), "no mount namespace")
    if libc.mount(b"none", b"/", None, private, None) or libc.mount(
        b"tmpfs", str(folder).encode(), b"tmpfs", 0, b"size=%d" % size
    ):
        raise PermissionError(ctypes.get_errno(), "no tmpfs")


@linux
@pytest.mark.parametrize("what", ["an SAE", "a checkpoint"])
def test_a_file_system_that_is_full_loses_nothing(tmp_path, what):
    """256 KiB of tmpfs: the kernel says ENOSPC in the middle of a write, and there is room again afterwards."""

    def fill():
        mount_tmpfs(tmp_path, 1 << 18)
        folder, x = tmp_path / "sae", torch.randn(64, 4, generator=torch.Generator().manual_seed(3))
        options = {"batch_size": 16, "checkpoint_every": 1, "progress": False, "keep": 1, "out": tmp_path / "run"}
        if what == "an SAE":
            sae(0).save_pretrained(folder)
        else:
            train(sae(0), x, steps=1, **options)
        before, full = everything(tmp_path), ""
        room = os.statvfs(tmp_path)
        loop.check_room = lambda *_: None  # there was room when it was looked at
        (tmp_path / "other").write_bytes(bytes(room.f_bavail * room.f_frsize - 20_000))  # somebody else's
        try:
            if what == "an SAE":
                sae(1, d_sae=2048).save_pretrained(folder)
            else:
                train(sae(0, d_sae=512), x, steps=1, **{**options, "out": tmp_path / "wide"})
        except StorageError as error:
            full = str(error)
        assert "No space left on device" in full, full
        (tmp_path / "other").unlink()
        assert {name: data for name, data in everything(tmp_path).items() if name in before} == before
        if what == "an SAE":
            assert everything(tmp_path) == before
            sae(1).save_pretrained(folder)
            assert torch.equal(FusedRationalSAE.from_pretrained(folder).W_enc, sae(1).W_enc)
        else:
            train(sae(0, d_sae=512), x, steps=1, **{**options, "out": tmp_path / "wide", "resume": True})
        return "nothing lost"

    said = in_a_child(fill)
    if said.startswith("PermissionError: [Errno 1]"):
        pytest.skip(f"no file system can be mounted here: {said}")
    assert said == "nothing lost"


def test_a_demo_looks_for_room_before_it_reads_any_text(tmp_path, monkeypatch, capsys):
    model = tiny_models.saved(tiny_models.llama(), tmp_path / "model")
    monkeypatch.setattr(demo, "load_corpus", lambda _: pytest.fail("the text was read"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    out = tmp_path / "out" / "demo"
    assert main(["demo", "--model", str(model), "--d-sae", "64", "--out", str(out)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"what the demo saves takes {7 * 2 * 64 * 32 * 4:,} bytes, and {out} has 1,000 free" in said
    assert not out.exists()


@linux
def test_a_log_that_cannot_grow_ends_the_run_and_resuming_goes_on(tmp_path):
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(3))
    options = {"steps": 400, "batch_size": 16, "log_every": 1, "progress": False, "out": tmp_path / "run"}
    options |= {"checkpoint_every": 20, "seed": 1}
    one = sae()
    said = limited_to(30_000, lambda: train(one, x, **options))
    assert said.startswith("StorageError: ")
    assert "metrics.jsonl cannot be written" in said
    assert "resume" in said
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    resumed, whole = sae(), sae()
    train(resumed, x, **options, resume=True)
    train(whole, x, **{**options, "out": tmp_path / "whole"})
    assert torch.equal(resumed.W_enc, whole.W_enc)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 400


def test_files_that_belong_together_are_replaced_together(tmp_path):
    write_together(tmp_path, {"a": lambda path: path.write_text("1"), "b": lambda path: path.write_text("1")})

    def fail(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"b cannot be written \(No space left on device\)"):
        write_together(tmp_path, {"a": lambda path: path.write_text("2"), "b": fail})
    assert everything(tmp_path) == {"a": b"1", "b": b"1"}


@linux
def test_two_processes_saving_into_one_folder_leave_a_matching_pair(tmp_path, monkeypatch):
    """Not the weights of one beside the configuration of the other."""
    replace, chance = os.replace, random.Random(0)

    def slowly(source, target):
        replace(source, target)
        time.sleep(chance.random() / 100)

    monkeypatch.setattr(os, "replace", slowly)
    for _ in range(5):
        saes = [sae(d_sae=d_sae) for d_sae in (8, 16, 24)]
        threads = [threading.Thread(target=one.save_pretrained, args=(tmp_path,)) for one in saes]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        assert FusedRationalSAE.from_pretrained(tmp_path).d_sae in (8, 16, 24)
    assert everything(tmp_path).keys() == {"cfg.json", "sae_weights.safetensors", "README.md"}


# -- a cache that is not ours to write


def as_nobody(action):
    """`action` without the rights of root, for whom every folder is writable."""

    def run():
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        return action()

    return in_a_child(run)


@pytest.fixture
def public():
    """A folder that everybody can enter; pytest's own are root's."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)
        for path in [Path(name), *Path(name).rglob("*")]:
            if path.is_dir():
                path.chmod(0o755)


@linux
def test_a_read_only_cache_is_read_and_says_what_it_lacks(public, monkeypatch):
    monkeypatch.setenv("RSAE_CACHE", str(public / "cache"))
    pin = Download("file.bin", "http://127.0.0.1:9/x", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setitem(downloads.DOWNLOADS, "stub", pin)
    folder = public / "cache" / "downloads"
    folder.mkdir(parents=True)
    (folder / "file.bin").write_bytes(CONTENT)
    folder.chmod(0o555)
    before = everything(public)
    assert as_nobody(lambda: fetch("stub").read_bytes() == CONTENT) == "True"
    (folder / "file.bin").write_bytes(b"damaged")
    said = as_nobody(lambda: fetch("stub"))
    assert said.startswith("SourceError: ")
    assert "set RSAE_CACHE" in said
    assert everything(public).keys() == before.keys()


@linux
def test_a_folder_that_cannot_be_written_is_named(public):
    public.chmod(0o555)
    said = as_nobody(lambda: sae().save_pretrained(public / "sae"))
    assert said.startswith("StorageError: ")
    assert str(public / "sae") in said
    assert not (public / "sae").exists()


# -- the network goes away


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


@pytest.fixture
def network(monkeypatch, tmp_path):
    """A server of ranges; keeps where those began that it was asked for.

    While `network.works` is False it closes the connection in the middle, while `network.stalls` it sends no more.
    """
    monkeypatch.setenv("RSAE_CACHE", str(tmp_path / "cache"))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            start = int((self.headers["Range"] or "bytes=0-")[len("bytes=") :].rstrip("-"))
            self.server.asked.append(start)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(CONTENT) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
            self.end_headers()
            whole = self.server.works and not self.server.stalls
            self.wfile.write(CONTENT[start:] if whole else CONTENT[:HALF])
            while self.server.stalls:
                time.sleep(0.01)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.works, server.stalls = [], True, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pin = Download("file.bin", f"http://127.0.0.1:{server.server_port}/x", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setitem(downloads.DOWNLOADS, "stub", pin)
    yield server
    server.shutdown()
    server.server_close()


def test_a_connection_lost_in_the_middle_keeps_what_arrived_and_the_next_run_fetches_the_rest(network):
    network.works = False
    with pytest.raises(SourceError, match="check the connection"):
        fetch("stub")
    part = cache_dir() / "downloads" / "file.bin.part"
    arrived = part.stat().st_size
    assert HALF - downloads._CHUNK < arrived <= HALF
    network.works = True
    assert fetch("stub").read_bytes() == CONTENT
    assert fetch("stub").read_bytes() == CONTENT
    assert network.asked == [0, arrived]
    assert not part.exists()


@linux
def test_a_download_that_is_killed_goes_on_where_it_was(network):
    network.stalls = True
    child = os.fork()
    if child == 0:
        fetch("stub")
        os._exit(0)
    part = cache_dir() / "downloads" / "file.bin.part"
    wait_for(lambda: part.exists() and part.stat().st_size > HALF - downloads._CHUNK)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    arrived, network.stalls = part.stat().st_size, False
    assert fetch("stub").read_bytes() == CONTENT
    assert network.asked == [0, arrived]


@linux
def test_two_processes_on_one_cache_download_once(network):
    children = []
    for _ in range(2):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writer, b"whole" if fetch("stub").read_bytes() == CONTENT else b"half")
            os._exit(0)
        os.close(writer)
        children.append((child, reader))
    for child, reader in children:
        with os.fdopen(reader, "rb") as stream:
            assert stream.read() == b"whole"
        os.waitpid(child, 0)
    assert network.asked == [0]


# -- a shard torn by a crash, a clock that jumps


@pytest.mark.parametrize("tear", [lambda data: data[: len(data) // 2], lambda data: data[:-40] + bytes(40)])
def test_a_torn_shard_is_found_when_the_store_is_opened(tmp_path, tear):
    store(tmp_path)
    shard = tmp_path / "shard-00000.safetensors"
    shard.write_bytes(tear(shard.read_bytes()))
    with pytest.raises(FormatError, match=r"shard-00000\.safetensors.*extract again"):
        ActivationStore(tmp_path)


def test_a_clock_that_jumps_changes_no_number(tmp_path, monkeypatch):
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(3))
    weights = []
    for jumps in (False, True):
        one = sae()
        with monkeypatch.context() as patch:
            if jumps:
                clock = iter(range(10**9, 0, -3600))
                for name in ("time", "perf_counter", "monotonic"):
                    patch.setattr(time, name, lambda clock=clock: float(next(clock)))
            out = tmp_path / str(jumps)
            train(one, x, steps=6, batch_size=16, progress=jumps, out=out, checkpoint_every=2, log_every=2)
        weights.append(one.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
