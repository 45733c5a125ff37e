"""`make routes`: times both ways of routing.py on this GPU and puts the result into its table.

For every row of the device, a product with its gate, and dz with the gate's backward pass, are timed split and fused,
at the shape that the predictions are for. This takes some minutes, most of them for compiling.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from rsae_triton.common.errors import ConfigError
from rsae_triton.ops import backends, routing
from rsae_triton.ops.cost import CEILINGS
from rsae_triton.ops.reference import GateSpec, GateTensors

DTYPES = {2: torch.bfloat16, 4: torch.float32}
Timer = Callable[[Callable[[], object]], float]


def median_ms(call: Callable[[], object]) -> float:
    """The median time in milliseconds, with a cold L2 cache."""
    from triton.testing import do_bench

    return do_bench(call, warmup=25, rep=100, return_mode="median")


def name_in_table(device_name: str) -> str:
    """The name of this GPU in the table's rows: a known short name, else its own."""
    return next((name for name in CEILINGS if name.lower() in device_name.lower()), device_name)


def measure(device: torch.device, timer: Timer = median_ms, **sizes: int) -> Iterator[dict[str, Any]]:
    """Yields the table's rows for this device, with source "measured"."""
    return (run() for _, run in rows(device, timer, **sizes))


def rows(
    device: torch.device,
    timer: Timer = median_ms,
    n_tokens: int = routing.N_TOKENS,
    d_sae: int = routing.D_SAE,
) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Yields, for each row, the fields that identify it and the functions to time."""
    name = name_in_table(routing.device_name(device))
    for itemsize, dtype in DTYPES.items():
        for p, q in routing.DEGREES:
            for shared in (True, False):
                for d_in in routing.WIDTHS:
                    key = {"device": name, "itemsize": itemsize, "d_in": d_in, "p": p, "q": q, "shared": shared}
                    made = partial(_calls, device, dtype, n_tokens, d_in, d_sae, GateSpec(p, q), shared)
                    yield key, partial(_row, key, made, timer)


def _row(
    key: dict[str, Any], calls: Callable[[], dict[str, dict[str, Callable[[], object]]]], timer: Timer
) -> dict[str, Any]:
    row = {**key, "source": "measured"}
    for name, ways in calls().items():
        ms = {way: timer(call) for way, call in ways.items()}
        row[name] = min(ms, key=ms.__getitem__)
        row |= {f"{name}_{way}_ms": round(one, 3) for way, one in ms.items()}
    return row


def _calls(
    device: torch.device, dtype: torch.dtype, n_tokens: int, d_in: int, d_sae: int, spec: GateSpec, shared: bool
) -> dict[str, dict[str, Callable[[], object]]]:
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    sets = 1 if shared else d_sae
    gate = GateTensors(
        a=normal(sets, spec.p + 1), b=normal(sets, spec.q), centre=normal(sets) / 10,
        input_scale=torch.full((sets,), 2.0, device=device), output_scale=torch.ones(sets, device=device),
        threshold=normal(d_sae) / 10, activity_threshold=torch.full((d_sae,), 0.1, device=device),
    )  # fmt: skip
    x, g, W_enc, W_dec = (
        normal(*shape).to(dtype) for shape in ((n_tokens, d_in),) * 2 + ((d_in, d_sae), (d_sae, d_in))
    )
    b_enc, h = normal(d_sae).to(dtype), normal(d_sae, n_tokens).to(dtype)
    encode = partial(backends.encode, "triton", x, W_enc, b_enc, gate, spec, save_h=True)
    decode = partial(backends.decode_backward, "triton", g, W_dec, h, None, None, gate, spec)
    return {
        name: {way: partial(call, fused=way == "fused") for way in routing.WAYS}
        for name, call in (("forward", encode), ("backward", decode))
    }


def main() -> int:
    """Measures, and writes the table. Returns 0."""
    if not torch.cuda.is_available():
        raise ConfigError("routes are measured on a CUDA device, and there is none; the table keeps its predictions")
    device = torch.device("cuda")
    found = []
    for row in measure(device):
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        found.append(row)
    routing.write(measured=found)
    print(f"{len(found)} rows of {found[0]['device']} in {routing.TABLE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
