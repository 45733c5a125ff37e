"""Chooses between two ways to run a product and its gate on a GPU: a library product and a pointwise kernel, or fused.

One function decides, `route`, from a table of devices, dtypes, degrees and widths (routes.json). Its rows are
predictions of `cost`, and marked as such; a row measured on a device replaces the predicted one (`make routes`;
`write()` renews the predictions and keeps measurements). Both ways can always be chosen by name:
RSAE_ENCODER=split|fused, or backend="triton:split" and "triton:fused".
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rsae_triton.common.errors import ConfigError
from rsae_triton.ops.cost import CEILINGS, Step, product_seconds

WAYS = ("split", "fused")
TABLE = Path(__file__).with_name("routes.json")
# The shape that the table is made for: a training batch that fills a GPU.
N_TOKENS, D_SAE = 4096, 24576
WIDTHS = (512, 768, 1024, 2048, 4096)
DEGREES = ((3, 2), (9, 8))


@dataclass(frozen=True)
class Route:
    """ "split" or "fused", for the encoder (`forward`) and for dz with the gate's backward pass (`backward`)."""

    forward: str
    backward: str
    source: str


def route(device_name: str, d_in: int, p: int, q: int, shared: bool, itemsize: int, *, training: bool) -> Route:
    """Returns the faster way according to the table's nearest row. Inference is always fused, because it writes z
    alone.

    Args:
        device_name: `torch.cuda.get_device_name()`; one the table does not know is treated as an H100.
        itemsize: bytes of an element of the matrix products.

    Raises:
        ConfigError: RSAE_ENCODER is set to something other than split or fused.
    """
    forced = os.environ.get("RSAE_ENCODER")
    if forced:
        if forced not in WAYS:
            raise ConfigError(f"RSAE_ENCODER is {forced!r}; set it to split or fused, or unset it")
        return Route(forced, forced, "RSAE_ENCODER")
    found = _nearest(device_name, d_in, p + q, shared, itemsize)
    return found if training else Route("fused", found.backward, "inference")


def device_name(device: torch.device) -> str:
    """The name under which rows are looked up; that of the H100 if Triton's interpreter replaces a GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "H100"


@functools.lru_cache(maxsize=256)
def _nearest(device_name: str, d_in: int, degrees: int, shared: bool, itemsize: int) -> Route:
    rows = _table()
    known = {row["device"] for row in rows}
    device = next(
        (name for name in sorted(known, key=len, reverse=True) if name.lower() in device_name.lower()), "H100"
    )

    def distance(row: dict[str, Any]) -> tuple[Any, ...]:
        near = abs(math.log(row["d_in"] / d_in)), abs(row["p"] + row["q"] - degrees)
        return row["device"] != device, row["itemsize"] != itemsize, row["shared"] != shared, *near

    best = min(rows, key=distance)
    return Route(best["forward"], best["backward"], best["source"])


@functools.cache
def _table() -> list[dict[str, Any]]:
    return json.loads(TABLE.read_text())["rows"]


def predicted() -> list[dict[str, Any]]:
    """The rows that the cost model predicts."""
    rows = []
    for on in CEILINGS.values():
        for itemsize in (2, 4):
            for p, q in DEGREES:
                for shared in (True, False):
                    for d_in in WIDTHS:
                        step = Step(N_TOKENS, d_in, D_SAE, p, q, shared, itemsize=itemsize)
                        row: dict[str, Any] = {"device": on.name, "itemsize": itemsize, "d_in": d_in}
                        row |= {"p": p, "q": q, "shared": shared, "source": "predicted"}
                        for name, backward in (("forward", False), ("backward", True)):
                            ms = [product_seconds(step, on, backward=backward, fused=way == "fused") for way in WAYS]
                            row[name] = WAYS[ms.index(min(ms))]
                            row |= {f"{name}_{way}_ms": round(1e3 * one, 3) for way, one in zip(WAYS, ms, strict=True)}
                        rows.append(row)
    return rows


def write(path: Path = TABLE, measured: Iterable[dict[str, Any]] = ()) -> None:
    """Writes predictions for all rows that have not been measured; rows measured now or earlier are kept."""
    from rsae_triton.common.files import write_text

    old = json.loads(path.read_text())["rows"] if path.exists() else []
    key = ("device", "itemsize", "d_in", "p", "q", "shared")
    rows = {tuple(row[name] for name in key): row for row in predicted()}
    rows |= {tuple(row[name] for name in key): row for row in (*old, *measured) if row["source"] == "measured"}
    ceilings = {name: asdict(on) for name, on in CEILINGS.items()}
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows.values())
    text = f'{{"ceilings": {json.dumps(ceilings)},\n "rows": [\n{lines}\n]}}\n'
    write_text(path, text)
