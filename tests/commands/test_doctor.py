"""`rsae doctor` finds what is wrong, and says nothing is when nothing is."""

import importlib.metadata
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rsae_triton.commands import doctor as module
from rsae_triton.commands.cli import main
from rsae_triton.commands.doctor import OPTIONAL, TESTED, self_test
from rsae_triton.common.errors import SourceError
from rsae_triton.ops import cpu

NAN = float("nan")


def findings(capsys) -> tuple[int, dict[str, tuple[str, str]]]:
    status = main(["doctor", "--json"])
    return status, {one["what"]: (one["state"], one["found"]) for one in json.loads(capsys.readouterr().out)}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("RSAE_CACHE", str(tmp_path / "cache"))


def test_doctor_finds_nothing_wrong_on_this_machine(capsys):
    status, found = findings(capsys)
    assert status == 0, found
    assert found["torch"] == ("ok", torch.__version__)
    assert "not reachable" in found["hugging face hub"][1]
    tests = {name: text for name, (state, text) in found.items() if name.startswith("self test") and state == "ok"}
    assert len(tests) == 2
    assert main(["doctor"]) == 0
    assert "self test" in capsys.readouterr().out


def test_a_backend_that_computes_something_else_is_found(capsys, monkeypatch):
    right = cpu.gate_forward

    def wrong(*arguments):
        z, *rest = right(*arguments)
        return (z * 1.05, *rest)

    monkeypatch.setattr(cpu, "gate_forward", wrong)
    status, found = findings(capsys)
    assert status == 1
    assert found["self test, cpu"][0] == "wrong"
    assert found["self test, eager"][0] == "ok"


def test_kernels_that_cannot_be_had_and_a_backend_that_fails_are_named(capsys, monkeypatch):
    def missing():
        raise SourceError("backend='triton' cannot be used (no module named triton)")

    def fails(*_):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(module.backends, "kernels", missing)
    monkeypatch.setattr(cpu, "gate_forward", fails)
    monkeypatch.setattr(module.shutil, "which", lambda _: None)
    status, found = findings(capsys)
    assert status == 1
    assert found["triton kernels"] == ("note", "backend='triton' cannot be used (no module named triton)")
    assert found["self test, cpu"] == ("wrong", "failed: no kernel image")
    assert found["c++ compiler"][0] == "note"


def test_a_backend_that_computes_nan_is_wrong(capsys, monkeypatch):
    right = cpu.gate_forward
    monkeypatch.setattr(cpu, "gate_forward", lambda *arguments: (right(*arguments)[0] * NAN, *right(*arguments)[1:]))
    status, found = findings(capsys)
    assert status == 1
    assert found["self test, cpu"] == ("wrong", "failed: backend cpu computed NaN or infinity")


def test_gpus_are_listed_and_one_too_old_for_the_kernels_is_noted(monkeypatch):
    gpus = [SimpleNamespace(name="T4", major=7, minor=5, total_memory=15 << 30)]
    gpus += [SimpleNamespace(name="H100", major=9, minor=0, total_memory=80 << 30)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpus[index])
    old, new, _ = module._devices()
    assert (old.what, old.state, new.what, new.state) == ("cuda:0", "note", "cuda:1", "ok")
    assert "sm_75, 15 GiB" in old.found
    assert "eager PyTorch runs" in old.found
    assert "sm_90, 80 GiB" in new.found
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "AMD GPU" in list(module._devices())[1].found


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_the_self_test_measures_rounding(backend):
    assert 0 < self_test(backend, torch.device("cpu")) < 1e-5


@pytest.mark.parametrize(
    ("version", "state", "words"),
    [("1.9.1", "wrong", "older than 2.6"), ("2.99.0+cu130", "note", "newer than"), (None, "wrong", "install torch>=")],
)
def test_versions_outside_the_tested_range_are_named(version, state, words, monkeypatch):
    def asked(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", asked)
    finding = module._version("torch", *TESTED["torch"], missing="wrong")
    assert finding.state == state
    assert words in finding.found


def test_a_cache_that_cannot_be_written_is_wrong(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RSAE_CACHE", str(tmp_path / "file" / "cache"))
    status, found = findings(capsys)
    assert status == 1
    assert found["cache"][0] == "wrong"
    assert "RSAE_CACHE" in found["cache"][1]


def test_pinned_versions_lie_in_the_tested_ranges():
    constraints = Path(__file__).parents[2] / "constraints.txt"
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", constraints.read_text(), flags=re.MULTILINE))
    pinned = {name.replace("_", "-"): version for name, version in pinned.items()}
    highest = {name: high for name, (_, high) in TESTED.items()} | {
        name: high for name, (_, high, _) in OPTIONAL.items()
    }
    for name in highest.keys() & pinned.keys():
        assert module._minor(pinned[name]) <= module._minor(highest[name]), name
    assert {"torch", "triton", "numpy", "transformers"} <= highest.keys() & pinned.keys()
