"""Several processes train as one: the same curve, the same weights, and checkpoints for any number of them."""

import json
import os
from pathlib import Path

import pytest
import torch
from workers import one_step, run_together, small_sae, step_of

from rsae_triton import train
from rsae_triton.commands.train import export
from rsae_triton.common.errors import ConfigError
from rsae_triton.sae.sharded import read_sae
from rsae_triton.training.checkpoints import Checkpoints
from rsae_triton.training.distributed import Mesh, feature_axes, mesh_of
from rsae_triton.training.processes import Alone
from rsae_triton.training.recipes import recipe_for
from rsae_triton.training.settings import TrainSettings

GATED = {"recipe": "hard", "target_l0": 6.0}


def threads_of_gloo():
    names = (Path(f"/proc/self/task/{one}/comm") for one in os.listdir("/proc/self/task"))
    return sum("gloo" in name.read_text() for name in names if name.exists())


def test_no_thread_of_a_process_group_outlives_the_mesh(monkeypatch):
    """One that was at work while Python shut down aborted the process, after all had been saved."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    before = threads_of_gloo()
    with mesh_of() as mesh:
        mesh.barrier()
        assert threads_of_gloo() > before
    assert threads_of_gloo() == before
    assert mesh is not None  # still held here, as by the frames of a caller


def whole_of(found, sae):
    """The weights of the whole SAE from its parts; copies must agree."""
    axes, parts = feature_axes(sae), {}
    for one in found:
        parts.setdefault(one["place"][1][0], []).append(one["weights"])
    for copies in parts.values():
        for copy in copies[1:]:
            assert all(torch.equal(copy[name], tensor) for name, tensor in copies[0].items())
    columns = [parts[place][0] for place in sorted(parts)]
    for name, axis in axes.items():
        if axis is None and name in columns[0]:
            assert all(torch.equal(one[name], columns[0][name]) for one in columns)
    return {
        name: columns[0][name] if axis is None else torch.cat([one[name] for one in columns], axis)
        for name, axis in axes.items()
        if name in columns[0]
    }


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


CASES = [
    # kind, processes, that share features, how: every axis, mode of a step, gate and recipe at least once
    ("gated", 2, 2, {**GATED, "memory": "saved"}),
    ("gated", 4, 2, {**GATED, "memory": "chunked"}),
    ("gated-64", 2, 2, {**GATED, "memory": "streamed", "accumulate": 2}),
    ("gated-assigned", 2, 2, {"recipe": "hard-trained", "target_l0": 6.0, "memory": "saved"}),
    ("direct-4", 4, 4, {"recipe": "paper", "memory": "saved"}),
    ("topk", 2, 1, {"recipe": "topk", "dead_after": 2000}),
    ("relu", 2, 2, {"recipe": "relu"}),
    ("rounds", 4, 2, {**GATED, "rounds": "through", "steps": 25}),
]


@pytest.mark.parametrize(("kind", "world", "features", "options"), CASES)
def test_processes_train_as_one(tmp_path, activations, kind, world, features, options):
    options = {"steps": 50, "batch_size": 512, "log_every": 1, "lr": 1e-3, **options}
    alone = small_sae(kind)
    log = train(alone, activations, progress=False, out=tmp_path / "alone", **options)
    found = run_together(world, features, tmp_path, kind, out=tmp_path / "together", **options)
    # Through rounds, rounding decides of a feature at a threshold now and then, and the step after it is another one:
    # the first step is compared as closely as elsewhere, the rest as a run of its own.
    loose = kind == "rounds"
    for one in found:
        assert one["log"]["mse"][:1] == pytest.approx(log.mse[:1], rel=1e-5)
        assert one["log"]["mse"] == pytest.approx(log.mse, rel=0.03 if loose else 1e-5)
    # Clipping and Adam hide a gradient of the wrong size; its norm in the log does not.
    near = {"mse": 1e-5, "l0": 2e-4, "weight": 1e-3, "grad_norm": 1e-3}
    ours, theirs = (rows(tmp_path / name)[: 1 if loose else None] for name in ("alone", "together"))
    for name in ours[0].keys() - {"seconds"}:
        expected, values = ([row[name] for row in some] for some in (ours, theirs))
        assert values == pytest.approx(expected, rel=near.get(name, 0), abs=0), name
    for name, tensor in whole_of(found, alone).items():
        own = alone.state_dict()[name]
        if loose:
            assert float((tensor - own).norm()) <= 0.03 * float(own.norm()) + 1e-6, name
        else:
            assert torch.allclose(tensor, own, rtol=1e-3, atol=2e-5), name


@pytest.mark.parametrize(
    ("kind", "world", "features", "known"),
    [("rounds", 4, 2, False), ("rounds", 2, 2, True), ("gated", 2, 2, True), ("gated", 4, 2, False)],
)
def test_every_gradient_of_a_step_and_their_norm_are_those_of_one_process(
    tmp_path, activations, kind, world, features, known
):
    """Parameter by parameter, also through further rounds; with norms that come with the loss, or read afterwards."""
    alone = small_sae(kind)
    expected, norm = step_of(Alone(), alone, activations[:512], known=False)
    found = run_together(world, features, tmp_path, kind, work=one_step, known=known)
    assert [one["norm"] for one in found] == pytest.approx([norm] * world, rel=1e-5)
    whole = whole_of(found, alone)
    assert whole.keys() == expected.keys()
    assert ("refinement.eta" in whole) == (kind == "rounds")
    for name, one in expected.items():
        assert float(one.norm()) > 0 or name == "gate.log_output_scale", name
        assert float((whole[name] - one).norm()) <= 1e-5 * float(one.norm()), name


def mesh_of_two():
    """What the first of two processes that share features sees; it never talks to the other."""
    mesh = Mesh.__new__(Mesh)
    mesh.data, mesh.features, mesh.device = (0, 1), (0, 2), torch.device("cpu")
    return mesh


def test_saes_that_cannot_be_split_by_features_are_refused():
    mesh = mesh_of_two()
    for kind in ("topk", "token"):
        sae = small_sae(kind)
        with pytest.raises(ConfigError, match="compares all features of a token"):
            mesh.check(mesh.shard(sae), recipe_for(sae), TrainSettings(steps=1))
    for d_sae, message in ((16, "assign fewer groups"), (15, "choose a divisor")):
        with pytest.raises(ConfigError, match=message):
            mesh.shard(small_sae("gated-assigned", d_sae))


def test_assigned_groups_are_held_whole_and_their_features_are_shared():
    sae = small_sae("gated-assigned")
    part = mesh_of_two().shard(sae)
    h = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    assert part.gate.alpha.shape == sae.gate.alpha.shape
    assert torch.equal(part.gate(h[:, :32]), sae.gate(h)[:, :32])


def test_saved_on_four_resumed_on_two_and_on_one(tmp_path, activations):
    options = {"steps": 30, "batch_size": 512, "log_every": 1, **GATED}
    alone = small_sae("gated-64")
    log = train(alone, activations, progress=False, **options)
    out = tmp_path / "run"
    more = {**options, "out": out, "checkpoint_every": 10, "keep": 9}
    run_together(4, 4, tmp_path, "gated-64", **more)
    checkpoints = Checkpoints(out)
    assert checkpoints.steps() == [10, 20, 30]
    assert len(list((checkpoints.path(10) / "state").iterdir())) == 4
    assert not list(out.rglob("*.pkl")) + list(out.rglob(".metadata"))
    finished = read_sae(checkpoints.path(30))
    assert torch.allclose(finished.W_dec, alone.W_dec, rtol=1e-3, atol=2e-5)
    curve = (out / "metrics.jsonl").read_text()
    for step in (20, 30):
        for file in (checkpoints.path(step) / "state").iterdir():
            file.unlink()  # only the first is whole now
    for world, features in ((2, 2), (2, 1), (1, 1)):
        for step in (20, 30):
            (checkpoints.path(step) / "training.json").unlink(missing_ok=True)
        if world == 1:
            sae = small_sae("gated-64")
            with pytest.warns(UserWarning, match="going back"):
                train(sae, activations, resume=True, progress=False, **more)
        else:
            run_together(world, features, tmp_path, "gated-64", **more, resume=True)
        again = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [row["mse"] for row in again] == pytest.approx(log.mse, rel=1e-5)
        found = read_sae(checkpoints.path(30))
        assert torch.allclose(found.W_dec, finished.W_dec, rtol=1e-3, atol=2e-5)
        assert torch.allclose(found.gate.threshold, finished.gate.threshold, rtol=1e-3, atol=2e-5)
    assert curve.splitlines()[:10] == (out / "metrics.jsonl").read_text().splitlines()[:10]
    exported = export(out, tmp_path / "plain")
    assert sorted(one.name for one in exported.iterdir() if one.suffix != ".md") == [
        "cfg.json",
        "sae_weights.safetensors",
    ]
