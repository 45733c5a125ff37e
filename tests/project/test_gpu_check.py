"""tools/gpu_check.py on a bare machine without a GPU: the same program, in the interpreter, at the smallest sizes."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rsae_triton.commands.bench import Bench, run_bench
from rsae_triton.common.errors import ConfigError
from rsae_triton.ops import routing
from rsae_triton.report.speed.results import read_result

ROOT = Path(__file__).resolve().parents[2]
# torch, triton, numpy and safetensors, and what those need.
THERE = (
    "torch", "triton", "numpy", "safetensors", "filelock", "fsspec", "jinja2", "markupsafe", "networkx", "sympy",
    "mpmath", "typing_extensions", "functorch", "torchgen", "packaging", "setuptools",
)  # fmt: skip


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """An environment that sees these packages alone, whatever is installed here."""
    folder = tmp_path_factory.mktemp("site")
    for name in THERE:
        spec = importlib.util.find_spec(name)
        assert spec is not None, name
        place = Path(spec.origin)
        place = place.parent if place.name == "__init__.py" else place
        for one in (place, place.parent / f"{name}.libs"):
            if one.exists():
                (folder / one.name).symlink_to(one)
    return {**{k: v for k, v in os.environ.items() if not k.startswith("COV")}, "PYTHONPATH": str(folder),
            "OMP_NUM_THREADS": "1"}  # fmt: skip


def check(bare, out, *options):
    command = [sys.executable, "-S", str(ROOT / "tools" / "gpu_check.py"), "--tiny", "--out", str(out), *options]
    return subprocess.run(command, env=bare, capture_output=True, text=True, timeout=600, cwd=out.parent)


@pytest.fixture(scope="module")
def dry_run(bare, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    return check(bare, out), out


def lines(out):
    return sum(len(path.read_text().splitlines()) for path in out.glob("rows-*.jsonl"))


def test_the_dry_run_finds_all_right(dry_run):
    run, out = dry_run
    assert run.returncode == 0, run.stdout + run.stderr
    result = read_result(out / "gpu_check.json")
    assert result["checks"]["machine"] == {"ok": 1}
    assert set(result["checks"]["correct"]) == {"ok"}
    assert result["checks"]["correct"]["ok"] == 12
    assert result["checks"]["sanitize"] == {"not run": 2}
    assert result["versions"]["torch"] == torch.__version__
    [case] = result["cases"]
    assert {"bare products", "one product", "sparse", "sparse, row optimiser", "two rounds", "split", "fused"} <= set(
        case["contenders"]
    )
    alone = [one["name"].split(": ", 1)[1] for one in result["other"]]
    assert {"sparse: encoding alone", "two rounds: encoding alone", "two rounds: loss and backward alone"} <= set(alone)
    assert all(one["median_s"] > 0 for one in case["contenders"].values() if one["status"] == "ok")
    assert case["contenders"]["sparse"]["predicted_s"] > 0
    assert 0 < case["contenders"]["sparse"]["support"] < 0.5
    assert len(result["routes"]) == 2
    assert "sparse, row optimiser" in run.stdout
    assert {path.name for path in out.iterdir()} == {"gpu_check.json", "rows-all.jsonl", "log.txt"}


def test_gpu_check_continues_where_it_stopped(bare, dry_run):
    _, out = dry_run
    before = lines(out)
    run = check(bare, out, "--only", "compile", "--only", "sanitize")
    assert run.returncode == 0, run.stdout + run.stderr
    assert lines(out) == before
    result = read_result(out / "gpu_check.json")
    assert result["checks"]["correct"] == {"ok": 12}


def test_gpu_check_ends_when_its_time_is_up(bare, tmp_path):
    """A quarter of a minute is what it keeps in reserve."""
    run = check(bare, tmp_path / "out", "--minutes", "0.2")
    assert run.returncode == 0, run.stdout + run.stderr
    assert read_result(tmp_path / "out" / "gpu_check.json")["checks"] == {}


def test_a_dry_run_is_shown_and_not_kept(dry_run, tmp_path, capsys):
    path = dry_run[1] / "gpu_check.json"
    run_bench(Bench(results=tmp_path, new=path))
    assert "sparse, row optimiser" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="dry run"):
        run_bench(Bench(results=tmp_path, new=path, keep=True))


def test_a_run_on_a_gpu_is_taken_over(dry_run, tmp_path):
    """Into the results, the pages and the table of routes."""
    result = json.loads((dry_run[1] / "gpu_check.json").read_text())
    result |= {"tiny": False, "device": {**result["device"], "kind": "cuda", "name": "NVIDIA H200"}}
    route = copy.deepcopy(next(row for row in routing.predicted() if row["device"] == "H200"))
    result["routes"] = [{**route, "source": "measured", "forward": "fused"}]
    result["rows"].append({"part": "correct", "item": "an item", "status": "wrong: off by 1"})
    new = tmp_path / "new.json"
    new.write_text(json.dumps(result))
    for folder in ("docs", "rsae_triton/ops", "results"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "docs" / "index.md").write_text("<!-- speed table: -->\nold\n<!-- /speed table -->\n")
    run_bench(Bench(results=Path("results"), new=new, keep=True, render=True), root=tmp_path)
    kept = read_result(tmp_path / "results" / "speed-cuda-nvidia-h200.json")
    assert kept["rows"]
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "NVIDIA H200" in page
    assert "an item: wrong: off by 1" in page
    rows = json.loads((tmp_path / "rsae_triton" / "ops" / "routes.json").read_text())["rows"]
    assert [row["forward"] for row in rows if row["source"] == "measured"] == ["fused"]
