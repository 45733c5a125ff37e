"""The suite: every case of cases.py, all contenders in turns, each proved right first (`make bench`, `make bench-gpu`).

A pytest-benchmark round is one turn of all contenders; their own times go to the JSON of --bench-out.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from cases import Case, cpu_cases, gpu_cases, tiny_cases
from contenders import Made
from measuring import spread, status_of, take_turns, warm_up

from rsae_triton.ops.cost import Ceilings, cost
from rsae_triton.ops.runtime import matmul_precision

RESERVE = 40.0
"""Seconds of the budget that are left to test_usage.py."""
ADAM_PASSES = 7
"""Reads of parameter, gradient and two moments, writes of all but the gradient."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    config = metafunc.config
    cuda = config.getoption("--bench-device") == "cuda"
    chosen = tiny_cases if config.getoption("--bench-sizes") == "tiny" else gpu_cases if cuda else cpu_cases
    tokens = config.getoption("--bench-tokens")
    cases = [case if case.sweep or not tokens else replace(case, n_tokens=tokens) for case in chosen()]
    metafunc.parametrize("case", cases, ids=str)


def test_case(case: Case, session: Any, benchmark: Any) -> None:
    entry: dict[str, Any] = {**asdict(case), **floor(case, session.ceilings), "commit": session.commit}
    if session.has(entry):
        pytest.skip("measured before")
    session.cases.append(entry)
    if session.left() < RESERVE and not session.tiny:
        entry["status"] = "not run: no time left"
        session.save()
        pytest.skip(entry["status"])
    try:
        with matmul_precision("high" if case.tf32 else "highest"):
            compared(case, session, benchmark, entry)
    except Exception as error:
        entry["status"] = status_of(error)
        raise
    finally:
        session.save()
        torch._dynamo.reset()
        gc.collect()
        if session.device.type == "cuda":
            torch.cuda.empty_cache()
    bad = ("wrong", "failed")
    wrong = {name: one["status"] for name, one in entry["contenders"].items() if one["status"].startswith(bad)}
    assert not wrong, wrong


def compared(case: Case, session: Any, benchmark: Any, entry: dict[str, Any]) -> None:
    """Fills in entry["contenders"], {name: status, times, memory, error, prediction}, from turn to turn."""
    began = time.perf_counter()
    turns, most = budget(case, session)
    contenders, reference = Made(case, session.device, peers=True).contenders()
    fit, entries = warm_up(contenders, reference, case.dtype, session.device, 0.6 * most)
    entry["contenders"] = entries
    for one in contenders:
        if one.strategy is not None:
            entries[one.name] |= predicted(case, one.strategy, one.pieces, session.ceilings)

    def keep(times: dict[str, list[float]]) -> None:
        for name, taken in times.items():
            entries[name] |= spread(taken)
        entry["seconds"] = time.perf_counter() - began
        session.save()

    def take() -> None:
        limit = max(most - (time.perf_counter() - began), 1e-3)
        failed = take_turns(fit, session.device, session.clock, turns, keep, 2 if session.tiny else 3, limit=limit)
        for name, status in failed.items():
            entries[name] = {"status": status}

    benchmark.pedantic(take, rounds=1)
    benchmark.extra_info.update({name: one.get("median_s") for name, one in entries.items()})


def budget(case: Case, session: Any) -> tuple[float, float]:
    """Seconds in which turns beyond the least may begin, and those after which no contender and no turn begins.

    So that no case, however slow on this machine, takes the time of those after it.
    """
    if session.tiny:
        return 0.0, math.inf
    large = case.n_tokens * case.d_in * case.d_sae > 2**33
    turns, most = (0.0, 15.0) if case.sweep else (6.0, 60.0)
    if large and session.device.type == "cpu":
        turns, most = 10.0, 150.0
    elif case.work == "step" and case.compiled:  # on a GPU: kernels are compiled, and so is eager PyTorch
        most = 75.0
    return turns, max(min(most, session.left() - RESERVE), 1.0)


def floor(case: Case, on: Ceilings) -> dict[str, Any]:
    """FLOPs and bytes that the work cannot do without, and the seconds they take on the measured ceilings."""
    step = case.cost_step()
    codes, weights, rows, size = step.codes, step.weights, step.n_tokens * step.d_in, step.itemsize
    products, codes_moved, weights_moved = {
        "encode": (1, 1, 1), "backward": (2, 3, 2), "step": (5, 3, 5), "sparse": (1, 0, 1), "coefficients": (0, 3, 0),
    }[case.work]  # fmt: skip
    flops = 2.0 * codes * step.d_in * products
    moved = size * (codes_moved * codes + weights_moved * weights + 2 * rows * (case.work != "coefficients"))
    if case.work == "step":
        moved += ADAM_PASSES * 2 * weights * size
    seconds = max(flops / on.products.get(size, on.products[min(on.products)]), moved / on.bandwidth)
    return {"flops": flops, "bytes": moved, "floor_s": seconds}


def predicted(case: Case, strategy: str, pieces: dict[str, int], on: Ceilings) -> dict[str, float]:
    """The analytic cost of a whole step: seconds on the measured ceilings (with Adam), and peak bytes."""
    step = case.cost_step()
    found = cost(step, strategy, **pieces)
    adam = ADAM_PASSES * 2 * step.weights * step.itemsize / on.bandwidth
    return {"predicted_s": found.seconds(on) + adam, "predicted_bytes": found.peak_bytes}
