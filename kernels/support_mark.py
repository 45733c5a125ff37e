"""Finds the support of a batch, in one pass over h, the encoder's product without its bias.

The support of a hard gate whose domain is clamped is h > theta - C_in; outside of it the code and every gradient are
exactly zero. One bit per element says whether it is in the support (along tokens), another whether it is active (along
features), and both are counted for each feature. No atomics; the same bits in every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import mark_tile
from .launch import launching_on, split_tokens

WORD = 32
MARGIN = 2.0**-21
"""The lower end of the support is lowered by this fraction of its terms, so that rounding never leaves an element out.
One too many does no harm: the gate of the entries decides again and gives zeros."""


class Marks(NamedTuple):
    """support [n_features, n_tokens / 32] and active [n_features / 32, n_tokens] int32: one bit per element.
    rows [3, n_features] float32: the support's lower end and the threshold, which were compared with, and b_enc.
    in_support and counts [n_features] int64: numbers of tokens; NaN is in the support but not active.
    """

    support: Tensor
    active: Tensor
    rows: Tensor
    in_support: Tensor
    counts: Tensor


@triton.jit
def support_mark_kernel(
    h, rows, support, active, partial, n_features, n_tokens, n_words, split_size,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_F features, split_size tokens. partial [n_splits, 2, n_features] int32."""
    f0 = tl.program_id(0).to(tl.int64) * BLOCK_F
    f_local, n_local = tl.arange(0, BLOCK_F)[:, None], tl.arange(0, BLOCK_N)[None, :]
    f, f_mask = f0 + f_local, f_local < n_features - f0
    low = tl.load(rows + f, mask=f_mask, other=0.0)
    theta = tl.load(rows + n_features + f, mask=f_mask, other=0.0)
    bias = tl.load(rows + 2 * n_features + f, mask=f_mask, other=0.0)
    along_tokens, along_features = 1 << (n_local & 31), 1 << (f_local & 31)
    word, block = tl.arange(0, BLOCK_N // 32)[None, :], tl.arange(0, BLOCK_F // 32)[:, None]
    block_mask = block * 32 < n_features - f0
    start = tl.program_id(1) * split_size
    in_support, count = tl.zeros((BLOCK_F,), tl.int32), tl.zeros((BLOCK_F,), tl.int32)
    for n0 in tl.range(start, tl.minimum(start + split_size, n_tokens), BLOCK_N, num_stages=STAGES):
        n_left = n_tokens - n0
        mask = f_mask & (n_local < n_left)
        value = tl.load(h + f * n_tokens + n0 + n_local, mask=mask, other=0.0).to(tl.float32) + bias
        inside = mask & ~(value <= low)  # written this way, NaN is inside
        found = tl.sum(tl.reshape(tl.where(inside, along_tokens, 0), (BLOCK_F, BLOCK_N // 32, 32)), axis=2)
        tl.store(support + f * n_words + n0 // 32 + word, found, mask=f_mask & (word * 32 < n_left))
        on = mask & ~(value <= theta)
        found = tl.sum(tl.reshape(tl.where(on, along_features, 0), (BLOCK_F // 32, 32, BLOCK_N)), axis=1)
        tl.store(active + (f0 // 32 + block) * n_tokens + n0 + n_local, found, mask=block_mask & (n_local < n_left))
        in_support += tl.sum(inside.to(tl.int32), axis=1)
        count += tl.sum((mask & (value > theta)).to(tl.int32), axis=1)
    f_local = tl.arange(0, BLOCK_F)
    row = partial + tl.program_id(1).to(tl.int64) * 2 * n_features + f0 + f_local
    tl.store(row, in_support, mask=f_local < n_features - f0)
    tl.store(row + n_features, count, mask=f_local < n_features - f0)


def support_mark(h_fm: Tensor, threshold: Tensor, input_scale: Tensor, b_enc: Tensor) -> Marks:
    """Marks the support and the active codes of h_fm [n_features, n_tokens] = W_enc^T x_c^T, which is without the bias.

    threshold, b_enc: [n_features]. input_scale: [1] or [n_features].
    """
    n_features, n_tokens = h_fm.shape
    if threshold.shape != (n_features,) or b_enc.shape != (n_features,) or len(input_scale) not in (1, n_features):
        raise ValueError(
            f"h {tuple(h_fm.shape)}, threshold {tuple(threshold.shape)}, input_scale {tuple(input_scale.shape)} and "
            f"b_enc {tuple(b_enc.shape)} do not fit: [d_sae, n], [d_sae], [1] or [d_sae], and [d_sae] are wanted"
        )
    if not h_fm.is_contiguous():
        raise ValueError("h must be contiguous: the tokens of one feature side by side")
    threshold, input_scale, b_enc = (t.detach().float() for t in (threshold, input_scale, b_enc))
    low = threshold - input_scale - MARGIN * (threshold.abs() + input_scale.abs())
    rows = torch.stack([low, threshold, b_enc])
    support = h_fm.new_empty((n_features, triton.cdiv(n_tokens, WORD)), dtype=torch.int32)
    active = h_fm.new_empty((triton.cdiv(n_features, WORD), n_tokens), dtype=torch.int32)
    if h_fm.numel() == 0:
        return Marks(support, active, rows, *torch.zeros((2, n_features), dtype=torch.int64, device=h_fm.device))
    tile = mark_tile(h_fm.dtype, n_tokens)
    blocks = triton.cdiv(n_features, tile.features)
    split = split_tokens(n_tokens, blocks, tile.lanes)
    partial = h_fm.new_empty((split.count, 2, n_features), dtype=torch.int32)
    with launching_on(h_fm):
        support_mark_kernel[(blocks, split.count)](
            h_fm, rows, support, active, partial, n_features, n_tokens, support.shape[1], split.tokens,
            BLOCK_F=tile.features, BLOCK_N=tile.lanes, STAGES=tile.stages,
            num_warps=tile.warps, num_stages=1,
        )  # fmt: skip
    return Marks(support, active, rows, *partial.sum(0))
