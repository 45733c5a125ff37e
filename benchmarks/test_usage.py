"""After the contests (test_speed.py), what is none: gate fits, activation extraction, the demo end to end."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rsae_triton.activations import fetch, load_corpus
from rsae_triton.common.errors import SourceError
from rsae_triton.experiments.demo import run
from rsae_triton.experiments.demo_options import Demo
from rsae_triton.remez import fit_gate

NO_TIME = "no time is left of --bench-minutes"
DEMO_SECONDS = 600


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("degree", [(3, 2), (5, 4), (9, 8)], ids=str)
@pytest.mark.parametrize("target", ["relu", "jumprelu", "step"])
def test_gate_fit(target: str, degree: tuple[int, int], session: Any, benchmark: Any) -> None:
    options = {"relu": {}, "jumprelu": {"theta": 0.1, "margin": 0.02}, "step": {"margin": 0.1}}[target]
    fit = benchmark.pedantic(lambda: fit_gate(target, degree, table=False, **options), rounds=3, warmup_rounds=1)
    assert fit.certificate == "rounding" or fit.ratio > 0.999
    keep(session, f"gate fit, {target} {degree}, certified", benchmark.stats.stats.median, "s, CPU time")


def test_extraction(session: Any, benchmark: Any, tmp_path: Path) -> None:
    """Tokens through the demo's language model into a store on disk."""
    if session.left() < 30:
        pytest.skip(NO_TIME)
    n_tokens = 2_000 if session.device.type == "cpu" else 50_000
    if session.tiny:
        n_tokens = 256
    try:
        fetch("smollm2")
        documents = load_corpus("demo")
    except SourceError as error:
        pytest.skip(f"the demo's files cannot be fetched: {error}")
    from rsae_triton import load_host
    from rsae_triton.activations import extract

    host = load_host("smollm2", device=session.device)

    def once() -> None:
        root = tmp_path / str(time.time_ns())
        store = extract(host, documents, n_tokens=n_tokens, root=root, progress=False)
        assert len(store) >= n_tokens

    benchmark.pedantic(once, rounds=2, warmup_rounds=0 if session.device.type == "cpu" else 1)
    keep(session, "activation extraction, SmolLM2-135M", n_tokens / benchmark.stats.stats.min, "tokens/s, wall clock")


def test_demo(session: Any, benchmark: Any, tmp_path: Path) -> None:
    """`rsae demo`, everything made anew but the downloads, on all cores. `make bench` has no time for it."""
    if session.tiny:
        pytest.skip("takes minutes, which a tiny run (--bench-sizes tiny) does not have")
    if session.left() < DEMO_SECONDS:
        pytest.skip(f"{NO_TIME}; `make bench-demo` adds it")
    try:
        fetch("smollm2")
    except SourceError as error:
        pytest.skip(f"the demo's files cannot be fetched: {error}")
    torch.set_num_threads(os.cpu_count() or 1)
    options = dataclasses.replace(Demo(), out=tmp_path / "demo", device=str(session.device))
    benchmark.pedantic(lambda: run(options), rounds=1)
    keep(session, "rsae demo, all cores, downloads there", benchmark.stats.stats.median, "s, wall clock")


def keep(session: Any, name: str, value: float, unit: str) -> None:
    session.other[:] = [one for one in session.other if one["name"] != name]
    session.other.append({"name": name, "value": value, "unit": unit})
    session.save()


@pytest.fixture(autouse=True)
def threads(session: Any) -> None:
    torch.set_num_threads(session.environment["device"]["threads"] or torch.get_num_threads())
