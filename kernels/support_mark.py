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
MARGIN = tl.constexpr(2.0**-21)
"""The lower end of the support is lowered by this fraction of its terms, so that rounding never leaves an element out.
One too many does no harm: the gate of the entries decides again and gives zeros."""
ROUNDING = tl.constexpr(2.0**-8)
"""The same for an h that a product has rounded to bfloat16."""


class Marks(NamedTuple):
    """support [n_features, n_tokens / 32] and active [n_features / 32, n_tokens] int32: one bit per element.
    partial [n_splits, 2, n_features] int32: for each run of tokens, how many of them each feature has in its support,
    and how many are active; NaN is in the support but not active. totals [blocks, n_splits] int32: the support's sizes
    by blocks of MARK_FEATURES features. bias [n_features]: b_enc, which `list_entries` adds too; None if h has it.
    """

    support: Tensor
    active: Tensor
    partial: Tensor
    totals: Tensor
    bias: Tensor | None

    @property
    def in_support(self) -> Tensor:
        """[n_features] int64: on how many tokens each feature is in its support."""
        return self.partial[:, 0].sum(0)

    @property
    def counts(self) -> Tensor:
        """[n_features] int64: on how many tokens each feature is active."""
        return self.partial[:, 1].sum(0)


@triton.jit
def support_mark_kernel(
    h, threshold, scale, bias, lift, slack, candidates, support, active, partial, totals,
    n_features, n_tokens, n_words, split_size, per_set, width,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, SLACK: tl.constexpr, AMONG: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_F features, split_size tokens. HAS_SCALE: the support's width is in `scale`; per_set: 1, or 0
    if all features share one. SLACK: h is raised by lift [n_features] slack [n_tokens]. AMONG: only the places of the
    bits in `candidates`, laid out as `support`, are read."""
    f0 = tl.program_id(0).to(tl.int64) * BLOCK_F
    f_local, n_local = tl.arange(0, BLOCK_F)[:, None], tl.arange(0, BLOCK_N)[None, :]
    f, f_mask = f0 + f_local, f_local < n_features - f0
    theta = tl.load(threshold + f, mask=f_mask, other=0.0).to(tl.float32)
    if HAS_SCALE:
        width = tl.load(scale + f * per_set, mask=f_mask, other=0.0).to(tl.float32)
    low = theta - width - MARGIN * (tl.abs(theta) + tl.abs(width))
    if HAS_BIAS:
        own_bias = tl.load(bias + f, mask=f_mask, other=0.0).to(tl.float32)
    if SLACK:
        rounding = tl.abs(theta) + tl.abs(width)
        if HAS_BIAS:
            rounding += tl.abs(own_bias)
        low -= ROUNDING * rounding
        theta -= ROUNDING * rounding
        lifted = tl.load(lift + f, mask=f_mask, other=0.0)
    along_tokens, along_features = 1 << (n_local & 31), 1 << (f_local & 31)
    word, block = tl.arange(0, BLOCK_N // 32)[None, :], tl.arange(0, BLOCK_F // 32)[:, None]
    block_mask = block * 32 < n_features - f0
    start = tl.program_id(1) * split_size
    in_support, count = tl.zeros((BLOCK_F,), tl.int32), tl.zeros((BLOCK_F,), tl.int32)
    for n0 in tl.range(start, tl.minimum(start + split_size, n_tokens), BLOCK_N, num_stages=STAGES):
        n_left = n_tokens - n0
        mask = f_mask & (n_local < n_left)
        if AMONG:
            bits = tl.load(candidates + f * n_words + (n0 + n_local) // 32, mask=mask, other=0)
            mask = mask & (((bits >> (n_local & 31)) & 1) > 0)
        value = tl.load(h + f * n_tokens + n0 + n_local, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            value += own_bias
        if SLACK:
            value += lifted * tl.load(slack + n0 + n_local, mask=n_local < n_left, other=0.0)
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
    tl.store(totals + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(in_support))


def support_mark(
    h_fm: Tensor,
    threshold: Tensor,
    input_scale: Tensor | float,
    b_enc: Tensor | None,
    *,
    margin: tuple[Tensor, Tensor] | None = None,
    among: Tensor | None = None,
) -> Marks:
    """Marks the support and the active codes of h_fm [n_features, n_tokens] = W_enc^T x_c^T, which is without the bias.

    threshold, b_enc: [n_features]. input_scale: [1] or [n_features], or a number: how far the support reaches below the
    threshold. b_enc: None if h has the bias already.
    margin: h may be too low by the product of these [n_features] and [n_tokens] float32, and by what its rounding to
        bfloat16 takes; what may be in the support or active is marked.
    among: bits like those of `Marks.support`: only their places are looked at, and h may hold anything elsewhere.
    """
    n_features, n_tokens = h_fm.shape
    width, scale = (input_scale, None) if isinstance(input_scale, float) else (0.0, input_scale.detach().contiguous())
    shapes = [None if one is None else tuple(one.shape) for one in (threshold, scale, b_enc)]
    own = (n_features,)
    if shapes[0] != own or shapes[1] not in (None, (1,), own) or shapes[2] not in (None, own):
        raise ValueError(
            f"h {tuple(h_fm.shape)}, threshold {shapes[0]}, input_scale {shapes[1]} and b_enc {shapes[2]} do not fit: "
            "[d_sae, n], [d_sae], [1] or [d_sae], and [d_sae] are wanted"
        )
    if not h_fm.is_contiguous():
        raise ValueError("h must be contiguous: the tokens of one feature side by side")
    threshold = threshold.detach().contiguous()
    bias = None if b_enc is None else b_enc.detach().contiguous()
    support = h_fm.new_empty((n_features, triton.cdiv(n_tokens, WORD)), dtype=torch.int32)
    active = h_fm.new_empty((triton.cdiv(n_features, WORD), n_tokens), dtype=torch.int32)
    tile = mark_tile(h_fm.dtype, n_tokens, screened=margin is not None or among is not None)
    blocks = triton.cdiv(n_features, tile.features)
    split = split_tokens(n_tokens, blocks, tile.lanes)
    partial = h_fm.new_empty((split.count, 2, n_features), dtype=torch.int32)
    totals = h_fm.new_empty((blocks, split.count), dtype=torch.int32)
    if h_fm.numel() == 0:
        return Marks(support, active, partial.zero_(), totals.zero_(), bias)
    with launching_on(h_fm):
        support_mark_kernel[(blocks, split.count)](
            h_fm, threshold, threshold if scale is None else scale, threshold if bias is None else bias,
            *((threshold, threshold) if margin is None else margin), support if among is None else among,
            support, active, partial, totals, n_features, n_tokens, support.shape[1], split.tokens,
            int(shapes[1] == own != (1,)), width, HAS_SCALE=scale is not None, HAS_BIAS=bias is not None,
            SLACK=margin is not None, AMONG=among is not None,
            BLOCK_F=tile.features, BLOCK_N=tile.lanes, STAGES=tile.stages,
            num_warps=tile.warps, num_stages=1,
        )  # fmt: skip
    return Marks(support, active, partial, totals, bias)
