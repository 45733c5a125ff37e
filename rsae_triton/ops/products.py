"""Multiplies weights and tokens on the CPU, with the faster of the two libraries that PyTorch has.

In float32, `torch.mm` uses MKL, which keeps to AVX2 on AMD processors; oneDNN uses AVX-512 there and takes about half
the time. The choice depends on the processor alone, so that a run is the same every time.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor


def rows_by_tokens(weights: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """Returns weights [rows, d_in] @ x^T [d_in, n_tokens] as [rows, n_tokens]; in `out` if that is not slower."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and onednn() and weights.shape[0] and x.numel():
        return torch.ops.mkldnn._linear_pointwise(weights.contiguous(), x.contiguous(), None, "none", [], "")
    return torch.mm(weights, x.t(), out=out)


@functools.cache
def onednn() -> bool:
    """Whether oneDNN's float32 product is the faster one: on AMD with AVX-512."""
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and "AuthenticAMD" in _cpuinfo()
    )


@functools.cache
def bfloat16_products() -> bool:
    """Whether the processor has bfloat16 products in hardware and PyTorch may use them."""
    flags = next((line for line in _cpuinfo().splitlines() if line.startswith("flags")), "").split()
    return torch.backends.cpu.get_cpu_capability() in ("AVX512", "AMX") and bool({"avx512_bf16", "amx_bf16"} & {*flags})


@functools.cache
def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
