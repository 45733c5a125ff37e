"""The backward pass of an elementwise rational as KAT and FlashKAT write it, for a comparison of coefficient gradients.

Our own code after the two papers' descriptions: KAT (Yang & Wang, arXiv:2409.10594) adds every element's share of every
coefficient's gradient to global memory with an atomic; FlashKAT (arXiv:2505.13813) adds a block's up first and spends
one atomic a block. Both are token-major, [n_tokens, d], with consecutive features sharing a set of coefficients.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N, BLOCK_F = 64, 32


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def backward_kernel(
    x, g, a, b, dx, da, db, n_tokens, d, size, stride_xn, stride_xd, stride_gn, stride_gd,
    P: tl.constexpr, Q: tl.constexpr, PER_BLOCK: tl.constexpr, ONE_SET: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One program: a [BLOCK_N, BLOCK_F] tile. dx [n_tokens, d]; da, db are added to, float32.

    ONE_SET: every feature of the tile has the same coefficients, and a block has one sum for each.
    """
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    mask = (n < n_tokens) & (f < d)
    sets = tl.minimum(f, d - 1) // size
    s = tl.load(x + n * stride_xn + f * stride_xd, mask=mask, other=0.0).to(tl.float32)
    slope = tl.load(g + n * stride_gn + f * stride_gd, mask=mask, other=0.0).to(tl.float32)
    top, dtop = tl.load(a + sets * (P + 1) + P) + tl.zeros_like(s), tl.zeros_like(s)
    for i in tl.static_range(P):
        dtop = dtop * s + top
        top = top * s + tl.load(a + sets * (P + 1) + P - 1 - i)
    inner, dinner = tl.zeros_like(s), tl.zeros_like(s)
    for j in tl.static_range(Q):
        dinner = dinner * s + inner
        inner = inner * s + tl.load(b + sets * Q + Q - 1 - j)
    dinner = dinner * s + inner
    inner = inner * s
    sign = tl.where(inner > 0, 1.0, tl.where(inner < 0, -1.0, 0.0))
    inverse = 1.0 / (1.0 + tl.abs(inner))
    y = top * inverse
    out = slope * (dtop - y * sign * dinner) * inverse
    tl.store(dx + n * d + f, out.to(dx.dtype.element_ty), mask=mask)
    share = slope * inverse
    for i in tl.static_range(P + 1):
        _add(da, sets, P + 1, i, share, mask, PER_BLOCK, ONE_SET)
        share = share * s
    share = -slope * y * sign * inverse * s
    for j in tl.static_range(Q):
        _add(db, sets, Q, j, share, mask, PER_BLOCK, ONE_SET)
        share = share * s


@triton.jit
def _add(sums, sets, COUNT: tl.constexpr, k, share, mask, PER_BLOCK: tl.constexpr, ONE_SET: tl.constexpr):
    share = tl.where(mask, share, 0.0)
    if not PER_BLOCK:
        tl.atomic_add(sums + sets * COUNT + k + tl.zeros(share.shape, tl.int32), share, mask=mask)
    elif ONE_SET:
        tl.atomic_add(sums + tl.min(sets) * COUNT + k, tl.sum(share))
    else:
        inside = tl.max(mask.to(tl.int32), axis=0)[None, :] > 0
        tl.atomic_add(sums + sets * COUNT + k, tl.sum(share, axis=0)[None, :], mask=inside)


def backward(x: Tensor, g: Tensor, a: Tensor, b: Tensor, size: int, per_block: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x, g = dL/dy [n_tokens, d], a [sets, p+1], b [sets, q] float32, `size` consecutive features to a set.

    Returns dx [n_tokens, d], da, db. A single set in a, b may stand for all.
    """
    (n, d), p, q = x.shape, a.shape[1] - 1, b.shape[1]
    if len(a) == 1:
        size = d
    dx = torch.empty((n, d), dtype=x.dtype, device=x.device)
    da, db = torch.zeros_like(a), torch.zeros_like(b)
    grid = (triton.cdiv(n, BLOCK_N), triton.cdiv(d, BLOCK_F))
    backward_kernel[grid](
        x, g, a.contiguous(), b.contiguous(), dx, da, db, n, d, size, *x.stride(), *g.stride(),
        P=p, Q=q, PER_BLOCK=per_block, ONE_SET=size % BLOCK_F == 0,
        BLOCK_N=BLOCK_N, BLOCK_F=BLOCK_F, num_warps=4,
    )  # fmt: skip
    return dx, da, db
