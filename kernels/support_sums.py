"""Gradients of the weights from the entries of a support: sums over each feature's entries, one program per feature.

The list of entries is cut into runs. A run whose entries are all of one feature (for example of one that is active on
every token) has a program of its own; the feature's program adds its sums to those of the feature's other entries, in
order. No atomics: two calls agree to the last bit.
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
"""Number of entries in a run, and about the largest number of runs; if there is room for more entries, runs are longer,
so that their sums do not take too much memory."""


class FeatureSums(NamedTuple):
    """Sums over each feature's entries: decoder [n_features, d_in] of z g[token], encoder [n_features, d_in] of dh
    x_c[token]; dh, dtheta, l1 (of |z|, or of given sizes) and along (of z dz: the decoder's gradient times its row)
    [n_features] float32. squares [column blocks, 2, n_features]: the squared norms of the rows of decoder and encoder,
    by blocks of columns."""

    decoder: Tensor
    encoder: Tensor
    dh: Tensor
    dtheta: Tensor
    l1: Tensor
    along: Tensor
    squares: Tensor


@triton.jit
def add_run(
    g, x, tokens, z, dz, dh, dtheta, sizes, start, end, hole, skipped, d, d_in,
    SIZED: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums over the entries from start up to end, but for `skipped` of them from `hole` on: columns d of both matrices'
    rows, and four numbers."""
    dec, enc = tl.zeros((BLOCK_J, BLOCK_D), tl.float32), tl.zeros((BLOCK_J, BLOCK_D), tl.float32)
    by_h, by_t = tl.zeros((BLOCK_J,), tl.float32), tl.zeros((BLOCK_J,), tl.float32)
    size, along = tl.zeros((BLOCK_J,), tl.float32), tl.zeros((BLOCK_J,), tl.float32)
    inside = (d < d_in)[None, :]
    for e0 in range(start, end - skipped, BLOCK_J):
        e = e0 + tl.arange(0, BLOCK_J)
        e += tl.where(e >= hole, skipped, 0)
        here = e < end
        n = tl.load(tokens + e, mask=here, other=0).to(tl.int64)
        code = tl.load(z + e, mask=here, other=0.0)
        slope = tl.load(dh + e, mask=here, other=0.0)
        at = n[:, None] * d_in + d[None, :]
        # The code is zero for at least half of a support, so nothing is read for it.
        dec += code[:, None] * tl.load(g + at, mask=(code != 0.0)[:, None] & inside, other=0.0).to(tl.float32)
        enc += slope[:, None] * tl.load(x + at, mask=(slope != 0.0)[:, None] & inside, other=0.0).to(tl.float32)
        by_h += slope
        by_t += tl.load(dtheta + e, mask=here, other=0.0)
        size += tl.load(sizes + e, mask=here, other=0.0) if SIZED else tl.abs(code)
        along += code * tl.load(dz + e, mask=here, other=0.0)
    by_h, by_t, size, along = tl.sum(by_h, axis=0), tl.sum(by_t, axis=0), tl.sum(size, axis=0), tl.sum(along, axis=0)
    return tl.sum(dec, axis=0), tl.sum(enc, axis=0), by_h, by_t, size, along


@triton.jit
def long_runs_kernel(
    g, x, tokens, z, dz, dh, dtheta, sizes, features, offsets, matrices, numbers, n_features, d_in, capacity, run,
    SIZED: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D columns of the sums of one run, if it is of one feature. matrices [n_runs, 2, d_in], numbers
    [n_runs, 4] float32."""
    k = tl.program_id(0).to(tl.int64)
    start, end = tl.program_id(0) * run, tl.program_id(0) * run + run
    whole = end <= tl.minimum(tl.load(offsets + n_features), capacity)
    if tl.load(features + start, mask=whole, other=0) == tl.load(features + end - 1, mask=whole, other=-1):
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        dec, enc, by_h, by_t, size, along = add_run(
            g, x, tokens, z, dz, dh, dtheta, sizes, start, end, end, 0, d, d_in, SIZED, BLOCK_J, BLOCK_D
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
    g, x, tokens, z, dz, dh, dtheta, sizes, offsets, matrices, numbers, w, norms, decoder, encoder,
    h_sums, theta_sums, l1_sums, along_sums, squares, n_features, d_in, capacity, run, penalty,
    SIZED: tl.constexpr, TOGETHER: tl.constexpr, ADD: tl.constexpr, PENALTY: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D columns of one feature's row of both matrices. The four sums [n_features] and squares
    [column blocks, 2, n_features] are float32. TOGETHER: decoder receives the sum of both; ADD: in addition to what it
    holds. PENALTY: decoder also receives penalty * l1 along the row of w."""
    f = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.minimum(tl.load(offsets + f), capacity).to(tl.int32)
    end = tl.minimum(tl.load(offsets + f + 1), capacity).to(tl.int32)
    first = (start + run - 1) // run  # the runs from `first` up to `last` have nobody else's entries
    last = tl.maximum(first, end // run)
    dec, enc, by_h, by_t, size, along = add_run(
        g, x, tokens, z, dz, dh, dtheta, sizes, start, end, first * run, (last - first) * run, d, d_in,
        SIZED, BLOCK_J, BLOCK_D,
    )  # fmt: skip
    for k in range(first, last):
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
    own = squares + tl.program_id(1).to(tl.int64) * 2 * n_features + f
    tl.store(own, tl.sum(dec * dec))
    if PENALTY:
        norm = tl.load(norms + f)
        row = tl.load(w + f * d_in + d, mask=d < d_in, other=0.0).to(tl.float32)
        dec += tl.where(norm > 0.0, penalty * size / tl.where(norm > 0.0, norm, 1.0), 0.0) * row
    tl.store(decoder + f * d_in + d, dec.to(decoder.dtype.element_ty), mask=d < d_in)
    tl.store(own + n_features, tl.sum(enc * enc))
    if tl.program_id(1) == 0:
        tl.store(h_sums + f, by_h)
        tl.store(theta_sums + f, by_t)
        tl.store(l1_sums + f, size)
        tl.store(along_sums + f, along)


def feature_sums(
    entries: Entries,
    z: Tensor,
    dz: Tensor,
    dh: Tensor,
    dtheta: Tensor,
    g: Tensor,
    x_c: Tensor,
    *,
    sizes: Tensor | None = None,
    decoder: Tensor | None = None,
    encoder: Tensor | None = None,
    into: Tensor | None = None,
    add: bool = False,
    penalty: float = 0.0,
    W_dec: Tensor | None = None,
    norms: Tensor | None = None,
) -> FeatureSums:
    """Computes the sums for z, dz, dh, dtheta [capacity] float32 of the entries; g, x_c [n_tokens, d_in] of one dtype.

    For a transcoder g may have another width, and the entries are then processed twice. sizes [capacity] float32:
    summed instead of |z|. decoder, encoder [n_features, d_in], contiguous: memory for the matrices' sums; new float32
    memory by default. into: memory that receives the two sums added up instead, and with `add` also keeps what it held.
    penalty: adds penalty * l1 to the decoder's row along that of W_dec [n_features, d_in], whose norms are given; it is
    not in `squares` and `along`.
    """
    n_features, d_in, capacity = len(entries.offsets) - 1, g.shape[1], len(z)
    if len(x_c) != len(g):
        raise ValueError(f"g {tuple(g.shape)} and x_c {tuple(x_c.shape)} are of different numbers of tokens")
    if x_c.shape != g.shape:
        if into is not None:
            raise ValueError(f"g {tuple(g.shape)} and x_c {tuple(x_c.shape)} are of two widths: their sums have no sum")
        written = feature_sums(entries, z, dz, dh, dtheta, g, g, sizes=sizes, decoder=decoder, penalty=penalty,
                               W_dec=W_dec, norms=norms)  # fmt: skip
        read = feature_sums(entries, z, dz, dh, dtheta, x_c, x_c, encoder=encoder)
        squares = torch.stack([written.squares[:, 0].sum(0), read.squares[:, 1].sum(0)])[None]
        return written._replace(encoder=read.encoder, squares=squares)
    g, x_c = g.contiguous(), x_c.contiguous()
    found = []
    for name, out in (("decoder", decoder if into is None else into), ("encoder", encoder if into is None else into)):
        out = g.new_empty((n_features, d_in), dtype=torch.float32) if out is None else out
        if out.shape != (n_features, d_in) or not out.is_contiguous():
            raise ValueError(f"{name} is {tuple(out.shape)}; contiguous memory of [{n_features}, {d_in}] is wanted")
        found.append(out)
    sums = [g.new_empty(n_features, dtype=torch.float32) for _ in range(4)]  # which share no memory
    tile = decode_tile(d_in)
    columns = triton.cdiv(d_in, tile.columns)
    squares = g.new_empty((columns, 2, n_features), dtype=torch.float32)
    if n_features == 0 or d_in == 0:
        return FeatureSums(*found, *(one.zero_() for one in sums), squares.zero_())
    run = max(RUN, triton.next_power_of_2(triton.cdiv(capacity, MOST_RUNS)))
    runs = capacity // run
    matrices, numbers = (g.new_empty((runs, *shape), dtype=torch.float32) for shape in ((2, d_in), (4,)))
    shape = {"SIZED": sizes is not None, "BLOCK_J": tile.rows, "BLOCK_D": tile.columns, "num_warps": tile.warps}
    one = {"TOGETHER": into is not None, "ADD": add, "PENALTY": penalty != 0}
    weight = (sums[0], sums[0]) if W_dec is None or norms is None else (W_dec.contiguous(), norms)
    given = (g, x_c, entries.tokens, z, dz, dh, dtheta, z if sizes is None else sizes)
    with launching_on(g):
        if runs > 0:
            long_runs_kernel[(runs, columns)](
                *given, entries.features, entries.offsets, matrices, numbers, n_features, d_in, capacity, run, **shape
            )
        feature_sums_kernel[(n_features, columns)](
            *given, entries.offsets, matrices, numbers, *weight, *found, *sums, squares,
            n_features, d_in, capacity, run, float(penalty), **shape, **one,
        )  # fmt: skip
    return FeatureSums(*found, *sums, squares)
