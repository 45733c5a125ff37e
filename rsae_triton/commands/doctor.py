"""`rsae doctor`: lists what this machine has, says what will run on it and why, and tests it for some seconds."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rsae_triton.activations import cache_dir
from rsae_triton.common.errors import ConfigError, SourceError, first_line
from rsae_triton.common.hub import hub_reachable
from rsae_triton.ops import backends, cpu
from rsae_triton.remez import fit_gate
from rsae_triton.sae.gate import RationalGate
from rsae_triton.sae.rational import FusedRationalSAE
from rsae_triton.training.memory import free_memory

State = Literal["ok", "note", "wrong"]

# Lowest and highest minor version that the tests have passed with, or that the code is written for (pyproject.toml);
# constraints.txt pins what CI runs. The optional ones are needed by some features, not by the package.
TESTED: dict[str, tuple[str, str]] = {
    "torch": ("2.6", "2.13"),
    "triton": ("3.2", "3.7"),
    "numpy": ("1.26", "2.4"),
    "scipy": ("1.12", "1.17"),
    "safetensors": ("0.4", "0.8"),
}
OPTIONAL: dict[str, tuple[str, str, str]] = {
    "transformers": ("4.56", "5.23", "host models"),
    "transformer-lens": ("3.0", "4.3", "hooks beyond the residual stream"),
    "huggingface-hub": ("0.34", "2.4", "models and SAEs from the hub"),
    "datasets": ("2.20", "5.2", "text from hub datasets"),
    "gguf": ("0.10", "0.19", "the embedded host model"),
    "scikit-learn": ("1.4", "1.9", "rsae probe"),
    "sae-lens": ("6.54", "6.54", "rsae_triton.integrations.saelens"),
}


@dataclass(frozen=True)
class Doctor:
    """Say what is installed, which backend will run and why, and test it for some seconds.

    Exits with 1 if something is wrong that would make a run fail.

    Examples:
        rsae doctor
        rsae doctor --json
    """

    json: bool = False
    """Print JSON, for a bug report."""


@dataclass(frozen=True)
class Finding:
    """One finding: what was checked, the result, and whether it is "ok", worth a "note", or "wrong"."""

    what: str
    found: str
    state: State = "ok"


def doctor(config: Doctor) -> int:
    """Runs `rsae doctor`. Returns 0 if nothing is wrong, else 1."""
    findings = list(examine())
    if config.json:
        print(json.dumps([asdict(one) for one in findings], indent=1))
    else:
        signs = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "wrong": "[red]wrong[/]"}
        table = Table(box=None, show_header=False, pad_edge=False)
        for one in findings:
            table.add_row(signs[one.state], one.what, escape(one.found))
        Console().print(table)
    return int(any(one.state == "wrong" for one in findings))


def examine() -> Iterator[Finding]:
    """Yields all findings, in the order in which they are printed."""
    yield Finding("python", f"{platform.python_version()} ({sys.executable})")
    yield Finding("machine", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores{_matrix_units()}")
    for name, (low, high) in TESTED.items():
        yield _version(name, low, high, missing="wrong")
    for name, (low, high, needed_for) in OPTIONAL.items():
        yield _version(name, low, high, missing="note", needed_for=needed_for)
    yield from _devices()
    yield _compiler()
    yield _cache()
    reachable = hub_reachable()
    yield Finding("hugging face hub", "reachable" if reachable else "not reachable; local files and its cache only")
    yield from _backend()
    yield from _self_test()


def _matrix_units() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            flags = set(file.read().split())
    except OSError:
        return ""
    found = [name for name in ("avx512_bf16", "amx_bf16", "bf16") if name in flags]
    return f", bfloat16 products in hardware ({found[0]})" if found else ", no bfloat16 products in hardware"


def _version(name: str, low: str, high: str, *, missing: State, needed_for: str = "") -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        what = f"not installed; needed for {needed_for}" if needed_for else f"not installed; install {name}>={low}"
        return Finding(name, what, "note" if name == "triton" and sys.platform != "linux" else missing)
    if _minor(version) < _minor(low):
        return Finding(name, f"{version} is older than {low}, the oldest supported", "wrong")
    if _minor(version) > _minor(high):
        return Finding(name, f"{version} is newer than {high}, the newest tested", "note")
    return Finding(name, version)


def _minor(version: str) -> tuple[int, ...]:
    """The first two numbers of a version; patch releases are assumed to be alike."""
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in version.split("+")[0].split(".")[:2])


def _devices() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding("cuda", "no CUDA device that torch can use; the CPU path runs", "note")
    else:
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            old = (properties.major, properties.minor) < backends.OLDEST
            why = "an AMD GPU; the kernels are for NVIDIA GPUs" if torch.version.hip else "too old for the kernels"
            eager = old or torch.version.hip is not None
            yield Finding(
                f"cuda:{index}",
                f"{properties.name}, sm_{properties.major}{properties.minor}, "
                f"{properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
                f"{f'; {why}, eager PyTorch runs' if eager else ''}",
                "note" if eager else "ok",
            )
    free = free_memory(torch.device("cpu"))
    yield Finding("free memory", "unknown" if free is None else f"{free / 2**30:.1f} GiB on the CPU")


def _compiler() -> Finding:
    name = os.environ.get("CXX") or "g++"
    found = shutil.which(name)
    if found:
        return Finding("c++ compiler", f"{found}; large CPU batches are compiled by Inductor")
    return Finding("c++ compiler", f"no {name}; the CPU gate goes tile by tile, up to twice as slow", "note")


def _cache() -> Finding:
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Finding("cache", f"{folder} cannot be written ({error.strerror}); set RSAE_CACHE to a folder", "wrong")
    free = shutil.disk_usage(folder).free / 2**30
    return Finding("cache", f"{folder}, {free:.1f} GiB free", "note" if free < 2 else "ok")


def _backend() -> Iterator[Finding]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = backends.resolve_backend("auto", device, dtype)
    why = {
        "triton": "a CUDA device and Triton are available",
        "cpu": f"no CUDA device; a training batch goes through {cpu.engine_for(2**21)}",
        "eager": "no usable Triton, or a GPU too old for it",
    }[chosen]
    yield Finding("backend", f"auto takes {chosen!r}: {why}", "note" if chosen == "eager" else "ok")
    try:
        backends.kernels()
        if device.type == "cuda":
            backends.start_driver()
        yield Finding("triton kernels", "import" if device.type != "cuda" else "import, and Triton starts")
    except SourceError as error:
        yield Finding("triton kernels", str(error), "wrong" if device.type == "cuda" else "note")


def _self_test() -> Iterator[Finding]:
    """Tests a small Rational SAE, forward and backward, on every backend of this machine against float64."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in dict.fromkeys(("eager", backends.resolve_backend("auto", device, torch.float32))):
        started = time.perf_counter()
        try:
            error = self_test(name, device)
        except Exception as problem:  # errors of Triton and of the compilers it calls have no common base class
            yield Finding(f"self test, {name}", f"failed: {first_line(problem)}", "wrong")
            continue
        seconds = time.perf_counter() - started
        state: State = "ok" if error < 1e-2 else "wrong"
        yield Finding(f"self test, {name}", f"worst relative error {error:.1e} against float64, {seconds:.1f} s", state)


def self_test(backend: str, device: torch.device) -> float:
    """Returns the largest relative error of a float32 code and its gradients on `backend`, against float64 PyTorch.

    Raises:
        ConfigError: the backend cannot run on the device.
    """
    results: list[list[Any]] = []
    for dtype, kind in ((torch.float64, "eager"), (torch.float32, backend)):
        generator = torch.Generator().manual_seed(0)
        options: dict[str, Any] = {"form": "gated", "backward": "rational", "input_scale": 0.3, "threshold": 0.2}
        gate = RationalGate.from_fit(fit_gate("ramp", (3, 2)), 96, **options)
        sae = FusedRationalSAE(32, 96, gate=gate, generator=generator, dtype=torch.float32)
        sae = sae.to(device=device, dtype=dtype)
        sae.backend = kind
        x = torch.randn(200, 32, generator=generator).to(device=device, dtype=dtype)
        z, counts = sae.encode_with_counts(x)
        (sae.decode(z).square().sum() + counts.sum()).backward()
        leaves = (sae.W_enc, sae.b_enc, sae.W_dec, sae.gate.threshold, sae.gate.alpha)
        results.append([z.detach(), *(leaf.grad for leaf in leaves)])
    if not all(bool(torch.isfinite(one).all()) for one in results[1]):
        raise ConfigError(f"backend {backend} computed NaN or infinity")
    return max(
        float((ours.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-12))
        for truth, ours in zip(*results, strict=True)
    )
