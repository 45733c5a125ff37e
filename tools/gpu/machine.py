"""The machine, compiling in parallel, and rows of the routing table."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy
import torch
import triton

from gpu.correct import differentiated, smallest
from gpu.made import GATES, SHAPES, TINY, Case, freeze, make, with_rounds
from gpu.speed import ceilings
from rsae_triton.commands import routes as measuring
from rsae_triton.ops.cost import CEILINGS, Ceilings

Row = dict[str, Any]


def described(device: torch.device, tiny: bool) -> Row:
    """What the numbers are measured on and with, and what it reaches."""
    cuda = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if cuda else None
    return {
        "status": "ok",
        "device": {
            "kind": "cuda" if cuda else "interpreter",
            "name": torch.cuda.get_device_name(device) if cuda else platform.machine(),
            "memory_bytes": properties.total_memory if properties else None,
            "multiprocessors": properties.multi_processor_count if properties else None,
            "cores": os.cpu_count(), "cores_usable": len(os.sched_getaffinity(0)), "threads": None,
        },
        "clock": "cuda events" if cuda else "wall time",
        "load_average_before": os.getloadavg()[0],
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__,
            "numpy": numpy.__version__, "cuda": torch.version.cuda,
        },
        "ceilings": asdict(ceilings(device, tiny)),
    }  # fmt: skip


def ceilings_of(rows: list[Row]) -> Ceilings:
    """Those measured in this run; an H200's estimates where that part failed."""
    found = next((row["ceilings"] for row in rows if row.get("ceilings")), None)
    if found is None:
        return CEILINGS["H200"]
    return Ceilings(**{**found, "products": {int(size): rate for size, rate in found["products"].items()}})


def compiled(device: torch.device, tiny: bool) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Every kernel that the timed steps launch, specialised as there, on few tokens and features."""
    for shape in TINY if tiny else SHAPES:
        for degree, groups in GATES[:1] if tiny else GATES:
            # 512 tokens, so that their words of bits are a multiple of 16 too: Triton compiles anew where they are not.
            small = Case(16 if tiny else 512, shape[1], 40 if tiny else 512, degree, groups)
            for way in ("sparse",) if tiny else ("sparse", "triton:split", "triton:fused"):
                yield f"{way} {small}", partial(_step, small, way, device)
        small = Case(16 if tiny else 512, shape[1], 40 if tiny else 512)
        yield f"two rounds {small}", partial(_step, small, "two rounds", device)
    if not tiny:  # what compute-sanitizer looks at: compiling under it takes too long
        yield from smallest(device)


def _step(case: Case, way: str, device: torch.device) -> Row:
    sae, x = make(case, device)
    sae = with_rounds(sae, x) if way == "two rounds" else freeze(sae)
    sae.backend = way if way.startswith("triton") else "triton:split"
    began = time.perf_counter()
    found = differentiated(sae, x, "bf16", **({"memory": "sparse"} if way == "sparse" else {}))
    return {"status": "ok", "loss": float(found["loss"]), "first_s": round(time.perf_counter() - began, 2)}


def routes(device: torch.device, tiny: bool) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Rows of rsae_triton/ops/routes.json, measured; the widths of the timed shapes first."""
    timer = (lambda call: (call(), 1.0)[1]) if tiny else measuring.median_ms
    sizes = {"n_tokens": 16, "d_sae": 32} if tiny else {}
    for place, (key, run) in enumerate(measuring.rows(device, timer, **sizes)):
        if tiny and place == 2:
            return
        name = f"{key['itemsize']} bytes, d_in {key['d_in']}, ({key['p']}, {key['q']}), shared {key['shared']}"
        yield name, partial(_route, run)


def _route(run: Callable[[], Row]) -> Row:
    return {"status": "ok", "route": run()}
