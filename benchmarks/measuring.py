"""Clocks, memory and ceilings: how a contender is timed, in turns with the others, after it has been proved right."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from rsae_triton.ops.cost import CEILINGS, Ceilings
from rsae_triton.ops.runtime import matmul_precision

LIMITS = {"fp32": 1e-3, "bf16": 3e-2}
"""Relative error that a contender may have beside twice eager PyTorch's own."""


@dataclass
class Contender:
    """One way to do a case's work.

    Attributes:
        run: does the work once. found: what it computed, by name, after a run; None where there is nothing to compare.
        exact: whether `found` must agree with the case's reference (peers compute something else and check
            themselves: `found` raises).
        strategy: the row of `rsae_triton.ops.cost` that predicts it, if there is one. pieces: its chunk sizes there.
        wanted: what it must find, where that is not the case's reference.
        forget: gives up what the last run left, before memory is looked at; returns how many bytes of it do not count
            (gradients, which every run leaves).
        most: turns at most, where one takes long and no target asks for it.
    """

    name: str
    run: Callable[[], None]
    found: Callable[[], dict[str, Tensor]] | None = None
    exact: bool = True
    strategy: str | None = None
    pieces: dict[str, int] = field(default_factory=dict)
    wanted: dict[str, Tensor] | None = None
    forget: Callable[[], int] | None = None
    most: int | None = None


class WrongResultError(Exception):
    """A contender's result is wrong; it gets no time."""


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def out_of_memory(error: BaseException) -> bool:
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        one in said for one in ("not enough memory", "out of memory")
    )


def warm_up(
    contenders: list[Contender],
    reference: dict[str, Tensor],
    dtype: str,
    device: torch.device,
    seconds: float = math.inf,
) -> tuple[list[Contender], dict[str, dict[str, Any]]]:
    """Runs every contender once, with an eye on its memory, and compares what it computed.

    seconds: contenders whose turn to be proved comes later are left out.

    Returns:
        Those that may be timed, and for each name its entry: "status" ("ok" or why not), "error" (the largest relative
        error of a result), "peak_bytes".
    """
    fit, entries = [], {}
    eager: dict[str, float] = {}
    began = time.perf_counter()
    for contender in contenders:
        entry: dict[str, Any] = {"status": "ok"}
        entries[contender.name] = entry
        if time.perf_counter() - began > seconds:
            entry["status"] = "not run: the case's time was used up"
            continue
        try:
            if device.type == "cuda" or not contender.name.startswith(("eager", "bare")):
                contender.run()  # what compiles, or makes an optimiser's state, does so now
            entry["peak_bytes"] = peak_bytes(contender, device)
            if contender.found is not None:
                found = contender.found()
                if contender.exact:
                    wanted = contender.wanted or reference
                    # Where nothing flows (all zero) autograd may leave no gradient.
                    errors = {name: relative_error(found[name], w) for name, w in wanted.items() if bool(w.any())}
                    entry["error"] = max(errors.values())
                    if not eager and contender.name.startswith("eager"):
                        eager = errors
                    check(errors, eager, LIMITS[dtype])
            fit.append(contender)
        except Exception as error:
            entry["status"] = status_of(error)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return fit, entries


def status_of(error: Exception) -> str:
    """What stands in the place of a time."""
    if isinstance(error, WrongResultError):
        return f"wrong: {error}"
    return "out of memory" if out_of_memory(error) else f"failed: {first_line(error)}"


def relative_error(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach().double()
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    norm = float(wanted.norm())
    return float((found - wanted).norm()) / norm if norm else float(found.norm())


def check(errors: dict[str, float], eager: dict[str, float], limit: float) -> None:
    for name, error in errors.items():
        allowed = 2 * min(eager.get(name, 0.0), 10 * limit) + limit
        if not error <= allowed:
            raise WrongResultError(f"{name} is off by {error:.2g} of its norm, {allowed:.2g} are allowed")


def take_turns(
    contenders: list[Contender],
    device: torch.device,
    clock: str,
    seconds: float,
    after: Callable[[dict[str, list[float]]], None],
    least: int = 3,
    most: int = 20,
    limit: float = math.inf,
) -> dict[str, str]:
    """The contenders take turns, so that what else the machine does hits all of them alike.

    after: is given all times by name after each turn. seconds: no turn after `least` begins later; limit: none at all.

    Returns:
        The status of those that failed on the way, by name; their times are lost, the others go on.
    """
    failed: dict[str, str] = {}
    times: dict[str, list[float]] = {one.name: [] for one in contenders}
    began = time.perf_counter()
    turn = 0
    while contenders and turn < most and time.perf_counter() - began < (seconds if turn >= least else limit):
        for one in contenders[turn % len(contenders) :] + contenders[: turn % len(contenders)]:
            if one.most is not None and turn >= one.most:
                continue
            try:
                times[one.name].append(timed(one.run, device, clock))
            except Exception as error:
                failed[one.name] = status_of(error)
                del times[one.name]
            if device.type == "cuda" and failed:
                torch.cuda.empty_cache()
        contenders = [one for one in contenders if one.name not in failed]
        turn += 1
        after(times)
    return failed


def timed(run: Callable[[], None], device: torch.device, clock: str) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    read = time.process_time if clock == "process" else time.perf_counter
    before = read()
    run()
    return read() - before


def spread(times: list[float]) -> dict[str, Any]:
    t = torch.tensor(times, dtype=torch.float64)
    q = [float(torch.quantile(t, share)) for share in (0.2, 0.5, 0.8)]
    return {"p20_s": q[0], "median_s": q[1], "p80_s": q[2], "turns": len(times)}


def forget(module: torch.nn.Module) -> int:
    """Drops a module's gradients; returns the bytes that they and those of the next step take."""
    module.zero_grad(set_to_none=True)
    return sum(one.numel() * one.element_size() for one in module.parameters() if one.requires_grad)


def peak_bytes(one: Contender, device: torch.device) -> int:
    """Most bytes alive at once during a run beyond those before it, when the last run's gradients still were."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one.run()
        torch.cuda.synchronize()
        return max(torch.cuda.max_memory_allocated() - before, 0)
    # The allocator's own reports; those of other threads are not seen, hence one. Nor is it seen when memory goes that
    # was there before: what is left of the last run goes first.
    uncounted = 0 if one.forget is None else one.forget()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            one.run()
    finally:
        torch.set_num_threads(threads)
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return max(peak - uncounted, 0)


def ceilings(device: torch.device, clock: str, quick: bool) -> Ceilings:
    """What this device reaches now: one copy, one big matrix product by dtype, cached multiply-adds (CPU)."""
    n = 256 if quick else 8192 if device.type == "cuda" else 1536
    elements = 2**14 if quick else 2**28 if device.type == "cuda" else 2**24

    def best(run: Callable[[], None]) -> float:
        run()
        return min(timed(run, device, clock) for _ in range(5))

    a = torch.randn(elements, device=device)
    b = torch.empty_like(a)
    bandwidth = 2 * a.numel() * a.element_size() / best(lambda: b.copy_(a))
    products = {}
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" or quick else (torch.float32,):
        # float32 as the ceiling allows: with TF32 on a GPU; cases without it will look further from their floor.
        x, w = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(x)
        with matmul_precision("high"):
            products[dtype.itemsize] = 2.0 * n**3 / best(lambda x=x, w=w, out=out: torch.mm(x, w, out=out))
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((one for key, one in CEILINGS.items() if key in name), CEILINGS["H100"])
        return Ceilings(name, products, bandwidth, known.instructions, known.launch, measured=True)
    small, factor, out = (torch.randn(2**14) for _ in range(3))

    def arithmetic() -> None:
        for _ in range(200):
            torch.addcmul(small, factor, factor, out=out)

    rate = 200 * small.numel() / best(arithmetic)
    return Ceilings(processor(), products, bandwidth, rate, 5e-6, 1.0, measured=True)


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line for line in lines if line.startswith("model name")).split(":", 1)[1].strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(device: torch.device, threads: int, clock: str) -> dict[str, Any]:
    """What the numbers were measured on and with."""
    import numpy
    import triton

    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    cuda = device.type == "cuda"
    return {
        "device": {
            "kind": device.type,
            "name": torch.cuda.get_device_name(device) if cuda else processor(),
            "memory_bytes": torch.cuda.get_device_properties(device).total_memory if cuda else None,
            "cores": None if cuda else os.cpu_count(),
            "cores_usable": None if cuda else len(os.sched_getaffinity(0)),
            "threads": None if cuda else threads,
        },
        "clock": "cuda events" if cuda else f"{clock} time",
        "load_average_before": os.getloadavg()[0],
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__,
            "numpy": numpy.__version__, "cuda": torch.version.cuda,
        },
        "commit": head.stdout.strip() + ("+changes" if changed.stdout.strip() else ""),
    }  # fmt: skip
