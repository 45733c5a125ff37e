"""What a screened product (docs/kernels.md, "A screened product") lets through and misses, on a real SAE: emulated.

    python benchmarks/screening_error.py --teacher FOLDER --activations STORE --out results.json

The teacher is upgraded on tokens of STORE (`rsae extract`) first. The narrow products are rounded as a GPU rounds them;
the sums are float32 here.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from rsae_triton import FusedRationalSAE, load_teacher, upgrade
from rsae_triton.activations import ActivationStore
from rsae_triton.common.files import write_text
from rsae_triton.kernels.support_mark import ROUNDING
from rsae_triton.ops.screening import DEVIATION, ERROR, FLOAT8


@dataclass(frozen=True)
class Options:
    teacher: Path
    activations: Path
    tokens: int = 2048
    sigmas: tuple[float, ...] = (0.0, 2.0, 3.0, 4.0, 6.0)
    out: Path | None = None
    """Write what is found here as JSON."""


def rounded(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows as `kernels.narrow_rows` rounds them, with their scales."""
    scales = rows.abs().amax(1, keepdim=True) / 448 if dtype == FLOAT8 else 1.0
    return (rows / scales).to(dtype).float() * scales


@torch.no_grad()
def main(options: Options) -> None:
    store = ActivationStore(options.activations)
    x = next(iter(store.batches(options.tokens, seed=0))).float()
    teacher = load_teacher(str(options.teacher))
    place = {name: store.manifest.get(name) for name in ("model", "hook_name")}
    found = {
        "command": "python benchmarks/screening_error.py --teacher FOLDER --activations STORE",
        **place,
        "family": teacher.architecture,
        "torch": torch.__version__,
        **measured(upgrade(teacher, x, rounds=1), x, options.sigmas),
    }
    print(json.dumps(found, indent=1))
    if options.out is not None:
        write_text(options.out, json.dumps(found, indent=1) + "\n")


def measured(sae: FusedRationalSAE, x: Tensor, sigmas: tuple[float, ...]) -> dict[str, Any]:
    """By dtype and margin: candidates for each entry of the support, the share of it that is missed, and active codes
    that are missed."""
    weights, x_c = sae.W_enc.t().float(), (x - sae.b_dec if sae.apply_b_dec_to_input else x).float()
    h = x_c @ weights.t()
    theta = sae.gate.threshold - sae.b_enc
    low = theta - sae.gate.input_scale
    rounding = ROUNDING.value * (sae.gate.threshold.abs() + sae.gate.input_scale + sae.b_enc.abs())
    support, active = h > low, h > theta
    norms = x_c.norm(dim=1, keepdim=True) * weights.norm(dim=1) / math.sqrt(sae.d_in)
    by_dtype: dict[str, Any] = {}
    for dtype in (FLOAT8, torch.bfloat16):
        product = (rounded(x_c, dtype) @ rounded(weights, dtype).t()).bfloat16().float()
        sigma = ERROR * DEVIATION[dtype] * norms
        margins = {}
        for k in sigmas:
            passed = product + k * sigma > low - rounding
            margins[f"{k:g}"] = {
                "candidates": float(passed.sum() / support.sum()),
                "support_missed": float((support & ~passed).sum() / support.sum()),
                "active_missed": int((active & ~passed).sum()),
            }
        error = float(((product - h) / sigma).square().mean().sqrt())
        by_dtype[str(dtype).removeprefix("torch.")] = {"error": error, "margins": margins}
    return {
        "d_sae": sae.d_sae,
        "tokens": len(x),
        "l0": float(active.sum() / len(x)),
        "active": int(active.sum()),
        "entries": float(support.sum() / active.sum()),
        "dtypes": by_dtype,
    }


if __name__ == "__main__":
    main(tyro.cli(Options))
