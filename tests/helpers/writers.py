"""Every writer of the package, for the fault injector: what it writes, and what is read of that."""

import warnings
from types import SimpleNamespace
from typing import ClassVar
from unittest import mock

import tiny_models
import torch
from cache_writers import CACHES, Writer, files
from matplotlib.figure import Figure
from torch import distributed

from rsae_triton import FusedRationalSAE, train
from rsae_triton.activations import (
    ActivationStore,
    extract,
    load_corpus,
    load_host,
    store_tensor,
)
from rsae_triton.commands.evaluate import write_json
from rsae_triton.common.checkpoint import is_sharded, read_info, read_state
from rsae_triton.common.errors import FormatError
from rsae_triton.common.files import write_text
from rsae_triton.experiments.sweep import write_cell
from rsae_triton.features import page as features
from rsae_triton.integrations.circuit_tracer import write_transcoders
from rsae_triton.remez import fit_gate
from rsae_triton.remez.plot import plot_fit
from rsae_triton.remez.table import write_table
from rsae_triton.report import fronts, page
from rsae_triton.report.speed import plots
from rsae_triton.report.speed.results import write_result
from rsae_triton.sae.card import CARD_FILE
from rsae_triton.sae.sharded import read_sae
from rsae_triton.sae.transcoder import ReluTranscoder
from rsae_triton.teachers import ReluSAE, load_teacher
from rsae_triton.training.checkpoints import Checkpoints
from rsae_triton.training.distributed import Mesh

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
FITS = [fit_gate("relu", (3, 2)), fit_gate("relu", (5, 4))]


def relu(version):
    sae = ReluSAE(4, 8, generator=torch.Generator().manual_seed(version), metadata={"hook_name": f"place {version}"})
    with torch.no_grad():
        sae.b_enc.fill_(version)
    return sae


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


def circuit_tracer(folder, version):
    kinds = {}
    for layer in (0, 1):
        places = {"hook_name": f"blocks.{layer}.mlp.hook_in", "hook_name_out": f"blocks.{layer}.hook_mlp_out"}
        generator = torch.Generator().manual_seed(version)
        kinds[layer] = ReluTranscoder(4, 8, metadata={"model_name": "tiny", **places}, generator=generator)
    write_transcoders(kinds, folder / "set", repo="a/b", scan=str(version))


def report_page(folder, version):
    page._replace(folder / "out" / "report.html", f"{version}" * 1000)


def features_page(folder, version):
    text = SimpleNamespace(store=SimpleNamespace(manifest={"model": "m", "hook_name": "h"}))
    made = SimpleNamespace(block=lambda *_: "", summary=lambda: {"version": version})
    with mock.patch.multiple(features, open_source=lambda *_: text, _Page=lambda *_: made):
        features.write_features(folder / "out" / "features.html", relu(0), None)


def sweep_report(folder, version):
    stubs = {"summarise": lambda _: [version], "sweep_tables": str, "front_figure": lambda *_: figure(version)}
    with mock.patch.multiple(fronts, **stubs):
        fronts.write_sweep_report(folder / "sweep", [{"scores": {"teacher": dict.fromkeys(fronts.PAIRED, 0)}}])


def figure(version):
    drawn = Figure(figsize=(1, 1))
    drawn.text(0, 0, str(version))
    return drawn


def speed_figure(folder, version):
    points = {"work": {"ours": [(1.0, 1.0), (2.0, 2.0 + version)]}}
    with mock.patch.object(plots, "series", lambda _, sweep, __: points["work"] if sweep == plots.SWEEPS[0] else {}):
        assert plots.draw({}, "median_s", folder / "speed.svg")


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
        try:
            self.train(self.Ends((2, None)[version]), folder / "run")
        except FormatError as error:
            if "the end" not in str(error):
                raise

    def train(self, data, out):
        train(relu(0), data, out=out, resume=True, **self.options)

    def read(self, folder):
        checkpoints = Checkpoints(folder / "run")
        for step in checkpoints.steps():
            assert read_info(checkpoints.path(step))["step"] == step  # none is half
            tensors = read_state(checkpoints.path(step))
            assert all(bool(one.isfinite().all()) for one in tensors.values() if one.is_floating_point())
        found = checkpoints.steps()
        return {2: 0, 4: 1}[found[-1]] if found else None


class Sharded(Checkpointed):
    """The same by a process of a mesh, as torch.distributed.checkpoint writes it."""

    def train(self, data, out):
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        try:
            mesh = Mesh(1)
            train(mesh.shard(relu(0)), data, out=out, resume=True, mesh=mesh, **self.options)
        finally:
            distributed.destroy_process_group()

    def read(self, folder):
        checkpoints = Checkpoints(folder / "run")
        for step in checkpoints.steps():
            assert read_info(checkpoints.path(step))["step"] == step
            assert is_sharded(checkpoints.path(step))
            assert all(bool(one.isfinite().all()) for one in read_sae(checkpoints.path(step)).state_dict().values())
        return {(): None, (2,): 0, (2, 4): 1, (4,): 1}[tuple(checkpoints.steps())]


WRITERS = {
    "an SAE": Sae,
    "an SAE, the first": FirstSae,
    "a Rational SAE": RationalSae,
    "transcoders for circuit-tracer": files("set/layer_0.safetensors", "set/layer_1.safetensors", "set/config.yaml")(
        circuit_tracer
    ),
    "a report": files("out/report.html")(report_page),
    "a page of features": files("out/features.html")(features_page),
    "a figure of a gate": files("gate.png")(lambda folder, version: plot_fit(FITS[version], folder / "gate.png")),
    "a figure of speed": files("speed.svg")(speed_figure),
    "a benchmark's result": files("a/speed.json")(
        lambda folder, version: write_result(folder / "a" / "speed.json", {"x": [version] * 99})
    ),
    "a command's result": files("a/scores.json")(
        lambda folder, version: write_json(folder / "a" / "scores.json", {"x": [version] * 99})
    ),
    "the report of a sweep": files("sweep/sweep.json", "sweep/mse.svg", "sweep/sweep.md")(sweep_report),
    "a cell of a sweep": files("cells/a.json")(
        lambda folder, version: write_cell(folder / "cells" / "a.json", {"cell": version, "scores": {}, "stage1": {}})
    ),
    "a table of gates": files("table.json")(
        lambda folder, version: write_table(FITS[: version + 1], folder / "table.json")
    ),
    "a store": Stored,
    "an extraction": Extracted,
    "a checkpoint": Checkpointed,
    "a checkpoint of several processes": Sharded,
    **CACHES,
}
