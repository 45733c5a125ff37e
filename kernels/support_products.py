"""Products at the entries of a support: reconstructions from rows of codes, and the gradients of the entries' codes.

The dense step computes these for every token and feature, the sparse step for the entries only. Sums are float32, in an
order that depends on the input only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import decode_tile, dots_tile, entry_programs
from .launch import launching_on
from .support_list import Entries, Rows


@triton.jit
def support_decode_kernel(
    values, features, offsets, w, bias, out, d_in, capacity, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """One program: BLOCK_D columns of one token's reconstruction."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < d_in
    start = tl.minimum(tl.load(offsets + n), capacity)
    end = tl.minimum(tl.load(offsets + n + 1), capacity)
    total = tl.zeros((BLOCK_J, BLOCK_D), tl.float32)
    for j0 in range(start, end, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        f = tl.load(features + j, mask=j < end, other=0).to(tl.int64)
        value = tl.load(values + j, mask=j < end, other=0.0).to(tl.float32)
        part = tl.load(w + f[:, None] * d_in + d[None, :], mask=(j < end)[:, None] & inside[None, :], other=0.0)
        total += value[:, None] * part.to(tl.float32)
    x_hat = tl.sum(total, axis=0) + tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + n * d_in + d, x_hat, mask=inside)


@triton.jit
def entry_dots_kernel(
    g, w, tokens, features, offsets, out, n_features, d_in, capacity,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Computes out[e] = g[token] . w[feature]; the programs share the blocks of entries."""
    total = tl.minimum(tl.load(offsets + n_features), capacity)
    step = tl.num_programs(0).to(tl.int64) * BLOCK_E
    for e0 in range(tl.program_id(0).to(tl.int64) * BLOCK_E, total, step):
        e = e0 + tl.arange(0, BLOCK_E)
        here = e < total
        n = tl.load(tokens + e, mask=here, other=0).to(tl.int64)
        f = tl.load(features + e, mask=here, other=0).to(tl.int64)
        dots = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
        for d0 in range(0, d_in, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            mask = here[:, None] & (d < d_in)[None, :]
            a = tl.load(g + n[:, None] * d_in + d[None, :], mask=mask, other=0.0).to(tl.float32)
            b = tl.load(w + f[:, None] * d_in + d[None, :], mask=mask, other=0.0).to(tl.float32)
            dots += a * b
        tl.store(out + e, tl.sum(dots, axis=1), mask=here)


def support_decode(rows: Rows, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Computes x_hat [n_tokens, d_in] float32 from rows of codes, W_dec [n_features, d_in] and b_dec [d_in]."""
    n_tokens, d_in = len(rows.offsets) - 1, W_dec.shape[1]
    out = W_dec.new_empty((n_tokens, d_in), dtype=torch.float32)
    W_dec = W_dec.contiguous()
    if out.numel() > 0:
        tile = decode_tile(d_in)
        with launching_on(out):
            support_decode_kernel[(n_tokens, triton.cdiv(d_in, tile.columns))](
                rows.values, rows.features, rows.offsets, W_dec, b_dec.contiguous(), out, d_in, len(rows.values),
                BLOCK_J=tile.rows, BLOCK_D=tile.columns, num_warps=tile.warps,
            )  # fmt: skip
    return out


def entry_dots(g: Tensor, W_dec: Tensor, entries: Entries) -> Tensor:
    """Computes dL/dz of every entry, [capacity] float32, from g = dL/dx_hat [n_tokens, d_in] and W_dec [n_features,
    d_in]."""
    n_features, d_in = W_dec.shape
    if g.shape[1] != d_in or len(entries.offsets) != n_features + 1:
        raise ValueError(
            f"g {tuple(g.shape)}, W_dec {tuple(W_dec.shape)} and entries of {len(entries.offsets) - 1} features do "
            "not fit: [n, d_in], [d_sae, d_in] and d_sae are wanted"
        )
    out = torch.empty_like(entries.values)
    g, W_dec = g.contiguous(), W_dec.contiguous()
    if out.numel() > 0:
        tile = dots_tile(d_in)
        with launching_on(out):
            entry_dots_kernel[(entry_programs(len(out), tile.rows),)](
                g, W_dec, entries.tokens, entries.features, entries.offsets, out, n_features, d_in, len(out),
                BLOCK_E=tile.rows, BLOCK_D=tile.columns, num_warps=tile.warps,
            )  # fmt: skip
    return out
