"""Runs that are killed, stopped or run out of disk go on exactly where they were."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from workers import CONTEXT, resumable, small_sae

from rsae_triton import FusedRationalSAE, train
from rsae_triton.activations import store_tensor
from rsae_triton.commands.cli import main
from rsae_triton.common.errors import ConfigError, FormatError, NumericsError, StorageError
from rsae_triton.common.files import read_safetensors
from rsae_triton.sae.sharded import read_sae
from rsae_triton.training.checkpoints import Checkpoints

OPTIONS = {"batch_size": 64, "progress": False, "log_every": 2, "recipe": "hard", "target_l0": 6.0}


def saved(folder):
    """Every weight's bits, and the header; the order of the header's keys is anyone's."""
    with safe_open(Path(folder, "sae_weights.safetensors"), "pt") as file:
        return {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}, file.metadata()  # noqa: SIM118


def rows(out):
    """metrics.jsonl without what is no result."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


def test_a_run_killed_ten_times_ends_with_the_same_bits(tmp_path):
    """SIGKILL at random moments, in the middle of steps and of checkpoints (one every 3 steps)."""
    steps, draws = 66, random.Random(0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    heard = CONTEXT.Value("i", 0, lock=False)
    run = CONTEXT.Process(target=resumable, args=(str(whole), heard, steps))
    run.start()
    run.join(120)
    assert run.exitcode == 0
    kills = leftovers = 0
    for _ in range(40):
        heard = CONTEXT.Value("i", 0, lock=False)
        run = CONTEXT.Process(target=resumable, args=(str(killed), heard, steps))
        run.start()
        if kills < 10:
            until = time.monotonic() + 60
            wait = draws.randint(1, 8)
            while heard.value < wait and run.is_alive() and time.monotonic() < until:
                time.sleep(0.0005)
            time.sleep(draws.uniform(0, 0.01))
            os.kill(run.pid, signal.SIGKILL)
        run.join(120)
        kills += run.exitcode == -signal.SIGKILL
        leftovers += bool(list((killed / "checkpoints").glob(".step-*")))
        if run.exitcode == 0:
            break
    assert run.exitcode == 0
    assert kills == 10
    ours, theirs = (read_safetensors(out / "sae" / "sae_weights.safetensors") for out in (killed, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert rows(killed) == rows(whole)
    assert [row["step"] for row in rows(whole)] == [*range(0, steps, 2), steps - 1]
    assert len(Checkpoints(killed).steps()) == 2


@pytest.mark.parametrize(("kind", "recipe"), [("direct-64", "paper"), ("topk", "topk"), ("jumprelu", "jumprelu")])
def test_every_kind_resumes_to_the_same_bits(tmp_path, activations, kind, recipe):
    """Stopped by an error in the middle; the aux loss's dead features and the epochs' order go on as well."""
    options = {
        "batch_size": 500,
        "recipe": recipe,
        "progress": False,
        "log_every": 1,
        "accumulate": 2,
        "dead_after": 900,
    }
    whole = small_sae(kind)
    log = train(whole, activations, steps=11, **options)
    out = tmp_path / "run"
    poisoned = Poisoned(activations, at=7)
    with pytest.raises(NumericsError, match=r"step 7: the batch holds .*step-00000006"):
        train(small_sae(kind), poisoned, steps=11, out=out, checkpoint_every=3, **options)
    assert Checkpoints(out).steps() == [3, 6]
    again = small_sae(kind)
    continued = train(again, Poisoned(activations), steps=11, out=out, checkpoint_every=3, resume=True, **options)
    for name, one in whole.state_dict().items():
        assert torch.equal(one, again.state_dict()[name])
    assert (continued.step, continued.mse, continued.dead) == (log.step, log.mse, log.dead)
    assert continued.weight == log.weight


class Poisoned:
    """Activations in the order of a tensor's, with a NaN in one batch."""

    def __init__(self, x, at=None):
        self.x, self.at, self.d_in = x, at, x.shape[1]

    def batches(self, batch_size, *, seed, start=0):
        from rsae_triton.training.loop import tensor_batches

        for number, batch in enumerate(tensor_batches(self.x, batch_size, seed=seed, start=start), start):
            yield (
                batch if number != self.at else batch.masked_fill(torch.eye(*batch.shape, dtype=torch.bool), torch.nan)
            )


def test_a_finished_run_is_not_trained_again(tmp_path, activations):
    first, second = small_sae("gated"), small_sae("gated")
    log = train(first, activations, steps=5, out=tmp_path, **OPTIONS)
    assert train(second, activations, steps=5, out=tmp_path, resume=True, **OPTIONS).mse == log.mse
    assert torch.equal(first.W_enc, second.W_enc)


def test_resuming_with_other_settings_is_refused(tmp_path, activations):
    train(small_sae("gated"), activations, steps=4, out=tmp_path, **OPTIONS)
    with pytest.raises(ConfigError, match="reached step 4"):
        train(small_sae("gated"), activations, steps=4, out=tmp_path, **OPTIONS)
    changed = {**OPTIONS, "out": tmp_path, "resume": True}
    for options, message in (({"lr": 1e-2}, "lr=0.0006"), ({"seed": 1}, "seed=0"), ({"recipe": "paper"}, "recipe")):
        kind = "direct" if options.get("recipe") else "gated"
        with pytest.raises(ConfigError, match=message):
            train(small_sae(kind), activations, steps=4, **{**changed, **options})
    with pytest.raises(ConfigError, match="d_sae=64, not 32"):
        train(small_sae("gated", 32), activations, steps=4, **changed)
    with pytest.raises(ConfigError, match="other activations"):
        train(small_sae("gated"), 2 * activations, steps=4, **changed)
    with pytest.raises(ConfigError, match="set `out`"):
        train(small_sae("gated"), activations, steps=4, resume=True)


def test_two_runs_in_one_folder_are_refused(tmp_path, activations):
    from filelock import FileLock

    with FileLock(tmp_path / ".lock"), pytest.raises(ConfigError, match="another process is training"):
        train(small_sae("gated"), activations, steps=4, out=tmp_path, **OPTIONS)


@pytest.mark.parametrize("damage", ["cut", "gone", "garbled", "info"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, activations, damage):
    options = {**OPTIONS, "steps": 9, "checkpoint_every": 4}
    whole = small_sae("gated")
    train(whole, activations, out=tmp_path, **options)
    last = Checkpoints(tmp_path).path(9)
    file = last / "state" / "state.safetensors"
    content = file.read_bytes()
    if damage == "info":
        (last / "training.json").write_text("{")
    elif damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-100] if damage == "cut" else b"\xff" * 64 + content[64:])
    sae = small_sae("gated")
    with pytest.warns(UserWarning, match=r"step-00000009.*going back"):
        train(sae, activations, out=tmp_path, resume=True, **options)
    assert torch.equal(sae.W_enc, whole.W_enc)
    for step in Checkpoints(tmp_path).steps():
        shutil.rmtree(Checkpoints(tmp_path).path(step) / "state")
    with pytest.warns(UserWarning, match="going back"), pytest.raises(FormatError, match="no checkpoint in"):
        train(small_sae("gated"), activations, out=tmp_path, resume=True, **options)


def test_a_full_disk_is_named_and_loses_nothing(tmp_path, activations):
    """A real refusal by the system, halfway through the file: no file may grow beyond a few kilobytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    sae = small_sae("gated")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
        with pytest.raises(StorageError, match=r"checkpoint of step 3 .* GB free.*there is none yet"):
            train(sae, activations, steps=9, checkpoint_every=3, out=tmp_path / "new", **OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    out = tmp_path / "again"
    with pytest.raises(NumericsError):
        train(small_sae("gated"), Poisoned(activations, at=4), steps=9, checkpoint_every=3, out=out, **OPTIONS)
    options = {"checkpoint_every": 3, "out": out, "resume": True, **OPTIONS}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
        with pytest.raises(StorageError, match=r"last good one is .*step-00000003"):
            train(small_sae("gated"), Poisoned(activations), steps=9, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Checkpoints(out).steps() == [3]
    assert not list((out / "checkpoints").glob(".step-*"))
    train(small_sae("gated"), Poisoned(activations), steps=9, **options)
    assert Checkpoints(out).steps() == [6, 9]


def test_time_makes_checkpoints_too_and_the_last_are_kept(tmp_path, activations):
    train(small_sae("gated"), activations, steps=6, out=tmp_path, checkpoint_minutes=1e-9, keep=3, **OPTIONS)
    assert Checkpoints(tmp_path).steps() == [4, 5, 6]


@pytest.mark.parametrize("kind", ["gated-64", "gated-assigned", "token", "topk"])
def test_the_sae_of_a_checkpoint_can_be_read(tmp_path, activations, kind):
    sae = small_sae(kind)
    options = OPTIONS if kind.startswith("gated") else {**OPTIONS, "recipe": "topk", "target_l0": None}
    train(sae, activations, steps=4, out=tmp_path, **options)
    found = read_sae(Checkpoints(tmp_path).path(4))
    assert all(torch.equal(one, found.state_dict()[name]) for name, one in sae.state_dict().items())
    assert found.config() | {"metadata": {}} == sae.config() | {"metadata": {}}
    assert torch.allclose(found(activations[:9]), sae(activations[:9]), atol=1e-5)


def test_sigterm_saves_and_exits_with_0(tmp_path, activations, monkeypatch, capsys):
    """The command itself, as a scheduler ends it; continued, it ends as a run that was never stopped."""
    store_tensor(activations, tmp_path / "store")
    small_sae("gated").save_pretrained(tmp_path / "sae")
    options = ["--activations", "store", "--batch-size", "64", "--log-every", "1", "--deterministic", "--steps", "300"]
    run = subprocess.Popen(
        [sys.executable, "-m", "rsae_triton", "train", "sae", "--out", "run", *options],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    metrics, until = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not metrics.is_file() or not metrics.read_text():
        assert run.poll() is None, run.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.01)
    run.terminate()
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 0, errors
    (step,) = Checkpoints(tmp_path / "run").steps()
    assert f"stopped by SIGTERM after step {step} of 300" in errors
    assert "--resume" in errors
    assert len(rows(tmp_path / "run")) == step
    monkeypatch.chdir(tmp_path)
    assert main(["train", "sae", "--out", "run", *options]) == 2
    assert "reached step" in " ".join(capsys.readouterr().err.split())
    assert main(["train", "sae", "--out", "run", "--resume", *options]) == 0
    assert main(["train", "sae", "--out", "whole", *options]) == 0
    assert main(["export", "run", "--out", "exported"]) == 0
    weights, metadata = zip(*(saved(one) for one in ("run/sae", "whole/sae", "exported")), strict=True)
    assert weights[0] == weights[1] == weights[2]
    assert metadata[0] == metadata[1] == metadata[2]
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    # In the units of the model again, and better than it was.
    before, after = (FusedRationalSAE.from_pretrained(one) for one in ("sae", "run/sae"))
    errors = [float((one(activations) - activations).square().sum(-1).mean().detach()) for one in (before, after)]
    assert errors[1] < 0.7 * errors[0]
