"""What is left of a sparse step: its loss, the gradient of b_dec, and the norms of its gradients.

All of it is sums of numbers per token or per feature. One kernel adds up blocks of features, among them the product of
the encoder's weights with db_enc that b_dec's gradient has; a second one adds up the blocks. The order of every sum
depends on the shapes alone.
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
from .support_products import Residual
from .support_sums import FeatureSums

BLOCKS, LEAST = 1024, 64
"""About the largest number of blocks of features, and the smallest number of features in one."""
COLUMNS, ROWS = 16, 256
"""Columns of b_dec's gradient in a program of the second kernel, and rows that it adds up at a time."""


class Totals(NamedTuple):
    """total, mse, l1, l0: of the loss. counts [n_features] float32. db_dec [d_in]. encoder, without_radial, decoder:
    squared norms of the gradients of W_enc and W_dec, of the latter without its part along W_dec's rows and with it.
    entries: their number, float64, infinite if they did not fit."""

    total: Tensor
    mse: Tensor
    l1: Tensor
    l0: Tensor
    counts: Tensor
    db_dec: Tensor
    encoder: Tensor
    without_radial: Tensor
    decoder: Tensor
    entries: Tensor


@triton.jit
def block_sums_kernel(
    partial, l1, along, squares, norms, dh, w, counts, numbers, through,
    n_features, d_in, stride_f, stride_d, n_splits, split_stride, n_columns, per_program, penalty,
    THROUGH: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: per_program features, and BLOCK_D columns of their sum of dh times their row of w. partial: counts,
    [n_splits, n_features]. numbers [blocks, 5], through [blocks, d_in]."""
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    count, size, enc = (
        tl.zeros((BLOCK_F,), tl.float32),
        tl.zeros((BLOCK_F,), tl.float32),
        tl.zeros((BLOCK_F,), tl.float32),
    )
    dec, whole = tl.zeros((BLOCK_F,), tl.float32), tl.zeros((BLOCK_F,), tl.float32)
    total = tl.zeros((BLOCK_F, BLOCK_D), tl.float32)
    start = tl.program_id(0) * per_program
    end = tl.minimum(start + per_program, n_features)
    for f0 in range(start, end, BLOCK_F):
        f = (f0 + tl.arange(0, BLOCK_F)).to(tl.int64)
        here = f < end
        if THROUGH:
            mask = here[:, None] & (d < d_in)[None, :]
            part = tl.load(w + f[:, None] * stride_f + d[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)
            total += tl.load(dh + f, mask=here, other=0.0)[:, None] * part
        if tl.program_id(1) == 0:
            own = tl.zeros((BLOCK_F,), tl.int32)
            for split in range(n_splits):
                own += tl.load(partial + split * split_stride + f, mask=here, other=0).to(tl.int32)
            tl.store(counts + f, own.to(tl.float32), mask=here)
            count += own.to(tl.float32)
            norm, l1_f = tl.load(norms + f, mask=here, other=0.0), tl.load(l1 + f, mask=here, other=0.0)
            size += l1_f * norm
            by_dec, by_enc = tl.zeros((BLOCK_F,), tl.float32), tl.zeros((BLOCK_F,), tl.float32)
            for column in range(n_columns):
                row = squares + column * 2 * n_features + f
                by_dec += tl.load(row, mask=here, other=0.0)
                by_enc += tl.load(row + n_features, mask=here, other=0.0)
            # The radial part without the penalty, which adds `more` along the row.
            radial = tl.where(
                norm > 0.0, tl.load(along + f, mask=here, other=0.0) / tl.where(norm > 0.0, norm, 1.0), 0.0
            )
            more = penalty * l1_f
            enc += by_enc
            dec += tl.maximum(by_dec - radial * radial, 0.0, propagate_nan=tl.PropagateNan.ALL)
            whole += by_dec + more * (2.0 * radial + more)
    if THROUGH:
        out = through + tl.program_id(0).to(tl.int64) * d_in + d
        tl.store(out, tl.sum(total, axis=0), mask=d < d_in)
    if tl.program_id(1) == 0:
        row = numbers + tl.program_id(0) * 5
        tl.store(row, tl.sum(count))
        tl.store(row + 1, tl.sum(size))
        tl.store(row + 2, tl.sum(enc))
        tl.store(row + 3, tl.sum(dec))
        tl.store(row + 4, tl.sum(whole))


@triton.jit
def sum_column(pointer, length, step, BLOCK: tl.constexpr):
    """Returns the sum of `length` numbers, `step` apart."""
    total = tl.zeros((BLOCK,), tl.float32)
    for k0 in range(0, length, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        total += tl.load(pointer + k * step, mask=k < length, other=0.0)
    return tl.sum(total)


@triton.jit
def totals_kernel(
    losses, columns, numbers, through, used, loss, mse_out, l1_out, l0_out, encoder, without_radial, decoder, entries,
    db_dec, n_losses, n_columns, n_blocks, n_through, n_features, d_in, capacity, mean, l1_weight, l0_weight, rescale,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D columns of db_dec; the first one makes all scalars."""
    if tl.program_id(0) == 0:
        mse = sum_column(losses, n_losses, 1, 1024) * mean
        l0 = sum_column(numbers, n_blocks, 5, 1024) * mean
        l1 = sum_column(numbers + 1, n_blocks, 5, 1024) * mean
        tl.store(mse_out, mse)
        tl.store(l0_out, l0)
        tl.store(l1_out, l1)
        tl.store(loss, mse + l1_weight * l1 + l0_weight * l0)
        count = tl.load(used + n_features)
        tl.store(entries, tl.where(count > capacity, float("inf"), count.to(tl.float64)))
        tl.store(encoder, sum_column(numbers + 2, n_blocks, 5, 1024))
        tl.store(without_radial, sum_column(numbers + 3, n_blocks, 5, 1024))
        tl.store(decoder, sum_column(numbers + 4, n_blocks, 5, 1024))
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for k0 in range(0, n_columns, BLOCK_R):
        k = k0 + tl.arange(0, BLOCK_R)[:, None]
        total += tl.load(columns + k.to(tl.int64) * d_in + d, mask=(k < n_columns) & (d < d_in), other=0.0)
    for k0 in range(0, n_through, BLOCK_R):
        k = k0 + tl.arange(0, BLOCK_R)[:, None]
        total -= tl.load(through + k.to(tl.int64) * d_in + d, mask=(k < n_through) & (d < d_in), other=0.0)
    made = tl.sum(total, axis=0)[None, :] * rescale
    tl.store(db_dec + d, made.to(db_dec.dtype.element_ty), mask=d < d_in)


def support_totals(
    entries: Entries, residual: Residual, sums: FeatureSums, counts: Tensor, norms: Tensor, W_enc: Tensor | None,
    b_dec: Tensor, *, own: bool, mean: float, l1_weight: float, l0_weight: float, penalty: float, rescale: float,
) -> Totals:  # fmt: skip
    """Computes `Totals` = mse + l1_weight * l1 + l0_weight * l0, means over tokens, and so on.

    Args:
        counts: integers [n_splits, n_features], each feature's counts in runs of tokens. norms: of W_dec's rows.
        W_enc: [d_in, n_features]; None if b_dec is not subtracted from x. own: whether b_dec is added to x_hat.
        mean: the inverse of the number of tokens. penalty: what the decoder's gradient has of each feature's l1, along
            its row. rescale: multiplies db_dec.
    """
    n_features, d_in = len(norms), b_dec.shape[0]
    width = 0 if W_enc is None else len(W_enc)  # in a transcoder it is not d_in, but then b_dec is not subtracted
    per_program = triton.cdiv(max(LEAST, triton.cdiv(n_features, BLOCKS)), 8) * 8
    blocks, tile = triton.cdiv(n_features, per_program), decode_tile(width)
    scalars = [norms.new_empty(()) for _ in range(7)]
    made = Totals(
        *scalars[:4], norms.new_empty(n_features), torch.empty_like(b_dec), *scalars[4:],
        norms.new_empty((), dtype=torch.float64),
    )  # fmt: skip
    numbers, through = norms.new_empty((blocks, 5)), norms.new_empty((blocks, width))
    losses, columns = residual.losses, residual.columns
    with launching_on(norms):
        if blocks > 0:
            block_sums_kernel[(blocks, max(1, triton.cdiv(width, tile.columns)))](
                counts, sums.l1, sums.along, sums.squares, norms, sums.dh, norms if W_enc is None else W_enc,
                made.counts, numbers, through, n_features, width,
                *((0, 0) if W_enc is None else (W_enc.stride(1), W_enc.stride(0))),
                len(counts), counts.stride(0), len(sums.squares), per_program, float(penalty),
                THROUGH=W_enc is not None, BLOCK_F=tile.rows, BLOCK_D=tile.columns, num_warps=tile.warps,
            )  # fmt: skip
        totals_kernel[(max(1, triton.cdiv(d_in, COLUMNS)),)](
            losses, columns, numbers, through, entries.offsets, made.total, made.mse, made.l1, made.l0,
            made.encoder, made.without_radial, made.decoder, made.entries, made.db_dec,
            losses.numel(), len(columns) if own else 0, blocks, 0 if W_enc is None else blocks, n_features, d_in,
            len(entries.values), float(mean), float(l1_weight), float(l0_weight), float(rescale),
            BLOCK_R=ROWS, BLOCK_D=COLUMNS, num_warps=8,
        )  # fmt: skip
    return made
