"""The product of weights and tokens on the CPU, by the faster of the two libraries that PyTorch carries.

`torch.mm` in float32 is MKL's, which keeps to AVX2 on AMD processors; oneDNN uses AVX-512 there and takes about half
the time. Which one runs depends on the processor alone, so that a run is the same every time.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor


def rows_by_tokens(weights: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """weights [rows, d_in], x [n_tokens, d_in] -> weights @ x^T, [rows, n_tokens]; in `out` where that is no slower."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and onednn() and weights.shape[0] and x.numel():
        return torch.ops.mkldnn._linear_pointwise(weights.contiguous(), x.contiguous(), None, "none", [], "")
    return torch.mm(weights, x.t(), out=out)


@functools.cache
def onednn() -> bool:
    """Whether oneDNN's float32 product is the faster one: AMD with AVX-512."""
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and "AuthenticAMD" in _cpuinfo()
    )


@functools.cache
def bfloat16_products() -> bool:
    """Whether the processor multiplies bfloat16 in hardware, and PyTorch is let do so."""
    flags = next((line for line in _cpuinfo().splitlines() if line.startswith("flags")), "").split()
    return torch.backends.cpu.get_cpu_capability() in ("AVX512", "AMX") and bool({"avx512_bf16", "amx_bf16"} & {*flags})


@functools.cache
def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
