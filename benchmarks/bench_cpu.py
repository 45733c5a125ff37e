"""A training step on the CPU: eager PyTorch, this package whole and in pieces, and the bare matrix products.

Strategies take turns, and each one's best time counts: other programs slow a run down, nothing speeds it up. With
one thread the clock is the process's own CPU time, so that a busy machine does not distort the comparison.

    python benchmarks/bench_cpu.py [--threads 2] [--repeat 5] [--tokens 2048] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rsae_triton import FusedRationalSAE, RationalGate
from rsae_triton.common.files import write_text
from rsae_triton.remez import fit_gate

CASES = [  # d_sae, degree, per feature
    (4608, (3, 2), False),
    (4608, (9, 8), True),
    (18432, (3, 2), False),
    (18432, (9, 8), True),
]
PIECES: dict[str, dict[str, int]] = {
    "chunked 256": {"chunk_tokens": 256},
    "chunked 512": {"chunk_tokens": 512},
    "chunked 1024": {"chunk_tokens": 1024},
    "one chunk": {"chunk_tokens": 2**30},
    "streamed 1024": {"chunk_features": 1024},
    "streamed 2048": {"chunk_features": 2048},
}


def sae_of(d_in: int, d_sae: int, degree: tuple[int, int], per_feature: bool, backend: str) -> FusedRationalSAE:
    groups = d_sae if per_feature else 1
    gate = RationalGate.from_fit(fit_gate("relu", degree), d_sae, groups=groups, input_scale=4.0, output_scale=4.0)
    return FusedRationalSAE(d_in, d_sae, gate=gate, backend=backend, generator=torch.Generator().manual_seed(0))


def products(x: torch.Tensor, d_sae: int) -> Callable[[], None]:
    """The five matrix products of a step, into memory that is there already."""
    n, d_in = x.shape
    W_enc, W_dec, h = torch.randn(d_in, d_sae), torch.randn(d_sae, d_in), torch.empty(d_sae, n)
    out, dW_enc, dW_dec = torch.empty(n, d_in), torch.empty(d_in, d_sae), torch.empty(d_sae, d_in)

    def run() -> None:
        torch.mm(W_enc.t(), x.t(), out=h)
        torch.mm(h.t(), W_dec, out=out)
        torch.mm(h, x, out=dW_dec)
        torch.mm(W_dec, x.t(), out=h)
        torch.mm(x.t(), h.t(), out=dW_enc)

    return run


def steps(x: torch.Tensor, d_sae: int, degree: tuple[int, int], per_feature: bool) -> dict[str, Callable[[], None]]:
    def saved(backend: str) -> Callable[[], None]:
        sae = sae_of(x.shape[1], d_sae, degree, per_feature, backend)

        def run() -> None:
            sae.zero_grad(set_to_none=True)
            z, _, l1 = sae.encode_with_sums(x)
            loss = (x - sae.decode(z)).square().sum(-1).mean() + 0.1 * l1 @ sae.W_dec.norm(dim=1) / len(x)
            loss.backward()

        return run

    def cut(pieces: dict[str, int]) -> Callable[[], None]:
        sae = sae_of(x.shape[1], d_sae, degree, per_feature, "cpu")

        def run() -> None:
            sae.zero_grad(set_to_none=True)
            sae.autoencode(x, l1_weight=0.1, **pieces).total.backward()

        return run

    made = {"products": products(x, d_sae), "eager": saved("eager"), "saved": saved("cpu")}
    return made | {name: cut(pieces) for name, pieces in PIECES.items()}


def measure(runs: dict[str, Callable[[], None]], repeat: int, clock: Callable[[], float]) -> dict[str, float]:
    best = {}
    for turn in range(repeat + 1):  # the first warms up
        for name, run in runs.items():
            before = clock()
            run()
            taken = clock() - before
            if turn:
                best[name] = min(taken, best.get(name, taken))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--d-in", type=int, default=576)
    parser.add_argument("--case", type=int, action="append", help="index of a case; all when not given")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    x = torch.randn(options.tokens, options.d_in)
    rows: list[dict[str, Any]] = []
    for k, (d_sae, degree, per_feature) in enumerate(CASES):
        if options.case and k not in options.case:
            continue
        best = measure(steps(x, d_sae, degree, per_feature), options.repeat, clock)
        rows.append({"d_sae": d_sae, "degree": degree, "per_feature": per_feature, "seconds": best})
        print(f"d_sae {d_sae}, {degree}, {'per feature' if per_feature else 'shared'}")
        for name, seconds in best.items():
            print(
                f"  {name:14s} {seconds:7.3f} s   {best['eager'] / seconds:5.2f} x faster than eager   "
                f"{seconds / best['products']:5.2f} of the products",
                flush=True,
            )
    if options.json:
        machine = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
        settings = {
            "threads": options.threads,
            "tokens": options.tokens,
            "d_in": options.d_in,
            "repeat": options.repeat,
        }
        write_text(options.json, json.dumps({**machine, **settings, "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
