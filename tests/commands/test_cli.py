"""The command line: wrong input takes one line and exit code 2, and leaves the cache alone."""

import json
from dataclasses import asdict

import pytest
import torch

from rsae_triton import __version__
from rsae_triton.commands.cli import main
from rsae_triton.common.errors import ShapeError
from rsae_triton.experiments.demo import Stages, check_width, make_teacher, place
from rsae_triton.experiments.demo_options import Demo
from rsae_triton.teachers import ReluSAE, TopKSAE


def one_line(capsys, *parts):
    error = capsys.readouterr().err.strip()
    assert error.startswith("rsae: ")
    assert "\n" not in error
    assert "Traceback" not in error
    for part in parts:
        assert part in error
    return error


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--tokens", "0"], ["--tokens", "positive"]),
        (["--d-sae", "-3"], ["--d-sae"]),
        (["--sequences", "1"], ["--sequences", "at least 2"]),
        (["--tokens", "100"], ["--tokens 100", "batch of 512"]),
        (["--teacher", "/no/such/folder"], ["/no/such/folder", "none of relu", "give a folder"]),
        (["--model", "/no/such/model.gguf"], ["/no/such/model.gguf"]),
        (["--model", "/no/such/folder"], ["/no/such/folder"]),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(arguments, parts, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("RSAE_CACHE", str(tmp_path / "cache"))
    assert main(["demo", "--out", str(tmp_path / "out"), *arguments]) == 2
    one_line(capsys, *parts)
    assert not (tmp_path / "out").exists()


def test_a_teacher_folder_without_a_teacher_is_named(capsys, tmp_path):
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "gated"}))
    assert main(["demo", "--teacher", str(tmp_path)]) == 2
    one_line(capsys, "is in no format that is read here. It holds cfg.json")


def test_debug_shows_the_traceback():
    with pytest.raises(Exception, match="--tokens"):
        main(["demo", "--tokens", "0", "--debug"])


def test_a_teacher_of_another_width_is_named():
    class Host:
        name, default_hook = "smollm2", "blocks.16.hook_resid_pre"

        def hook_width(self):
            return 576

    with pytest.raises(ShapeError, match=r"d_in=16.*has 576"):
        check_width(ReluSAE(16, 32), Host(), "my_sae")
    check_width(None, Host(), "relu")


def test_a_saved_teacher_is_read_where_it_says():
    teacher = ReluSAE(16, 32, metadata={"model_name": "gpt2", "hook_name": "blocks.8.hook_resid_pre"})
    assert place(Demo(), teacher) == ("gpt2", "blocks.8.hook_resid_pre")
    assert place(Demo(model="other", hook="blocks.1.hook_resid_pre"), teacher) == ("other", "blocks.1.hook_resid_pre")
    assert place(Demo(), ReluSAE(16, 32)) == place(Demo(), None) == ("smollm2", None)


def test_quick_is_smaller_but_keeps_what_was_set_by_hand():
    assert Demo().sized() == Demo()
    quick = Demo(quick=True, steps=7).sized()
    assert quick.steps == 7
    assert quick.tokens < Demo().tokens
    assert set(asdict(quick)) == set(asdict(Demo()))


def test_a_teacher_is_trained_once_and_then_read(tmp_path, monkeypatch, activations):
    monkeypatch.setenv("RSAE_CACHE", str(tmp_path))

    class Train:
        manifest = {"key": "k"}  # noqa: RUF012
        scale, mean, d_in = 1.0, activations.mean(0), 16

    class Splits:
        train = Train()

    demo = Demo(teacher="topk", d_sae=64, teacher_steps=3, batch_size=64)
    first, log = make_teacher(demo, None, Splits(), activations)
    again, log_again = make_teacher(demo, None, Splits(), activations)
    assert isinstance(again, TopKSAE)
    assert torch.equal(first.W_enc, again.W_enc)
    assert log == log_again
    # A run killed before the log was written is not mistaken for a whole one.
    next((tmp_path / "teachers").iterdir()).joinpath("log.json").unlink()
    assert torch.equal(make_teacher(demo, None, Splits(), activations)[0].W_enc, first.W_enc)


def test_a_loaded_teacher_is_taken_to_the_units_of_the_store(activations):
    class Train:
        scale = 0.25

    class Splits:
        train = Train()

    raw = TopKSAE(16, 32, k=4)
    raw.units = 1.0
    x = activations[:50]
    expected = raw.encode(x / 0.25)
    scaled, log = make_teacher(Demo(), raw, Splits(), x)
    assert log is None
    assert torch.allclose(scaled.encode(x), expected, atol=1e-5)


def test_gates_command_prints_the_certificate(capsys):
    assert main(["gates", "fit", "relu", "--degree", "3,2"]) == 0
    assert "lower bound" in capsys.readouterr().out


def test_stages_time_what_they_name():
    from rich.console import Console

    stages = Stages(Console(quiet=True))
    with stages.stage("one"):
        pass
    assert list(stages.seconds) == ["one"]


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.split() == ["rsae-triton", __version__]
