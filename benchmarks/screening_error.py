"""What a screened product (docs/kernels.md, "A screened product") lets through and misses, on a real SAE: emulated.

    rsae teach --family topk --d-sae 18432 --steps 600
    python benchmarks/screening_error.py --teacher FOLDER --activations STORE

The teacher is upgraded on tokens of STORE (`rsae extract`) first. The narrow products are rounded as a GPU rounds them;
the sums are float32 here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from rsae_triton import FusedRationalSAE, load_teacher, upgrade
from rsae_triton.activations import ActivationStore
from rsae_triton.kernels.support_mark import ROUNDING
from rsae_triton.ops.screening import DEVIATION, ERROR, FLOAT8


@dataclass(frozen=True)
class Options:
    teacher: Path
    activations: Path
    tokens: int = 2048
    sigmas: tuple[float, ...] = (0.0, 2.0, 3.0, 4.0, 6.0)


def rounded(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows as `kernels.narrow_rows` rounds them, with their scales."""
    scales = rows.abs().amax(1, keepdim=True) / 448 if dtype == FLOAT8 else 1.0
    return (rows / scales).to(dtype).float() * scales


@torch.no_grad()
def main(options: Options) -> None:
    store = ActivationStore(options.activations)
    x = next(iter(store.batches(options.tokens, seed=0))).float()
    report(upgrade(load_teacher(str(options.teacher)), x, rounds=1), x, options.sigmas)


def report(sae: FusedRationalSAE, x: Tensor, sigmas: tuple[float, ...]) -> None:
    weights, x_c = sae.W_enc.t().float(), (x - sae.b_dec if sae.apply_b_dec_to_input else x).float()
    h = x_c @ weights.t()
    theta = sae.gate.threshold - sae.b_enc
    low = theta - sae.gate.input_scale
    rounding = ROUNDING.value * (sae.gate.threshold.abs() + sae.gate.input_scale + sae.b_enc.abs())
    support, active = h > low, h > theta
    print(
        f"d_sae {sae.d_sae}, l0 {active.sum() / len(x):.1f}, {support.sum() / active.sum():.2f} entries for each, "
        f"{100 * support.double().mean():.2f} % of all places; h deviates by {h.std(0).mean():.2f}"
    )
    norms = x_c.norm(dim=1, keepdim=True) * weights.norm(dim=1) / math.sqrt(sae.d_in)
    for dtype in (FLOAT8, torch.bfloat16):
        found = (rounded(x_c, dtype) @ rounded(weights, dtype).t()).bfloat16().float()
        sigma = ERROR * DEVIATION[dtype] * norms
        print(f"{dtype}: the error is {((found - h) / sigma).square().mean().sqrt():.2f} of what it is taken for")
        for k in sigmas:
            passed = found + k * sigma > low - rounding
            print(
                f"  {k:g} deviations: {passed.sum() / support.sum():.2f} candidates for each entry; missed "
                f"{(support & ~passed).sum() / support.sum():.1e} of the support, {int((active & ~passed).sum())} of "
                f"{int(active.sum())} active"
            )


if __name__ == "__main__":
    main(tyro.cli(Options))
