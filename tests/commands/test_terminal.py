"""What a command says, to whom, and what strangers' names do to it."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from valid_files import gemma_scope, sparsify

from rsae_triton import load_teacher
from rsae_triton.activations import load_corpus, store_tensor
from rsae_triton.commands.cli import main
from rsae_triton.common.errors import ConfigError, RsaeError, StorageError
from rsae_triton.common.terminal import Patient, plain, printable
from rsae_triton.experiments.demo import Stages
from rsae_triton.experiments.demo_options import Demo, check
from rsae_triton.experiments.sweep import Sweep, run_cells
from rsae_triton.experiments.teach import TeacherPlan, make_teacher
from rsae_triton.teachers import ReluSAE

ESCAPE = "\x1b]0;owned\x07\x1b[2J\x1b[31m"


def command(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | options.pop("env", {})
    line = [sys.executable, "-W", "ignore", "-m", "rsae_triton", *map(str, arguments)]
    return subprocess.Popen(line, env=environment, text=True, stderr=subprocess.PIPE, **options)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    x = torch.randn(128, 3, generator=torch.Generator().manual_seed(0))
    store_tensor(x, folder / "store")
    ReluSAE(3, 8, generator=torch.Generator().manual_seed(0)).save_pretrained(folder / "teacher")
    return folder


@pytest.mark.parametrize("stdout", ["closed", "ascii"])
def test_a_run_ends_with_its_result_whoever_listens(files, tmp_path, stdout):
    """Nobody reads stdout, unbuffered: the first line written fails; and a terminal that has no character for it."""
    reader, writer = os.pipe()
    if stdout == "closed":
        os.close(reader)
    arguments = ["train", files / "teacher", "--activations", files / "store", "--out", tmp_path / "run", "--steps", 2]
    env = {"PYTHONIOENCODING": "ascii"} if stdout == "ascii" else {}
    run = command(*arguments, "--batch-size", "32", stdout=writer, env=env)
    os.close(writer)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert "Traceback" not in errors
    assert load_teacher(tmp_path / "run" / "sae").d_sae == 8


@pytest.mark.skipif(sys.platform != "linux", reason="signals")
def test_a_ctrl_c_while_torch_is_imported_shows_no_traceback():
    # A shell's background job ignores the signal, and so would what it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    run = command("doctor", stdout=subprocess.DEVNULL)
    signal.signal(signal.SIGINT, before)
    until = time.monotonic() + 100
    while "libtorch" not in Path(f"/proc/{run.pid}/maps").read_text() and time.monotonic() < until:
        time.sleep(0.005)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == -signal.SIGINT
    assert "Traceback" not in errors


def test_a_stream_whose_reader_is_gone_swallows_what_is_written():
    reader, writer = os.pipe()
    os.close(reader)
    stream = Patient(os.fdopen(writer, "w", buffering=1))
    assert stream.write("one\n") == 4
    assert stream.write("two\n") == 4
    stream.flush()


def test_text_is_shown_and_not_obeyed():
    assert printable(ESCAPE) == "\\x1b]0;owned\\x07\\x1b[2J\\x1b[31m"
    assert printable("caf\u00e9 \u202etxt\ud800") == "caf\u00e9 \\u202etxt\\ud800"
    with open(os.devnull, "w") as null:
        console = Console(file=null, width=200, record=True)
        for name in ("run[v2]/report.html", "a[/b]/report.html", "[bold]x"):
            console.print(plain(name), highlight=False)
        assert console.export_text().split() == ["run[v2]/report.html", "a[/b]/report.html", "[bold]x"]
        with Stages(console).stage("Host model models/x[/y]"):
            pass
        assert "Host model models/x[/y]" in console.export_text()


@pytest.mark.parametrize("where", ["cfg.json", "a member's name"])
def test_escape_sequences_of_a_file_do_not_reach_the_terminal(files, tmp_path, capsys, where):
    folder = tmp_path / "theirs"
    folder.mkdir()
    if where == "cfg.json":
        sparsify(folder)
        config = json.loads((folder / "cfg.json").read_text()) | {"num_latents": ESCAPE}
        (folder / "cfg.json").write_text(json.dumps(config))
    else:
        gemma_scope(folder)
        with zipfile.ZipFile(folder / "params.npz", "a") as made, made.open(ESCAPE + ".npy", "w") as stream:
            np.lib.format.write_array(stream, np.array([{}]), allow_pickle=True)
    assert main(["upgrade", str(folder), "--activations", str(files / "store"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert "\x07" not in said
    assert "owned" in said


def test_a_strangers_name_is_no_markup_in_the_card(tmp_path):
    name = "gpt2\n\n<script>alert(1)</script>\n\n## Loading\n\n```python\nimport os\n```\n[click](https://evil.example)"
    sae = ReluSAE(4, 8, metadata={"model_name": name, "hook_name": "blocks.0`</code><b>"})
    card = (sae.save_pretrained(tmp_path) / "README.md").read_text()
    for part in ("<script>", "</code>", "\n## Loading\n\n```python\nimport os", "[click]("):
        assert part not in card
    assert card.count("\n## Loading") == 1
    assert "&lt;script&gt;" in card
    assert "base_model" not in card


@pytest.mark.parametrize(
    ("figure", "error"),
    [("fig.xyz", ConfigError), ("fig", ConfigError), ("/proc/nowhere/fig.png", StorageError), (".", ConfigError)],
)
def test_a_figure_that_cannot_be_written_is_refused_before_the_run(tmp_path, figure, error):
    with pytest.raises(error, match=r"figure|cannot be"):
        check(Demo(figure=tmp_path / figure, out=tmp_path))
    check(Demo(figure=tmp_path / "new" / "fig.png", out=tmp_path))
    assert list(tmp_path.iterdir()) == []


HOSTS = (
    "mine = 5", "[mine]\nsweeps = 5", "[mine]\nsweeps = [1]", '[mine]\n[[mine.sweeps]]\nsparsities = ["x"]',
    "[mine]\n[[mine.sweeps]]\nsparsities = [0]", '[mine]\n[[mine.sweeps]]\nwidths = "ab"\nteachers=["relu"]',
    "[mine]\n[[mine.sweeps]]\nseeds = 3", "[mine]\npublished = 3\n[[mine.sweeps]]\nseeds = [3]",
    "[mine]\n[[mine.sweeps]]\ntokens = true", "[mine]\n[[mine.sweeps]]\nmodel = 3",
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTS)
def test_hosts_of_other_types_take_one_line(tmp_path, capsys, text):
    (tmp_path / "h.toml").write_text(text + "\n")
    arguments = ["--host", "mine", "--hosts", str(tmp_path / "h.toml"), "--out", str(tmp_path / "o"), "--list"]
    assert main(["reproduce", *arguments]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cell": 1}'])
def test_a_cell_that_is_not_whole_is_computed_again(tmp_path, monkeypatch, text):
    from rsae_triton.experiments import sweep as module

    (cell,) = Sweep(teachers=("relu",), sparsities=(1.0,), out=tmp_path).cells()
    cell.path.parent.mkdir(parents=True)
    cell.path.write_text(text)
    result = {"cell": {}, "scores": {}, "stage1": {}}
    monkeypatch.setattr(module, "load_host", lambda *_, **__: object())
    monkeypatch.setattr(module, "load_corpus", lambda _: [])
    monkeypatch.setattr(module, "splits_for", lambda *_: ())
    monkeypatch.setattr(module, "one_line", lambda _: "")
    monkeypatch.setattr(module, "run_cell", lambda *_: result)
    with pytest.warns(UserWarning, match="computed again"):
        assert run_cells([cell]) == [result]


@pytest.mark.parametrize("text", ["", "{}", '{"mse": []}'])
def test_a_cached_teacher_whose_log_is_not_whole_is_trained_again(tmp_path, monkeypatch, text):
    import hashlib

    monkeypatch.setenv("RSAE_CACHE", str(tmp_path))
    plan = TeacherPlan("relu", 8, steps=2, batch_size=16)
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))

    class Splits:
        class train:  # noqa: N801
            manifest, scale, mean, d_in = {"key": "k"}, 1.0, x.mean(0), 4

    identity = {"data": "k", **plan.identity(), "version": 2}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    folder = tmp_path / "teachers" / f"relu-{key}"
    plan.untrained(4).save_pretrained(folder)
    (folder / "log.json").write_text(text)
    with pytest.warns(UserWarning, match="computed again"):
        _, log = make_teacher(plan, Splits, x)
    assert log.steps == 2
    assert make_teacher(plan, Splits, x)[1].mse == log.mse


def test_half_a_character_of_a_text_is_replaced_and_said(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "' + "word " * 300 + '\\ud800 end"}\n')
    with pytest.warns(UserWarning, match="half"):
        (document,) = load_corpus(tmp_path / "a.jsonl")
    assert document.text.encode().decode().endswith("\ufffd end")


def test_storage_error_is_an_rsae_error():
    assert issubclass(StorageError, RsaeError)
