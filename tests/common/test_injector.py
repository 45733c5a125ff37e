"""Every writer, killed or refused at every call to the file system: afterwards there is the old or the new, whole.

A sample of the calls in `make test`, all of them in `make faults` (FAULTS=all), which also prints the counts for
docs/reliability.md.
"""

import ast
import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import ClassVar

import injector
import pytest
import tiny_models
import torch

from rsae_triton import FusedRationalSAE, train
from rsae_triton.activations import ActivationStore, extract, load_corpus, load_host, store_tensor
from rsae_triton.common.errors import FormatError
from rsae_triton.common.files import write_atomically, write_text
from rsae_triton.experiments.sweep import read_cell, write_cell
from rsae_triton.remez import fit_gate
from rsae_triton.remez.table import write_table
from rsae_triton.sae.card import CARD_FILE
from rsae_triton.teachers import ReluSAE, load_teacher
from rsae_triton.training.checkpoints import Checkpoints
from rsae_triton.training.resuming import restore

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and signals")
ALL = os.environ.get("FAULTS") == "all"
SAMPLE = 5  # calls a writer, spread over it, each of another kind
X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
COUNTS = {"tried": 0, "held": 0}


def relu(version):
    sae = ReluSAE(4, 8, generator=torch.Generator().manual_seed(version), metadata={"hook_name": f"place {version}"})
    with torch.no_grad():
        sae.b_enc.fill_(version)
    return sae


class Writer:
    """What is written into a folder as version 0 and then 1, and which version is read there (None: none)."""

    first = False  # whether version 0 is not written at all

    def prepare(self, folder):
        """Before anything is injected."""

    def write(self, folder, version):
        raise NotImplementedError

    def read(self, folder):
        raise NotImplementedError


class Sae(Writer):
    def write(self, folder, version):
        relu(version).save_pretrained(folder / "sae")

    def read(self, folder):
        if not (folder / "sae" / "sae_weights.safetensors").exists():
            return None
        sae = load_teacher(folder / "sae")
        assert sae.metadata["hook_name"] == f"place {int(sae.b_enc[0])}"
        card = folder / "sae" / CARD_FILE
        assert not card.exists() or card.read_text().endswith("```\n")
        return int(sae.b_enc[0])


class FirstSae(Sae):
    first = True


class RationalSae(Writer):
    def write(self, folder, version):
        form = ("gated", "direct")[version]
        FusedRationalSAE(4, 8, form=form, generator=torch.Generator()).save_pretrained(folder)

    def read(self, folder):
        return ("gated", "direct").index(FusedRationalSAE.from_pretrained(folder).gate.form)


class Text(Writer):
    def write(self, folder, version):
        write_text(folder / "report.html", f"{version}" * 1000)

    def read(self, folder):
        text = (folder / "report.html").read_text()
        assert len(text) == 1000
        return int(text[0])


class Bytes(Writer):
    def write(self, folder, version):
        write_atomically(folder / "figure.png", lambda path: path.write_bytes(bytes([version]) * 999))

    def read(self, folder):
        data = (folder / "figure.png").read_bytes()
        assert len(data) == 999
        return data[0]


class Cell(Writer):
    def write(self, folder, version):
        write_cell(folder / "cells" / "a.json", {"cell": version, "scores": {}, "stage1": {}})

    def read(self, folder):
        return read_cell(folder / "cells" / "a.json")["cell"]


class Table(Writer):
    def prepare(self, folder):
        self.fits = [fit_gate("relu", (3, 2)), fit_gate("relu", (5, 4))]

    def write(self, folder, version):
        write_table(self.fits[: version + 1], folder / "table.json")

    def read(self, folder):
        return len(json.loads((folder / "table.json").read_text())["fits"]) - 1


class Stored(Writer):
    first = True

    def write(self, folder, version):
        if not (folder / "store").exists():
            store_tensor(X + version, folder / "store", rows_per_shard=32)
        write_text(folder / "beside", "")  # whatever is written next takes away what a killed writer left

    def read(self, folder):
        if not (folder / "store").exists():
            return None
        store = ActivationStore(folder / "store", verify=True)
        assert torch.allclose(store.tensor() / store.scale, X + 1, atol=1e-5)
        return 1


class Extracted(Writer):
    """A run that was killed goes on at the next shard; what it ends with is the same store."""

    first = True

    def prepare(self, folder):
        from rsae_triton.activations import writing

        writing._SHARD_BYTES = 40 * 32 * 4
        source = folder.with_name(folder.name + "-model")
        (source / "text").mkdir(parents=True, exist_ok=True)
        self.documents = load_corpus([str(tiny_models.text(source / "text", n_files=2, n_words=120))])
        self.host = load_host(str(tiny_models.saved(tiny_models.llama(), source)), dtype="float32")
        self.whole = self.make(folder.with_name(folder.name + "-whole"))

    def make(self, root):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return extract(self.host, self.documents, n_tokens=100, context=16, root=root, progress=False,
                           dtype="float32", drop_outliers=None)  # fmt: skip

    def write(self, folder, version):
        self.make(folder)
        write_text(folder / "beside", "")

    def read(self, folder):
        found = [
            path
            for path in folder.iterdir()
            if path.is_dir() and (path / "manifest.json").exists() and path.name[0] != "."
        ]
        if not found:
            return None
        assert torch.equal(ActivationStore(found[0], verify=True).tensor(), self.whole.tensor())
        return 1


class Checkpointed(Writer):
    """Version 0 is a run of two steps, 1 the same run gone on with to four; what is read is what resuming finds."""

    options: ClassVar = {"batch_size": 16, "checkpoint_every": 2, "progress": False, "keep": 1, "log_every": 1,
                         "steps": 4, "recipe": "relu"}  # fmt: skip

    class Ends:
        d_in = 4

        def __init__(self, at):
            self.at = at

        def batches(self, batch_size, *, seed, start=0):
            for number in range(start, 100):
                if number == self.at:
                    raise FormatError("the end")
                yield X[:batch_size] + number

    def write(self, folder, version):
        data = self.Ends((2, None)[version])
        try:
            train(relu(0), data, out=folder / "run", resume=True, **self.options)
        except FormatError as error:
            if "the end" not in str(error):
                raise

    def read(self, folder):
        checkpoints = Checkpoints(folder / "run")
        found = []

        class Run:
            step, controller, norms = 0, None, None

        from rsae_triton.common.checkpoint import read_info, read_state

        for step in checkpoints.steps():
            assert read_info(checkpoints.path(step))["step"] == step  # none is half
            tensors = read_state(checkpoints.path(step))
            assert all(bool(one.isfinite().all()) for one in tensors.values() if one.is_floating_point())
            found.append(step)
        assert callable(restore)
        return {2: 0, 4: 1}[found[-1]] if found else None


WRITERS = {
    "an SAE": Sae, "an SAE, the first": FirstSae, "a Rational SAE": RationalSae, "a report": Text, "a figure": Bytes,
    "a cell of a sweep": Cell, "a table of gates": Table, "a store": Stored, "an extraction": Extracted,
    "a checkpoint": Checkpointed,
}  # fmt: skip


def leftovers(folder):
    names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    return [one for one in names if ".rsae-" in one or ".partial" in one or "/.step-" in one or one.endswith(".tmp")]


@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_leaves_the_old_or_the_new(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    writer = WRITERS[name]()
    origin = tmp_path / "origin"
    origin.mkdir()
    writer.prepare(origin)
    if not writer.first:
        writer.write(origin, 0)
        assert writer.read(origin) == 0
    old = None if writer.first else 0

    def fresh():
        folder = tmp_path / "here"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(origin, folder)
        return folder

    folder = fresh()
    whole = injector.run(lambda: writer.write(folder, 1), folder)
    assert whole.said == "ok"
    assert writer.read(folder) == 1
    assert leftovers(folder) == []
    assert whole.calls >= 5
    step = 1 if ALL else max(1, whole.calls // SAMPLE)
    for number in range(1 if ALL else step, whole.calls + 1, step):
        for kind in injector.KINDS if ALL else (injector.KINDS[number // step % len(injector.KINDS)],):
            folder = fresh()
            where = f"{name}: {kind} at call {number} of {whole.calls}"
            COUNTS["tried"] += 1
            outcome = injector.run(lambda folder=folder: writer.write(folder, 1), folder, number, kind)
            assert outcome.ours, f"{where}: {outcome.said}"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the pair is found in the weights' file, and that is said
                found = writer.read(folder)
            assert found in (old, 1), where
            assert outcome.said != "ok" or found == 1, where
            again = injector.run(lambda folder=folder: writer.write(folder, 1), folder)
            assert again.said == "ok", f"{where}, and then: {again.said}"
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert writer.read(folder) == 1, where
            assert leftovers(folder) == [], where
            COUNTS["held"] += 1
    print(f"\n{name}: {whole.calls} calls; so far {COUNTS['tried']} tried, {COUNTS['held']} held")


# -- and there is no other door

ROOT = Path(__file__).parents[2] / "rsae_triton"
# Modules that write into a folder which is not there yet under its name, or append to a log.
INSIDE = {
    "common/files.py": "the door",
    "activations/writing.py": "shards of a partial folder, published when whole",
    "activations/from_tensor.py": "whole_folder",
    "activations/dequantise.py": "whole_folder",
    "activations/downloads.py": "parts that go on where they broke off, compared with a checksum",
    "training/checkpoints.py": "a temporary folder, published when whole",
    "training/metrics.py": "a log that grows by lines",
}
WRITING = {"write_text", "write_bytes", "savefig", "save_file", "replace", "rename", "symlink_to", "hardlink_to"}


def writes(path):
    """Lines that write, outside of what is handed to the door as a function."""
    tree = ast.parse(path.read_text())
    handed = {id(inner) for one in ast.walk(tree) if isinstance(one, ast.Lambda) for inner in ast.walk(one)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or id(node) in handed:
            continue
        name = ast.unparse(node.func)
        last = name.rpartition(".")[2]
        mode = [one.value for one in node.args[1:2] if isinstance(one, ast.Constant)] if last == "open" else []
        opened = any(isinstance(one, str) and set(one) & set("wax+") for one in mode)
        of_paths = last in WRITING and name not in ("write_text", "replace") and not name.startswith("dataclasses.")
        renames = last in ("replace", "rename")
        if opened or (of_paths and (not renames or name.startswith(("os.", "path.", "partial.", "temporary.")))):
            yield f"{path.relative_to(ROOT)}:{node.lineno} {name}"


def test_everything_is_written_through_one_door():
    found = [line for path in sorted(ROOT.rglob("*.py")) for line in writes(path)]
    assert any(line.startswith("common/files.py") for line in found)
    outside = [line for line in found if line.partition(":")[0] not in INSIDE]
    # Figures are drawn into memory first.
    outside = [line for line in outside if not line.startswith(("report/svg.py", "report/fronts.py"))]
    assert outside == []
