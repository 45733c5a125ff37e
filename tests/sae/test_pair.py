"""Weights and cfg.json of one SAE: a reader finds the pair, whenever it comes and whatever became of the writer."""

import json
import os
import threading
import time
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rsae_triton import FusedRationalSAE, load_teacher
from rsae_triton.commands.evaluate import check_writable
from rsae_triton.common.errors import ConfigError, FormatError, NumericsError, StorageError
from rsae_triton.common.files import write_text
from rsae_triton.sae.pretrained import CONFIG_FILE, WEIGHTS_FILE
from rsae_triton.teachers import JumpReluSAE, ReluSAE

KILLED = "as after a save that was killed"


def sae(kind, **metadata):
    options = {"generator": torch.Generator().manual_seed(0), "metadata": metadata}
    return FusedRationalSAE(4, 8, form="gated", **options) if kind == "rational" else ReluSAE(4, 8, **options)


def read(kind, folder):
    return (FusedRationalSAE.from_pretrained if kind == "rational" else load_teacher)(folder)


@pytest.mark.parametrize("kind", ["rational", "relu"])
@pytest.mark.parametrize("left", ["the configuration of another", "none"])
def test_a_kill_between_the_renames_leaves_a_pair(tmp_path, kind, left):
    old, new = sae(kind, hook_name="blocks.1.hook_resid_post"), sae(kind, hook_name="blocks.2.hook_resid_post")
    with torch.no_grad():
        new.W_enc.mul_(3)
    old.save_pretrained(tmp_path / "old")
    new.save_pretrained(tmp_path / "new")
    (tmp_path / "new" / WEIGHTS_FILE).rename(tmp_path / "old" / WEIGHTS_FILE)
    if left == "none":
        (tmp_path / "old" / CONFIG_FILE).unlink()
    with pytest.warns(UserWarning, match=KILLED):
        found = read(kind, tmp_path / "old")
    assert torch.equal(found.W_enc, new.W_enc)
    assert found.metadata["hook_name"] == "blocks.2.hook_resid_post"
    # The next save mends the folder.
    found.save_pretrained(tmp_path / "old")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(kind, tmp_path / "old").metadata["hook_name"] == "blocks.2.hook_resid_post"


def test_every_read_during_saves_finds_a_pair(tmp_path, monkeypatch):
    """The gated and the direct SAE have files of one shape: only the mark tells a mixture."""
    both = [FusedRationalSAE(4, 8, form=form, generator=torch.Generator()) for form in ("gated", "direct")]
    with torch.no_grad():
        for number, one in enumerate(both):
            one.b_enc.fill_(number)
    both[0].save_pretrained(tmp_path)
    replace, ended = os.replace, threading.Event()

    def slowly(source, target):
        replace(source, target)
        time.sleep(0.003)

    def save():
        while not ended.is_set():
            for one in both[::-1]:
                one.save_pretrained(tmp_path)

    monkeypatch.setattr(os, "replace", slowly)
    writer = threading.Thread(target=save)
    writer.start()
    mixtures, reads = 0, 60
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the pair was found in the weights' file
            for _ in range(reads):
                found = FusedRationalSAE.from_pretrained(tmp_path)
                mixtures += found.gate.form != ("gated", "direct")[int(found.b_enc[0])]
    finally:
        ended.set()
        writer.join()
    assert mixtures == 0


def test_edits_of_cfg_json_by_the_user_are_used(tmp_path):
    sae("relu").save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    config["metadata"]["model_name"] = "mine"
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_teacher(tmp_path)
    assert found.metadata["model_name"] == "mine"
    assert "saved_as" not in found.metadata


def test_files_of_other_libraries_need_no_mark(tmp_path):
    sae("relu").save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS_FILE, framework="pt") as file:
        assert json.loads(file.metadata()["config"]) == json.loads((tmp_path / CONFIG_FILE).read_text())
    save_file(load_file(tmp_path / WEIGHTS_FILE), tmp_path / WEIGHTS_FILE)
    assert load_teacher(tmp_path).d_sae == 8


def test_an_error_between_the_renames_says_which_file_is_new(tmp_path, monkeypatch):
    sae("relu", hook_name="old").save_pretrained(tmp_path)
    replace = os.replace

    def refuse(source, target):
        if str(target).endswith(CONFIG_FILE):
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageError, match=rf"{WEIGHTS_FILE} in .* is the new one already"):
        sae("relu", hook_name="new").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=KILLED):
        assert load_teacher(tmp_path).metadata["hook_name"] == "new"


def test_leftovers_of_killed_saves_are_removed_and_those_in_use_are_not(tmp_path):
    from rsae_triton.common.files import scratch

    (tmp_path / ".rsae-01234567.tmp").mkdir()
    (tmp_path / ".rsae-01234567.tmp" / WEIGHTS_FILE).write_bytes(b"half")
    with scratch(tmp_path) as used:
        sae("relu").save_pretrained(tmp_path)
        assert used.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", CONFIG_FILE, WEIGHTS_FILE]


def test_a_device_or_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for name in ("pipe", "link"):
        with pytest.raises(StorageError, match="is a device or a pipe"):
            write_text(tmp_path / name, "text")
        with pytest.raises(StorageError, match=f"--out .*{name}.*is a device or a pipe"):
            check_writable(tmp_path / name)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["link", "pipe"]
    assert (tmp_path / "pipe").is_fifo()


def test_the_umask_is_honoured(tmp_path):
    before = os.umask(0o027)
    try:
        sae("relu").save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_a_card_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    from rsae_triton.sae import pretrained

    def full(folder, card):
        raise StorageError("README.md cannot be written (No space left on device)")

    monkeypatch.setattr(pretrained, "write_card", full)
    with pytest.warns(UserWarning, match=r"is saved in .* its card is not: .*No space"):
        sae("relu").save_pretrained(tmp_path)
    assert load_teacher(tmp_path).d_sae == 8


def test_half_a_character_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="half a character"):
        sae("relu", model_name="org/\ud800").save_pretrained(tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_link_out_of_the_folder_is_refused_and_the_hubs_cache_is_not(tmp_path, name):
    sae("relu").save_pretrained(tmp_path / "sae")
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        (blobs / file).write_bytes((tmp_path / "sae" / file).read_bytes())
        (snapshot / file).symlink_to(f"../../blobs/{file}")
    assert load_teacher(snapshot).d_sae == 8
    (tmp_path / "sae" / name).rename(tmp_path / "elsewhere")
    (tmp_path / "sae" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match=r"a link to .* outside its folder"):
        load_teacher(tmp_path / "sae")


def rewritten(folder, name, change, dtype="float32"):
    weights = {key: one.clone() for key, one in load_file(folder / WEIGHTS_FILE).items()}
    weights[name] = change(weights[name])
    save_file(weights, folder / WEIGHTS_FILE)
    config = json.loads((folder / CONFIG_FILE).read_text()) | {"dtype": dtype}
    (folder / CONFIG_FILE).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "change", "dtype"),
    [
        ("W_enc", lambda one: one.double() * 0 + 1e300, "float32"),
        ("b_dec", lambda one: one + 1e6, "float16"),
        ("gate.threshold", lambda one: one.double() + 1e300, "float32"),
        ("W_dec", lambda one: one * 0 + 3.4028235e38, "bfloat16"),
    ],
)
def test_weights_that_overflow_when_cast_are_refused(tmp_path, name, change, dtype):
    sae("rational").save_pretrained(tmp_path)
    rewritten(tmp_path, name, change, dtype)
    with pytest.raises(NumericsError, match=f"{name} in .* infinite"):
        FusedRationalSAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["gate.threshold", "gate.activity_threshold", "threshold"])
def test_thresholds_below_zero_are_refused(tmp_path, name):
    one = JumpReluSAE(4, 8) if name == "threshold" else sae("rational")
    one.save_pretrained(tmp_path)
    rewritten(tmp_path, name, lambda one: one - 5)
    with pytest.raises(NumericsError, match="must not be negative; got a smallest value of -"):
        type(one).from_pretrained(tmp_path)


def test_weights_in_eight_bits_are_refused(tmp_path):
    sae("rational").save_pretrained(tmp_path)
    rewritten(tmp_path, "W_enc", lambda one: one.to(torch.float8_e4m3fn))
    with pytest.raises(FormatError, match="float8_e4m3fn, which means nothing without its scales"):
        FusedRationalSAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.uint8])
def test_weights_that_are_whole_numbers_are_refused(tmp_path, dtype):
    sae("relu").save_pretrained(tmp_path)
    weights = {name: one.to(dtype) for name, one in load_file(tmp_path / WEIGHTS_FILE).items()}
    save_file(weights, tmp_path / WEIGHTS_FILE)
    with pytest.raises(FormatError, match="floating-point numbers"):
        load_teacher(tmp_path)
