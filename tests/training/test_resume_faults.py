"""Damaged checkpoints, processes that see different ones, numbers that are lost at the end: one step, or an error."""

import json
import shutil
import threading
import warnings

import pytest
import torch
from safetensors.torch import save_file
from synthetic import sparse_activations
from workers import run_together, small_sae

from rsae_triton import FusedRationalSAE, train
from rsae_triton.commands.train import export
from rsae_triton.common.errors import ConfigError, FormatError, NumericsError, RsaeError, StorageError
from rsae_triton.common.files import read_safetensors
from rsae_triton.training.checkpoints import Checkpoints
from rsae_triton.training.loop import tensor_batches
from rsae_triton.training.resuming import identity_of

OPTIONS = {"batch_size": 64, "progress": False, "log_every": 1, "recipe": "hard", "target_l0": 6.0}


class Ends:
    """Rows of x; the run is killed where it asks for batch `at`."""

    d_in = 16

    class KilledError(Exception):
        pass

    def __init__(self, x, at=None):
        self.x, self.at = x, at

    def batches(self, batch_size, *, seed, start=0):
        for number, batch in enumerate(tensor_batches(self.x, batch_size, seed=seed, start=start), start):
            if number == self.at:
                raise self.KilledError
            yield batch


def until(x, at, out, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Ends.KilledError):
            train(small_sae("gated"), Ends(x, at), out=out, steps=24, **{**OPTIONS, **options})


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_checkpoints_do_not_count_towards_those_kept(tmp_path, activations, keep):
    until(activations, 16, tmp_path, checkpoint_every=5, keep=keep + 1)
    checkpoints = Checkpoints(tmp_path)
    before = checkpoints.steps()
    for step in before[-keep:]:
        (checkpoints.path(step) / "state" / "state.safetensors").write_bytes(b"torn")
    first = before[-keep - 1]
    until(activations, first + 4, tmp_path, checkpoint_every=3, keep=keep, resume=True)
    assert (first + 4) // 3 * 3 in checkpoints.steps()
    with pytest.warns(UserWarning, match="going back"):
        log = train(small_sae("gated"), Ends(activations), out=tmp_path, steps=24, resume=True, **OPTIONS)
    assert log.step == list(range(24))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    train(small_sae("gated"), sparse_activations(), out=out, steps=9, checkpoint_every=3, **OPTIONS)
    return out


KEYS = ("step", "files", "config", "settings", "activations", "controller", "seconds")


def damaged_info(path, **changes):
    info = json.loads((path / "training.json").read_text())
    info = {key: value for key, value in {**info, **changes}.items() if value is not ...}
    (path / "training.json").write_text(json.dumps(info))


def damaged_state(path, change):
    file = path / "state" / "state.safetensors"
    tensors = {name: one.clone() for name, one in read_safetensors(file).items()}
    change(tensors)
    save_file(tensors, file)
    damaged_info(path, files={"state.safetensors": file.stat().st_size})


DAMAGE = {
    **{f"without {key}": lambda path, key=key: damaged_info(path, **{key: ...}) for key in KEYS},
    **{f"{key} is true": lambda path, key=key: damaged_info(path, **{key: True}) for key in KEYS},
    "a size that is text": lambda path: damaged_info(path, files={"state.safetensors": "x"}),
    "a file outside": lambda path: damaged_info(path, files={"../training.json": 1}),
    "an architecture that is a list": lambda path: damaged_info(path, config={"architecture": []}),
    "a controller of text": lambda path: damaged_info(path, controller={"weight": "x"}),
    **{f"without {name}": lambda path, name=name: damaged_state(path, lambda one: one.pop(name))
       for name in ("idle", "norms", "sae.b_dec")},
    "infinite": lambda path: damaged_state(path, lambda one: one["sae.b_dec"].fill_(torch.inf)),
    "another shape": lambda path: damaged_state(path, lambda one: one.update(idle=torch.zeros(3))),
    "another optimiser": lambda path: damaged_state(
        path, lambda one: one.update({"optimizer.W_enc.exp_avg": torch.zeros(3)})),
    "random numbers of another kind": lambda path: damaged_state(
        path, lambda one: one.update({"rng.cpu": torch.zeros(3, dtype=torch.uint8)})),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_any_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path, activations, finished, name):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    DAMAGE[name](Checkpoints(out).path(9))
    sae = small_sae("gated")
    with pytest.warns(UserWarning, match=r"step-00000009.*going back"):
        train(sae, activations, out=out, steps=9, resume=True, **OPTIONS)
    shutil.rmtree(out)
    shutil.copytree(finished, out)
    DAMAGE[name](Checkpoints(out).path(9))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert FusedRationalSAE.from_pretrained(export(out, tmp_path / "plain")).d_sae == 64
        except RsaeError as error:
            raise AssertionError(f"export: {error}") from error


@pytest.mark.parametrize("row", [b"\xff\xfe\n", b'{"a": 1}\n', b"[1]\n", b"3\n", b'{"step": "x"}\n'])
def test_a_line_of_the_log_that_is_no_row_is_left_out(tmp_path, activations, finished, row):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    lines = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (out / "metrics.jsonl").write_bytes(b"".join([*lines[:4], row, *lines[4:]]))
    log = train(small_sae("gated"), activations, out=out, steps=9, resume=True, **OPTIONS)
    assert log.step == list(range(9))


@pytest.mark.parametrize("steps", [1, 3])
def test_the_last_step_is_looked_at(tmp_path, activations, steps):
    sae = small_sae("gated")
    before = {name: one.clone() for name, one in sae.state_dict().items()}
    options = {"steps": steps, "lr": 1e38, "warmup": 0, "decay": 0.0, "checkpoint_every": 1}
    with pytest.raises(NumericsError, match=r"optimiser's step made .* infinite.*no checkpoint"):
        train(sae, activations, out=tmp_path / "run", **options, **OPTIONS)
    for name, one in sae.state_dict().items():
        assert torch.equal(one, before[name]), name
    assert Checkpoints(tmp_path / "run").steps() == []
    with pytest.raises(NumericsError):
        train(sae, activations, **{**options, "checkpoint_every": None}, **OPTIONS)
    assert all(bool(one.isfinite().all()) for one in sae.parameters())


def test_other_activations_are_told_apart_wherever_they_differ():
    x = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
    found = {identity_of(x)}
    assert identity_of(x.clone()) in found
    for row, column in ((1, 0), (500, 3), (999, 15)):
        other = x.clone()
        other[row, column] += 1e-3
        found.add(identity_of(other))
    found |= {identity_of(x.flip(0)), identity_of(x.flip(1)), identity_of(x[:, :8]), identity_of(x.bfloat16())}
    found.add(identity_of(x.bfloat16().float()))
    assert len(found) == 9


def test_processes_that_see_different_checkpoints_go_on_from_one(tmp_path, activations):
    options = {"steps": 15, "batch_size": 512, "log_every": 1, "recipe": "hard", "target_l0": 6.0}
    more = {**options, "out": tmp_path / "run", "checkpoint_every": 5, "keep": 3}
    alone = small_sae("gated")
    train(alone, activations, progress=False, **options)
    until_ten = {**more, "out": tmp_path / "run"}
    run_together(2, 1, tmp_path, "gated", **until_ten)
    shutil.rmtree(Checkpoints(tmp_path / "run").path(15))
    found = run_together(2, 1, tmp_path, "gated", **more, resume=True, unreadable={1: 10})
    for one in found:
        assert torch.allclose(one["weights"]["W_enc"], alone.W_enc, rtol=1e-3, atol=2e-5)
    # Both began at step 5; the first process has taken up the log of the steps before.
    assert [one["log"]["step"] for one in found] == [list(range(15)), list(range(5, 15))]


def test_weights_in_bfloat16_and_float16_are_trained_in_float32(tmp_path, activations):
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        sae = small_sae("relu").to(dtype)
        out = tmp_path / str(dtype)
        log = train(sae, activations.to(dtype), steps=60, lr=3e-4, batch_size=64, progress=False, out=out)
        assert sae.W_enc.dtype == sae.b_dec.dtype == dtype
        state = read_safetensors(Checkpoints(out).path(60) / "state" / "state.safetensors")
        assert state["sae.W_enc"].dtype == torch.float32
        found[dtype] = log.mse[-1]
        assert export(out, tmp_path / "plain").is_dir()
        config = json.loads((tmp_path / "plain" / "cfg.json").read_text())
        assert f"torch.{config['dtype']}" == str(dtype)
    assert found[torch.bfloat16] == pytest.approx(found[torch.float32], rel=0.02)
    assert found[torch.float16] == pytest.approx(found[torch.float32], rel=0.02)


def test_activations_that_hang_on_a_model_leave_it_alone(activations):
    model = torch.nn.Linear(16, 16)
    x = model(activations[:512])
    train(small_sae("gated"), x, steps=3, **OPTIONS)
    train(small_sae("gated"), Ends(x), steps=3, **OPTIONS)
    assert model.weight.grad is None


def test_deterministic_runs_in_threads_leave_the_switch_as_it_was(activations):
    assert not torch.are_deterministic_algorithms_enabled()
    threads = [
        threading.Thread(
            target=train,
            args=(small_sae("gated"), activations),
            kwargs={**OPTIONS, "steps": steps, "deterministic": True},
        )
        for steps in (5, 15, 10)
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_lock_that_is_a_folder_is_named(tmp_path, activations):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(StorageError, match=r"\.lock cannot be locked"):
        train(small_sae("gated"), activations, steps=1, out=tmp_path, **OPTIONS)
    with pytest.raises(FormatError, match="holds no checkpoint"):
        export(tmp_path, tmp_path / "plain")


def test_resuming_on_other_activations_is_refused(tmp_path, activations, finished):
    with pytest.raises(ConfigError, match="other activations"):
        train(small_sae("gated"), activations.flip(0), out=finished, steps=9, resume=True, **OPTIONS)


def test_where_one_process_finds_no_room_all_say_so_and_the_checkpoint_before_stays(tmp_path, activations):
    options = {"steps": 10, "batch_size": 512, "recipe": "hard", "target_l0": 6.0, "checkpoint_every": 5}
    out = tmp_path / "run"
    for one in run_together(2, 2, tmp_path, "gated", **options, out=out, full={1: 10}):
        assert "--resume goes on from it" in one["refused"]
    checkpoints = Checkpoints(out)
    assert checkpoints.steps() == [5]
    assert not list(checkpoints.folder.glob(".step-*"))
    run_together(2, 2, tmp_path, "gated", **options, out=out, resume=True)
    assert checkpoints.steps() == [5, 10]


def test_foreign_files_in_the_checkpoints_folder_are_ignored_or_refused(tmp_path, activations):
    folder = tmp_path / "run" / "checkpoints"
    for name in ("step-²", "step-999999999999999999999", "step-"):  # digits to Python, and none of ours
        (folder / name).mkdir(parents=True)
    train(small_sae("gated"), activations, steps=1, out=tmp_path / "run", resume=True, **OPTIONS)
    assert Checkpoints(tmp_path / "run").steps() == [1]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "checkpoints").write_text("a file")
    before = small_sae("gated")
    sae = small_sae("gated")
    with pytest.raises(StorageError, match="checkpoints cannot be written to"):
        train(sae, activations, steps=1, out=tmp_path / "other", **OPTIONS)
    assert torch.equal(sae.W_enc, before.W_enc)  # said before the first step
