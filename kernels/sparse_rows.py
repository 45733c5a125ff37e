"""Turns bits into rows: where the sparse encoder's codes go, and which of them are the k largest.

One program owns a few tokens and goes over their words of 32 features in order. A running count is each token's next
free place, so rows are sorted by feature, the same in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

NAN_KEY = tl.constexpr(0x7FC00000)
"""A NaN as the integer of its bits, which is above that of every number."""


@triton.jit
def popcount(x):
    """Returns the number of set bits of a uint32."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return ((x + (x >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def lowest_bit(x):
    """Returns the position of the lowest set bit of a uint32; 31 for 0."""
    return popcount((x ^ (x - 1)) >> 1)


@triton.jit
def kth_largest(
    keys, stride_j, stride_n, length, n, n_mask, k,
    LOWEST_BIT: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Returns the k-th largest of keys[j * stride_j + n * stride_n], j < length (int32, bits from LOWEST_BIT on), or 0
    if fewer than k are positive. n, n_mask: [1, BLOCK_N]; `length` is one number, or one for each n."""
    found = tl.zeros((1, BLOCK_N), tl.int32)
    longest = tl.max(length + tl.zeros((1, BLOCK_N), tl.int32))
    for step in range(31 - LOWEST_BIT):
        trial = found | (1 << (30 - step))
        count = tl.zeros((1, BLOCK_N), tl.int32)
        for j0 in range(0, longest, BLOCK_J):
            j = j0 + tl.arange(0, BLOCK_J)[:, None]
            key = tl.load(keys + j.to(tl.int64) * stride_j + n * stride_n, mask=(j < length) & n_mask, other=0)
            count += tl.sum((key >= trial).to(tl.int32), axis=0)[None, :]
        found = tl.where(count >= k, trial, found)
    return found


@triton.jit
def gather_rows_kernel(
    z, bits, best, values, indices, counts, n_words, n_tokens, stride_f, capacity, k,
    RANKED: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: the rows of BLOCK_N tokens, `capacity` wide, from z, bits and best as `sparse_encode_kernel` wrote
    them.

    counts are correct even if they exceed the capacity. RANKED: rows hold all codes that are not below the k-th largest
    of the maxima of blocks of 32 features. At least k codes are not, so the k largest are among them.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    n_mask = n < n_tokens
    z_bits = z.to(tl.pointer_type(tl.int32), bitcast=True) if RANKED else z
    if RANKED:
        # The upper 16 bits are enough: a slightly lower floor only admits a few more candidates.
        floor = tl.maximum(kth_largest(best, stride_f, 1, n_words, n, n_mask, k, 15, 4 * BLOCK_W, BLOCK_N), 1)
    total = tl.zeros((1, BLOCK_N), tl.int32)
    for w0 in range(0, n_words, BLOCK_W):
        w = (w0 + tl.arange(0, BLOCK_W)[:, None]).to(tl.int64)
        mask = (w < n_words) & n_mask
        word = tl.load(bits + w * stride_f + n, mask=mask, other=0).to(tl.uint32, bitcast=True)
        if RANKED:
            word = tl.where(tl.load(best + w * stride_f + n, mask=mask, other=0) >= floor, word, 0)
            left = word
            while tl.max(left) > 0:
                rest = left & (left - 1)
                key = tl.load(z_bits + (w * 32 + lowest_bit(left)) * stride_f + n, mask=left > 0, other=0)
                word = tl.where(key >= floor, word, word - (left - rest))
                left = rest
        count = popcount(word)
        place = total + tl.cumsum(count, axis=0) - count
        row = n.to(tl.int64) * capacity
        while tl.max(word) > 0:
            f = w * 32 + lowest_bit(word)
            fits = (word > 0) & (place < capacity)
            code = tl.load(z + f * stride_f + n, mask=fits, other=0.0)
            tl.store(values + row + place, code, mask=fits)
            tl.store(indices + row + place, f, mask=fits)
            place += 1
            word = word & (word - 1)
        total += tl.sum(count, axis=0)[None, :]
    tl.store(counts + n, total, mask=n_mask)


@triton.jit
def keep_largest_kernel(
    values, indices, counts, out_values, out_indices, out_counts, n_tokens, capacity, k,
    BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: the k largest of each of BLOCK_N rows of positive float32 values, `capacity` wide, in order.

    If a count exceeds the capacity, the row is not complete: it is skipped, and out_counts is that count (which is more
    than k).
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    n_mask = n < n_tokens
    found = tl.load(counts + n, mask=n_mask, other=0)
    length = tl.where(found <= capacity, found, 0)
    keys = values.to(tl.pointer_type(tl.int32), bitcast=True)
    row = n.to(tl.int64) * capacity
    least = kth_largest(keys, 1, capacity, length, n.to(tl.int64), n_mask, k, 0, BLOCK_J, BLOCK_N)
    longest = tl.max(length)
    above = tl.zeros((1, BLOCK_N), tl.int32)
    for j0 in range(0, longest, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)[:, None]
        key = tl.load(keys + row + j, mask=(j < length) & n_mask, other=0)
        above += tl.sum((key > least).to(tl.int32), axis=0)[None, :]
    ties = tl.zeros((1, BLOCK_N), tl.int32)
    total = tl.zeros((1, BLOCK_N), tl.int32)
    for j0 in range(0, longest, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)[:, None]
        mask = (j < length) & n_mask
        key = tl.load(keys + row + j, mask=mask, other=0)
        tie = (mask & (key == least)).to(tl.int32)
        rank = ties + tl.cumsum(tie, axis=0)
        code = key.to(tl.float32, bitcast=True).to(out_values.dtype.element_ty)
        keep = (key > least) | ((tie > 0) & (rank <= k - above))
        keep = keep & (code.to(tl.float32) != 0.0)  # float16 may round to 0
        place = total + tl.cumsum(keep.to(tl.int32), axis=0) - 1
        f = tl.load(indices + row + j, mask=keep, other=0)
        out = n.to(tl.int64) * k + place
        tl.store(out_values + out, code, mask=keep)
        tl.store(out_indices + out, f, mask=keep)
        ties += tl.sum(tie, axis=0)[None, :]
        total += tl.sum(keep.to(tl.int32), axis=0)[None, :]
    tl.store(out_counts + n, tl.where(found <= capacity, total, found), mask=n_mask)
