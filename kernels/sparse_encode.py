"""Sparse encoder: computes the nonzero codes of x_c as rows of values and feature indices; for inference only.

There are two kernels for each run of tokens. The first is the fused encoder, but stores only nonzero codes (at their
places in a scratch tensor that is reused for every run of tokens) and one bit for every code. The second,
`sparse_rows`, turns bits into rows. Dense codes are neither written nor read; no atomics, no sorting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import rows_tile, sparse_tile
from .launch import capability, dot_precision, launching_on, pack_gate
from .product import product, tile_of_program, token_parts
from .rational import gate_forward, load_coefficients
from .sparse_rows import NAN_KEY, gather_rows_kernel, keep_largest_kernel

WORD = 32
"""Number of features per word of bits, and per block whose maximum the top-k variant stores."""
SCRATCH = 2**25
"""Largest size of the scratch tensor in elements (64 MiB in bfloat16), but at least one tile of tokens."""


class SparseRows(NamedTuple):
    """values [n_tokens, width] and indices [n_tokens, width] int64: in each row the features in ascending order, then
    zeros. counts [n_tokens] int32: the number of codes, which can exceed `width`; the excess codes are missing."""

    values: Tensor
    indices: Tensor
    counts: Tensor


@triton.jit
def _emit(
    value, z_tile, bits_tile, best_tile, n_local, n_left, f_mask, word_mask, bit, theta, activity, c,
    P: tl.constexpr, Q: tl.constexpr,
    GATED: tl.constexpr, CLAMP: tl.constexpr, IDENTITY: tl.constexpr, RANKED: tl.constexpr,
    WORDS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Applies the gate to the columns n_local [1, COLUMNS] of a tile, value [WORDS * 32, COLUMNS], and stores nonzero
    codes.

    z_tile [WORDS * 32, 1], bits_tile and best_tile [WORDS, 1]: pointers to the tile's rows. RANKED: only positive codes
    are kept, in float32, and the largest of each 32 is stored in best as the integer of its bits.
    """
    mask = f_mask & (n_local < n_left)
    code, _ = gate_forward(value, theta, activity, c, P, Q, GATED, CLAMP, IDENTITY, True)
    word_mask = word_mask & (n_local < n_left)
    if RANKED:
        # Positive floats are ordered like the integers of their bits. NaN, of either sign, comes out on top.
        key = tl.where(code != code, NAN_KEY, code.to(tl.int32, bitcast=True))
        keep = mask & (key > 0)
        tl.store(z_tile + n_local, key.to(tl.float32, bitcast=True), mask=keep)
        blocks = tl.reshape(tl.where(keep, key, 0), (WORDS, 32, COLUMNS))
        tl.store(best_tile + n_local, tl.max(blocks, axis=1), mask=word_mask)
    else:
        code = code.to(z_tile.dtype.element_ty)
        keep = mask & (code.to(tl.float32) != 0.0)  # NaN is kept
        tl.store(z_tile + n_local, code, mask=keep)
    word = tl.sum(tl.reshape(tl.where(keep, bit, 0), (WORDS, 32, COLUMNS)), axis=1)
    tl.store(bits_tile + n_local, word, mask=word_mask)


@triton.jit
def sparse_encode_kernel(
    x, w, z, bits, best, coefficients, rows,
    n_features, n_tokens, d_in, stride_xn, stride_xd, stride_wd, stride_wf, stride_f,
    P: tl.constexpr, Q: tl.constexpr,
    GATED: tl.constexpr, CLAMP: tl.constexpr, IDENTITY: tl.constexpr, RANKED: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SUB: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a [BLOCK_F, BLOCK_N] tile, computed exactly as in `encode_forward_kernel`.

    z [n_features, stride_f] is written where the code is not zero; bits and best [n_features / 32, stride_f].
    """
    f_block, n_block = tile_of_program(n_features, n_tokens, BLOCK_F, BLOCK_N, GROUP)
    f0, n0 = f_block.to(tl.int64) * BLOCK_F, n_block.to(tl.int64) * BLOCK_N
    value = product(w, x, f0, n0, n_features, n_tokens, d_in, stride_wf, stride_wd, stride_xn, stride_xd,
                    BLOCK_F, BLOCK_N, BLOCK_D, PRECISION)  # fmt: skip
    f_local = tl.arange(0, BLOCK_F)
    f, f_mask = f0 + f_local[:, None], f_local[:, None] < n_features - f0
    c = load_coefficients(coefficients, f, f_mask, n_features, P + Q + 4, SHARED)
    theta = tl.load(rows + f, mask=f_mask, other=0.0)
    activity = tl.load(rows + n_features + f, mask=f_mask, other=0.0)
    value += tl.load(rows + 2 * n_features + f, mask=f_mask, other=0.0)
    WORDS: tl.constexpr = BLOCK_F // 32
    word_local = tl.arange(0, WORDS)[:, None]
    word_mask = word_local * 32 < n_features - f0
    bit = 1 << (f_local[:, None] & 31)
    z_tile = z + n0 + f * stride_f
    bits_tile = bits + n0 + (f0 // 32 + word_local) * stride_f
    best_tile = best + n0 + (f0 // 32 + word_local) * stride_f
    n_left = (n_tokens - n0).to(tl.int32)
    PART: tl.constexpr = BLOCK_N // SUB
    parts = token_parts(value, BLOCK_F, BLOCK_N, SUB)
    for i in tl.static_range(SUB):
        n_part = i * PART + tl.arange(0, PART)[None, :]
        _emit(parts[i], z_tile, bits_tile, best_tile, n_part, n_left, f_mask, word_mask, bit, theta, activity,
              c, P, Q, GATED, CLAMP, IDENTITY, RANKED, WORDS, PART)  # fmt: skip


def sparse_encode(
    x_c: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    gate: Sequence[Tensor],
    *,
    p: int,
    q: int,
    gated: bool,
    clamp: bool,
    identity: bool,
    capacity: int,
    k: int | None = None,
) -> SparseRows:
    """Returns the nonzero codes as rows, given x_c [n_tokens, d_in], W_enc [d_in, n_features] and b_enc [n_features].

    x_c and W_enc have one dtype and any strides. The rows are `capacity` wide and hold the nonzero codes of
    `encode_forward(hard=True)`, bit for bit if both use the same tile. With k they hold the k largest positive codes,
    ranked in float32, equal ones by lowest index. `capacity` is then the number of candidates that a token may have (at
    least k), the rows are k wide, and a count above k says that there were more candidates than that; such a row must
    not be used.

    gate: the seven tensors of `launch.pack_gate`. Nothing here waits for the GPU, so the caller must look at counts
    above the width and decide what to do.
    """
    (n_tokens, d_in), n_features = x_c.shape, W_enc.shape[1]
    if W_enc.shape[0] != d_in or b_enc.shape != (n_features,) or gate[5].shape != (n_features,):
        raise ValueError(
            f"x_c {tuple(x_c.shape)}, W_enc {tuple(W_enc.shape)}, b_enc {tuple(b_enc.shape)} and threshold "
            f"{tuple(gate[5].shape)} do not fit: [n, d_in], [d_in, d_sae], [d_sae] and [d_sae] are wanted"
        )
    if x_c.dtype != W_enc.dtype:
        raise ValueError(f"x_c is {x_c.dtype} and W_enc {W_enc.dtype}; give both the same dtype")
    if capacity < max(1, k or 1) or (k is not None and k < 1):
        raise ValueError(f"capacity {capacity} with k {k}: give at least one place a token, and k of them")
    width = capacity if k is None else k
    values = x_c.new_zeros((n_tokens, width))
    indices = torch.zeros_like(values, dtype=torch.int64)
    counts = x_c.new_zeros(n_tokens, dtype=torch.int32)
    if n_tokens == 0 or n_features == 0:
        return SparseRows(values, indices, counts)
    packed = pack_gate(gate, p, q, b_enc)
    tile = sparse_tile(capability(x_c), x_c.dtype, p, q, packed.shared, n_tokens)
    run = min(max(SCRATCH // n_features // tile.tokens, 1), triton.cdiv(n_tokens, tile.tokens)) * tile.tokens
    n_words = triton.cdiv(n_features, WORD)
    z = x_c.new_empty((n_features, run), dtype=x_c.dtype if k is None else torch.float32)
    bits = x_c.new_empty((n_words, run), dtype=torch.int32)
    best = bits if k is None else torch.empty_like(bits)
    # The candidates of the top-k variant, for one run of tokens.
    many = 0 if k is None else run
    wide = SparseRows(*(t.new_empty((many, capacity)) for t in (z, indices)), counts.new_empty(many))
    rows = rows_tile(n_words)
    with launching_on(x_c):
        for n0 in range(0, n_tokens, run):
            n = min(run, n_tokens - n0)
            part = x_c[n0 : n0 + n]
            sparse_encode_kernel[(triton.cdiv(n_features, tile.features) * triton.cdiv(n, tile.tokens),)](
                part, W_enc, z, bits, best, packed.coefficients, packed.rows,
                n_features, n, d_in, *part.stride(), *W_enc.stride(), run,
                P=p, Q=q, GATED=gated, CLAMP=clamp, IDENTITY=identity, RANKED=k is not None, SHARED=packed.shared,
                BLOCK_F=tile.features, BLOCK_N=tile.tokens, BLOCK_D=tile.inner, SUB=tile.sub, GROUP=tile.group,
                PRECISION=dot_precision(x_c.dtype), num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
            own = SparseRows(values[n0 : n0 + n], indices[n0 : n0 + n], counts[n0 : n0 + n])
            out = own if k is None else wide
            gather_rows_kernel[(triton.cdiv(n, rows.tokens),)](
                z, bits, best, *out, n_words, n, run, capacity, k or 0,
                RANKED=k is not None, BLOCK_W=rows.words, BLOCK_N=rows.tokens, num_warps=rows.warps, num_stages=1,
            )  # fmt: skip
            if k is not None:
                keep_largest_kernel[(triton.cdiv(n, rows.tokens),)](
                    *wide, *own, n, capacity, k,
                    BLOCK_J=rows.places, BLOCK_N=rows.tokens,
                    num_warps=rows.warps, num_stages=1,
                )  # fmt: skip
    return SparseRows(values, indices, counts)
