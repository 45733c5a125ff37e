"""Turns bits into lists: the support's entries by feature, and the active ones by token.

Both lists have room for `capacity` entries. The number of entries stays on the GPU, in the last element of the offsets.
Entries beyond the capacity are left out, and the caller compares when it reads numbers anyway. Lists are in order of
feature, then token (or token, then feature), the same in every run; no atomics, no sorting.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import MARK_FEATURES, entry_tile
from .launch import launching_on
from .sparse_rows import lowest_bit, popcount
from .support_mark import Marks

PROGRAMS = 1024
"""Number of programs that the pass over the active bits aims for; it cuts the features of its tokens into segments.
Every program adds up the counts of those before it, so there must not be many more."""


class Entries(NamedTuple):
    """tokens, features [capacity] int32 and values [capacity] float32 (h with its bias), sorted by feature, then token;
    offsets [n_features + 1] int64: the start of each feature's entries, and last the number of entries, even if that
    exceeds the capacity."""

    tokens: Tensor
    features: Tensor
    values: Tensor
    offsets: Tensor


class Rows(NamedTuple):
    """features [capacity] int32 and values [capacity] of the active codes, sorted by token, then feature; offsets
    [n_tokens + 1] int64, like those of `Entries`."""

    features: Tensor
    values: Tensor
    offsets: Tensor


@triton.jit
def sum_before(totals, count, BLOCK: tl.constexpr):
    """Returns the sum of the first `count` numbers, int64."""
    total = tl.zeros((BLOCK,), tl.int64)
    for k0 in range(0, count, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        total += tl.load(totals + k, mask=k < count, other=0)
    return tl.sum(total)


@triton.jit
def list_entries_kernel(
    h, bias, support, partial, totals, offsets, tokens, features, values,
    n_features, n_tokens, n_words, n_splits, capacity,
    HAS_BIAS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program: the entries of BLOCK_F features, and where they begin."""
    f0 = tl.program_id(0).to(tl.int64) * BLOCK_F
    own = f0 + tl.arange(0, BLOCK_F)
    sizes = tl.zeros((BLOCK_F,), tl.int32)
    for split in range(n_splits):
        sizes += tl.load(partial + split * 2 * n_features + own, mask=own < n_features, other=0)
    first = sum_before(totals, tl.program_id(0) * n_splits, 1024)
    starts = first + tl.cumsum(sizes, axis=0) - sizes
    tl.store(offsets + own, starts, mask=own < n_features)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(offsets + n_features, first + tl.sum(sizes))
    f = f0 + tl.arange(0, BLOCK_F)[:, None]
    f_mask = f < n_features
    start = starts[:, None]
    if HAS_BIAS:
        own_bias = tl.load(bias + f, mask=f_mask, other=0.0).to(tl.float32)
    for w0 in range(0, n_words, BLOCK_W):
        w = w0 + tl.arange(0, BLOCK_W)[None, :]
        word = tl.load(support + f * n_words + w, mask=f_mask & (w < n_words), other=0).to(tl.uint32, bitcast=True)
        count = popcount(word)
        place = start + tl.cumsum(count, axis=1) - count
        while tl.max(word) > 0:
            n = w * 32 + lowest_bit(word)
            fits = (word > 0) & (place < capacity)
            value = tl.load(h + f * n_tokens + n, mask=fits, other=0.0).to(tl.float32)
            if HAS_BIAS:
                value += own_bias
            tl.store(tokens + place, n, mask=fits)
            tl.store(features + place, (f + tl.zeros_like(n)).to(tl.int32), mask=fits)
            tl.store(values + place, value, mask=fits)
            place += 1
            word = word & (word - 1)
        start += tl.sum(count, axis=1)[:, None]


@triton.jit
def count_rows_kernel(
    active, counts, totals, n_words, n_tokens, per_segment, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """One program: the number of bits set for BLOCK_N tokens in one segment of words. counts [segments, n_tokens],
    totals [blocks, segments]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    first = tl.program_id(1) * per_segment
    end = tl.minimum(first + per_segment, n_words)
    total = tl.zeros((1, BLOCK_N), tl.int32)
    for w0 in range(first, end, BLOCK_W):
        w = (w0 + tl.arange(0, BLOCK_W)[:, None]).to(tl.int64)
        word = tl.load(active + w * n_tokens + n, mask=(w < end) & (n < n_tokens), other=0)
        total += tl.sum(popcount(word.to(tl.uint32, bitcast=True)), axis=0)[None, :]
    tl.store(counts + tl.program_id(1).to(tl.int64) * n_tokens + n, total, mask=n < n_tokens)
    tl.store(totals + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(total))


@triton.jit
def list_rows_kernel(
    z, active, counts, totals, offsets, features, values, n_words, n_tokens, per_segment, capacity,
    BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: the active codes of BLOCK_N tokens in one segment, and where they begin."""
    own = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sizes, earlier = tl.zeros((BLOCK_N,), tl.int32), tl.zeros((BLOCK_N,), tl.int32)
    for segment in range(tl.num_programs(1)):
        count = tl.load(counts + segment * n_tokens + own, mask=own < n_tokens, other=0)
        sizes += count
        earlier += tl.where(segment < tl.program_id(1), count, 0)
    before = sum_before(totals, tl.program_id(0) * tl.num_programs(1), 1024)
    starts = before + tl.cumsum(sizes, axis=0) - sizes
    if tl.program_id(1) == 0:
        tl.store(offsets + own, starts, mask=own < n_tokens)
        if tl.program_id(0) == tl.num_programs(0) - 1:
            tl.store(offsets + n_tokens, before + tl.sum(sizes))
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    start = (starts + earlier)[None, :]
    first = tl.program_id(1) * per_segment
    end = tl.minimum(first + per_segment, n_words)
    for w0 in range(first, end, BLOCK_W):
        w = (w0 + tl.arange(0, BLOCK_W)[:, None]).to(tl.int64)
        word = tl.load(active + w * n_tokens + n, mask=(w < end) & (n < n_tokens), other=0)
        word = word.to(tl.uint32, bitcast=True)
        count = popcount(word)
        place = start + tl.cumsum(count, axis=0) - count
        while tl.max(word) > 0:
            f = w * 32 + lowest_bit(word)
            fits = (word > 0) & (place < capacity)
            tl.store(features + place, f.to(tl.int32), mask=fits)
            tl.store(values + place, tl.load(z + f * n_tokens + n, mask=fits, other=0.0), mask=fits)
            place += 1
            word = word & (word - 1)
        start += tl.sum(count, axis=0)[None, :]


def list_entries(h_fm: Tensor, marks: Marks, capacity: int) -> Entries:
    """Lists the support's entries. h_fm [n_features, n_tokens] as given to `support_mark`."""
    n_features, n_tokens = h_fm.shape
    tokens, features = h_fm.new_empty((2, capacity), dtype=torch.int32)
    values = h_fm.new_empty(capacity, dtype=torch.float32)
    offsets = h_fm.new_empty(n_features + 1, dtype=torch.int64)
    if h_fm.numel() == 0:
        return Entries(tokens, features, values, offsets.zero_())
    tile = entry_tile()
    with launching_on(h_fm):
        list_entries_kernel[(len(marks.totals),)](
            h_fm, marks.totals if marks.bias is None else marks.bias, marks.support, marks.partial, marks.totals,
            offsets, tokens, features, values, n_features, n_tokens, marks.support.shape[1], len(marks.partial),
            capacity, HAS_BIAS=marks.bias is not None, BLOCK_F=MARK_FEATURES, BLOCK_W=tile.words, num_warps=tile.warps,
            num_stages=1,
        )  # fmt: skip
    return Entries(tokens, features, values, offsets)


def list_rows(z_fm: Tensor, marks: Marks, capacity: int) -> Rows:
    """Lists the active codes. z_fm [n_features, n_tokens] holds the codes at the active places; others are not read."""
    n_words, n_tokens = marks.active.shape
    features = z_fm.new_empty(capacity, dtype=torch.int32)
    values = z_fm.new_empty(capacity)
    tile = entry_tile()
    blocks = triton.cdiv(n_tokens, tile.tokens)
    segments = max(1, min(triton.cdiv(n_words, tile.words), PROGRAMS // max(blocks, 1)))
    per_segment = triton.cdiv(triton.cdiv(n_words, segments), tile.words) * tile.words
    segments = max(1, triton.cdiv(n_words, per_segment)) if per_segment else 1
    counts = z_fm.new_empty((segments, n_tokens), dtype=torch.int32)
    totals = z_fm.new_empty((blocks, segments), dtype=torch.int32)
    offsets = z_fm.new_empty(n_tokens + 1, dtype=torch.int64)
    if z_fm.numel() == 0:
        return Rows(features, values, offsets.zero_())
    shape = {"BLOCK_W": tile.words, "BLOCK_N": tile.tokens, "num_warps": tile.warps, "num_stages": 1}
    with launching_on(z_fm):
        count_rows_kernel[(blocks, segments)](marks.active, counts, totals, n_words, n_tokens, per_segment, **shape)
        list_rows_kernel[(blocks, segments)](
            z_fm, marks.active, counts, totals, offsets, features, values,
            n_words, n_tokens, per_segment, capacity, **shape
        )  # fmt: skip
    return Rows(features, values, offsets)
