"""What the package keeps in its cache, as writers for the fault injector (`writers.py`)."""

import hashlib
import json
import os
import subprocess
import warnings
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import numpy as np
import tiny_models
import torch
from safetensors.torch import load_file

from rsae_triton.activations import Document, demo_corpus, dequantise, downloads
from rsae_triton.evaluation import probe_items
from rsae_triton.ops import native
from rsae_triton.ops.backends import kernels


class Writer:
    """What is written into a folder as version 0 and then 1, and which version is read there (None: none)."""

    first = False  # whether version 0 is not written at all
    optional = False  # whether a cache that takes nothing is done without

    def prepare(self, folder):
        """Before anything is injected."""

    def write(self, folder, version):
        raise NotImplementedError

    def read(self, folder):
        raise NotImplementedError


class File(Writer):
    """One file or several, each old or new for itself; the last is what is read. What they hold is what the same
    function writes elsewhere."""

    def __init__(self, make, *names, first=False, optional=False):
        self.make, self.names, self.first, self.optional = make, names, first, optional

    def prepare(self, folder):
        self.wanted = []
        for version in (0, 1):
            there = folder.with_name(f"{folder.name}-version-{version}")
            there.mkdir()
            # In this process, so that what has to be imported is, once.
            self.make(there, version)
            self.wanted.append({name: (there / name).read_bytes() for name in self.names})
        assert self.wanted[0] != self.wanted[1] or self.first

    def write(self, folder, version):
        self.make(folder, version)

    def read(self, folder):
        found = None
        for name in self.names:
            if not (folder / name).exists():
                assert self.first
                found = None
                continue
            data = (folder / name).read_bytes()
            found = next(version for version in (1, 0) if data == self.wanted[version][name])
        return found


def files(*names, **options):
    return lambda make: lambda: File(make, *names, **options)


@contextmanager
def cache_at(folder):
    with mock.patch.dict(os.environ, RSAE_CACHE=str(folder)):
        yield


def tuned(folder, version):
    with cache_at(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuning = kernels().autotune
        tuning._write(tuning.folder() / "kernel-0.json", {"key": {"a": "b"}, "tile": [version] * 6})


def corpus(folder, version):
    stubs = {"sys": SimpleNamespace(version="1"), "sysconfig": SimpleNamespace(get_paths=lambda: {"stdlib": "x"})}
    with cache_at(folder), mock.patch.multiple(demo_corpus, **stubs):
        found = demo_corpus._kept(lambda: iter([Document("text " * 500, "source", "title")]))
    assert found[0].title == "title"


CORPUS = f"corpus/python-{hashlib.sha256(b'1|1|x').hexdigest()[:16]}.json"


class Probes(Writer):
    """Rows that are read for a probe; a cache that takes none is done without."""

    first = optional = True

    def make(self, folder):
        tokens = torch.zeros(2, 3, dtype=torch.int64)
        items = probe_items.Items(tokens, torch.ones(2, 3, dtype=torch.bool), np.array([True, False]), ["a", "b"])
        host = SimpleNamespace(dtype="float32", default_hook="h", fingerprint=lambda: "f", residual=lambda _: ROWS)
        with cache_at(folder):
            return probe_items.read_rows(items, host).rows

    def write(self, folder, version):
        assert torch.equal(self.make(folder), ROWS.flatten(0, 1))

    def read(self, folder):
        found = list((folder / "probes").glob("*.safetensors")) if (folder / "probes").exists() else []
        for path in found:
            assert torch.equal(load_file(path)["rows"], ROWS.flatten(0, 1))
        return 1 if found else None


ROWS = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


class Compiled(Writer):
    """The loops in C++, by a compiler that copies; a cache that takes none is done without."""

    first = optional = True

    def prepare(self, folder):
        self.program = folder.with_name("compiler")
        library = folder.with_name("library.so")
        subprocess.run(["cc", "-shared", "-x", "c", "/dev/null", "-o", str(library)], check=True)
        self.whole = library.read_bytes()
        # Called as: compiler --version, and as: compiler ... -o FILE.
        self.program.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && exit\nfor file; do :; done\ncp {library} "$file"\n'
        )
        self.program.chmod(0o755)

    def write(self, folder, version):
        with cache_at(folder):
            native._built(str(self.program))

    def read(self, folder):
        found = list((folder / "native").glob("*.so")) if (folder / "native").exists() else []
        assert all(one.read_bytes() == self.whole for one in found)
        return 1 if found else None


class Downloaded(Writer):
    """A file of 100 kB that comes in pieces; what arrived of it before a fault may stay as .part."""

    first = True
    whole = bytes(range(250)) * 400

    def write(self, folder, version):
        pinned = downloads.Download("file.bin", "http://x", hashlib.sha256(self.whole).hexdigest())
        with cache_at(folder), mock.patch.dict(downloads.DOWNLOADS, stub=pinned), mock.patch("requests.get", self.get):
            downloads.fetch("stub")

    def get(self, url, headers, **_):
        start = int(headers.get("Range", "bytes=0-")[6:-1])
        answer = mock.MagicMock(status_code=416 if start >= len(self.whole) else 206 if start else 200)
        answer.headers = {"Content-Range": f"bytes {start}-99999/100000"} if start else {}
        answer.iter_content = lambda size: (self.whole[at : at + size] for at in range(start, len(self.whole), size))
        answer.__enter__ = lambda _: answer
        return answer

    def read(self, folder):
        path = folder / "downloads" / "file.bin"
        assert not path.exists() or path.read_bytes() == self.whole
        return 1 if path.exists() else None


class Dequantised(Writer):
    """A .gguf file as a folder of Hugging Face; what reads the file is left out."""

    first = True

    def prepare(self, folder):
        self.source = folder.with_name("gguf")
        self.source.mkdir()
        self.model = tiny_models.llama()
        self.tokenizer = tiny_models.tokenizer(self.source)
        (self.source / "m.gguf").write_bytes(b"GGUF")

    def write(self, folder, version):
        stubs = {"AutoModelForCausalLM": self.model, "AutoTokenizer": self.tokenizer}
        readers = {name: SimpleNamespace(from_pretrained=lambda *_, one=one, **__: one) for name, one in stubs.items()}
        with cache_at(folder), mock.patch.multiple("transformers", **readers):
            dequantise.gguf_model(self.source / "m.gguf")

    def read(self, folder):
        found = [one for one in (folder / "models").glob("m-*") if one.is_dir()]
        for one in found:
            state = load_file(one / "model.safetensors")
            assert all(torch.equal(state[name], self.model.state_dict()[name]) for name in state)
            assert json.loads((one / "config.json").read_text())["model_type"] == "llama"
            assert (one / "tokenizer.json").read_bytes() == (self.source / "tokenizer.json").read_bytes()
        return 1 if found else None


CACHES = {
    "a download": Downloaded,
    "a dequantised model": Dequantised,
    "the compiled loops": Compiled,
    "a tile that was found": files("autotune/kernel-0.json", optional=True)(tuned),
    "the demo's text": files(CORPUS, first=True, optional=True)(corpus),
    "rows for a probe": Probes,
}
