"""Gradients of the weights from the entries of a support: sums over each feature's entries, one program per feature.

A feature with more entries than a run (for example one that is active on every token) has a program for every run; the
feature's own program adds up their sums in order. No atomics: two calls agree to the last bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import decode_tile
from .launch import launching_on
from .support_list import Entries

RUN, MOST_RUNS = 256, 8192
"""Number of entries in a run, and the largest number of runs; if there is room for more entries, runs are longer, so
that their sums do not take too much memory."""


class FeatureSums(NamedTuple):
    """Sums over each feature's entries: decoder [n_features, d_in] of z g[token], encoder [n_features, d_in] of dh
    x_c[token]; dh, dt, l1 (of |z|, or of given sizes) and along (of z dz: the decoder's gradient times its row)
    [n_features] float32. squares [2, n_features]: the squared norms of the rows of decoder and encoder."""

    decoder: Tensor
    encoder: Tensor
    dh: Tensor
    dt: Tensor
    l1: Tensor
    along: Tensor
    squares: Tensor


@triton.jit
def add_run(
    g, x, tokens, z, dz, dh, dt, sizes, start, end, d, d_in,
    SIZED: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums over the entries from start up to end: columns d of both matrices' rows, and four numbers."""
    dec, enc = tl.zeros((BLOCK_J, BLOCK_D), tl.float32), tl.zeros((BLOCK_J, BLOCK_D), tl.float32)
    by_h, by_t = tl.zeros((BLOCK_J,), tl.float32), tl.zeros((BLOCK_J,), tl.float32)
    size, along = tl.zeros((BLOCK_J,), tl.float32), tl.zeros((BLOCK_J,), tl.float32)
    inside = (d < d_in)[None, :]
    for e0 in range(start, end, BLOCK_J):
        e = e0 + tl.arange(0, BLOCK_J)
        here = e < end
        n = tl.load(tokens + e, mask=here, other=0).to(tl.int64)
        code = tl.load(z + e, mask=here, other=0.0)
        slope = tl.load(dh + e, mask=here, other=0.0)
        at = n[:, None] * d_in + d[None, :]
        # The code is zero for at least half of a support, so nothing is read for it.
        dec += code[:, None] * tl.load(g + at, mask=(code != 0.0)[:, None] & inside, other=0.0).to(tl.float32)
        enc += slope[:, None] * tl.load(x + at, mask=(slope != 0.0)[:, None] & inside, other=0.0).to(tl.float32)
        by_h += slope
        by_t += tl.load(dt + e, mask=here, other=0.0)
        size += tl.load(sizes + e, mask=here, other=0.0) if SIZED else tl.abs(code)
        along += code * tl.load(dz + e, mask=here, other=0.0)
    by_h, by_t, size, along = tl.sum(by_h, axis=0), tl.sum(by_t, axis=0), tl.sum(size, axis=0), tl.sum(along, axis=0)
    return tl.sum(dec, axis=0), tl.sum(enc, axis=0), by_h, by_t, size, along


@triton.jit
def long_runs_kernel(
    g, x, tokens, z, dz, dh, dt, sizes, offsets, features, longer, matrices, numbers, n_features, d_in, capacity, run,
    SIZED: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D columns of one run after its feature's first. features [n_runs]: the feature of each run;
    longer [n_features + 1]: where each feature's runs begin. matrices [n_runs, 2, d_in], numbers [n_runs, 4]
    float32."""
    k = tl.program_id(0).to(tl.int64)
    if k < tl.load(longer + n_features):
        f = tl.load(features + k)
        start = tl.load(offsets + f) + (k - tl.load(longer + f) + 1) * run
        end = tl.minimum(tl.minimum(start + run, tl.load(offsets + f + 1)), capacity)
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        dec, enc, by_h, by_t, size, along = add_run(
            g, x, tokens, z, dz, dh, dt, sizes, start, end, d, d_in, SIZED, BLOCK_J, BLOCK_D
        )
        tl.store(matrices + k * 2 * d_in + d, dec, mask=d < d_in)
        tl.store(matrices + (k * 2 + 1) * d_in + d, enc, mask=d < d_in)
        if tl.program_id(1) == 0:
            tl.store(numbers + k * 4, by_h)
            tl.store(numbers + k * 4 + 1, by_t)
            tl.store(numbers + k * 4 + 2, size)
            tl.store(numbers + k * 4 + 3, along)


@triton.jit
def feature_sums_kernel(
    g, x, tokens, z, dz, dh, dt, sizes, offsets, longer, matrices, numbers, decoder, encoder, sums, squares,
    n_features, d_in, capacity, run, SIZED: tl.constexpr, TOGETHER: tl.constexpr, ADD: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D columns of one feature's row of both matrices. sums [4, n_features],
    squares [column blocks, 2, n_features] float32. TOGETHER: decoder receives the sum of both; ADD: in addition to what
    it holds."""
    f = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(offsets + f)
    end = tl.minimum(tl.minimum(start + run, tl.load(offsets + f + 1)), capacity)
    dec, enc, by_h, by_t, size, along = add_run(
        g, x, tokens, z, dz, dh, dt, sizes, start, end, d, d_in, SIZED, BLOCK_J, BLOCK_D
    )
    for k in range(tl.load(longer + f), tl.load(longer + f + 1)):
        dec += tl.load(matrices + k * 2 * d_in + d, mask=d < d_in, other=0.0)
        enc += tl.load(matrices + (k * 2 + 1) * d_in + d, mask=d < d_in, other=0.0)
        by_h += tl.load(numbers + k * 4)
        by_t += tl.load(numbers + k * 4 + 1)
        size += tl.load(numbers + k * 4 + 2)
        along += tl.load(numbers + k * 4 + 3)
    if TOGETHER:
        dec += enc
        if ADD:
            dec += tl.load(decoder + f * d_in + d, mask=d < d_in)
    else:
        tl.store(encoder + f * d_in + d, enc.to(encoder.dtype.element_ty), mask=d < d_in)
    tl.store(decoder + f * d_in + d, dec.to(decoder.dtype.element_ty), mask=d < d_in)
    own = squares + tl.program_id(1).to(tl.int64) * 2 * n_features + f
    tl.store(own, tl.sum(dec * dec))
    tl.store(own + n_features, tl.sum(enc * enc))
    if tl.program_id(1) == 0:
        tl.store(sums + f, by_h)
        tl.store(sums + n_features + f, by_t)
        tl.store(sums + 2 * n_features + f, size)
        tl.store(sums + 3 * n_features + f, along)


def feature_sums(
    entries: Entries,
    z: Tensor,
    dz: Tensor,
    dh: Tensor,
    dt: Tensor,
    g: Tensor,
    x_c: Tensor,
    *,
    sizes: Tensor | None = None,
    decoder: Tensor | None = None,
    encoder: Tensor | None = None,
    into: Tensor | None = None,
    add: bool = False,
) -> FeatureSums:
    """Computes the sums for z, dz, dh, dt [capacity] float32 of the entries, and g, x_c [n_tokens, d_in] of one dtype.

    For a transcoder g may have another width, and the entries are then processed twice. sizes [capacity] float32:
    summed instead of |z|. decoder, encoder [n_features, d_in], contiguous: memory for the matrices' sums; new float32
    memory by default. into: memory that receives the two sums added up instead, and with `add` also keeps what it held.
    """
    n_features, d_in, capacity = len(entries.offsets) - 1, g.shape[1], len(z)
    if len(x_c) != len(g):
        raise ValueError(f"g {tuple(g.shape)} and x_c {tuple(x_c.shape)} are of different numbers of tokens")
    if x_c.shape != g.shape:
        if into is not None:
            raise ValueError(f"g {tuple(g.shape)} and x_c {tuple(x_c.shape)} are of two widths: their sums have no sum")
        written = feature_sums(entries, z, dz, dh, dt, g, g, sizes=sizes, decoder=decoder)
        read = feature_sums(entries, z, dz, dh, dt, x_c, x_c, encoder=encoder)
        squares = torch.stack([written.squares[0], read.squares[1]])
        return written._replace(encoder=read.encoder, squares=squares)
    g, x_c = g.contiguous(), x_c.contiguous()
    found = []
    for name, out in (("decoder", decoder if into is None else into), ("encoder", encoder if into is None else into)):
        out = g.new_empty((n_features, d_in), dtype=torch.float32) if out is None else out
        if out.shape != (n_features, d_in) or not out.is_contiguous():
            raise ValueError(f"{name} is {tuple(out.shape)}; contiguous memory of [{n_features}, {d_in}] is wanted")
        found.append(out)
    sums = g.new_zeros((4, n_features), dtype=torch.float32)
    if n_features == 0 or d_in == 0:
        return FeatureSums(*found, *sums, torch.zeros_like(sums[:2]))
    # Runs after each feature's first, of which there can be at most capacity / run (entries that were left out have
    # none).
    run = max(RUN, triton.next_power_of_2(triton.cdiv(capacity, MOST_RUNS)))
    bounds = entries.offsets.clamp(max=capacity)
    runs = (bounds.diff() - 1).div(run, rounding_mode="floor").clamp(min=0)
    longer = bounds.new_zeros(n_features + 1)
    torch.cumsum(runs, 0, out=longer[1:])
    most = max(1, capacity // run)
    features = torch.searchsorted(longer, torch.arange(most, device=g.device), right=True) - 1
    matrices, numbers = (g.new_empty((most, *shape), dtype=torch.float32) for shape in ((2, d_in), (4,)))
    tile = decode_tile(d_in)
    columns = triton.cdiv(d_in, tile.columns)
    shape = {"SIZED": sizes is not None, "BLOCK_J": tile.rows, "BLOCK_D": tile.columns, "num_warps": tile.warps}
    one = {"TOGETHER": into is not None, "ADD": add}
    squares = sums.new_empty((columns, 2, n_features))
    given = (g, x_c, entries.tokens, z, dz, dh, dt, z if sizes is None else sizes, bounds)
    with launching_on(g):
        if capacity > run:
            long_runs_kernel[(most, columns)](
                *given, features, longer, matrices, numbers, n_features, d_in, capacity, run, **shape
            )
        feature_sums_kernel[(n_features, columns)](
            *given, longer, matrices, numbers, *found, sums, squares, n_features, d_in, capacity, run, **shape, **one
        )
    return FeatureSums(*found, *sums, squares.sum(0))
