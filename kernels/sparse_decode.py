"""Sparse decoder: reconstructions from rows of values and feature indices, and the backward pass. No atomics.

It reads l0 rows of W_dec per token instead of all of them. Sums are float32, in an order that depends on the input
only. A kernel cannot report an index outside W_dec, so such an index makes the token's reconstruction NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import decode_tile
from .launch import launching_on

RUN = 256
"""Number of entries of a feature that one program adds up; a feature with more has several programs, summed
afterwards."""


@triton.jit
def sparse_decode_kernel(
    values, indices, counts, w, bias, out, n_features, d_in, capacity,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D columns of one token's reconstruction. out [n_tokens, d_in]."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_in_tile = d < d_in
    count = tl.minimum(tl.load(counts + n).to(tl.int32), capacity)
    total = tl.zeros((BLOCK_J, BLOCK_D), tl.float32)
    for j0 in range(0, count, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        f = tl.load(indices + n * capacity + j, mask=j < count, other=0).to(tl.int64)
        value = tl.load(values + n * capacity + j, mask=j < count, other=0.0).to(tl.float32)
        inside = (f >= 0) & (f < n_features)
        value = tl.where(inside, value, float("nan"))
        mask = ((j < count) & inside)[:, None] & d_in_tile[None, :]
        rows = tl.load(w + f[:, None] * d_in + d[None, :], mask=mask, other=0.0)
        total += value[:, None] * rows.to(tl.float32)
    x_hat = tl.sum(total, axis=0) + tl.load(bias + d, mask=d_in_tile, other=0.0).to(tl.float32)
    tl.store(out + n * d_in + d, x_hat.to(out.dtype.element_ty), mask=d_in_tile)


@triton.jit
def sparse_dots_kernel(
    g, indices, counts, w, out, n_features, d_in, capacity,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: one token's out [capacity] = g . W_dec[index], for the used places."""
    n = tl.program_id(0).to(tl.int64)
    count = tl.minimum(tl.load(counts + n).to(tl.int32), capacity)
    for j0 in range(0, count, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        f = tl.load(indices + n * capacity + j, mask=j < count, other=0).to(tl.int64)
        inside = (f >= 0) & (f < n_features)
        total = tl.zeros((BLOCK_J, BLOCK_D), tl.float32)
        for d0 in range(0, d_in, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            mask = ((j < count) & inside)[:, None] & (d < d_in)[None, :]
            rows = tl.load(w + f[:, None] * d_in + d[None, :], mask=mask, other=0.0).to(tl.float32)
            total += rows * tl.load(g + n * d_in + d, mask=d < d_in, other=0.0).to(tl.float32)[None, :]
        dot = tl.where(inside, tl.sum(total, axis=1), float("nan"))
        tl.store(out + n * capacity + j, dot.to(out.dtype.element_ty), mask=j < count)


@triton.jit
def segment_sum_kernel(
    rows, at, weights, bounds, out, d_in,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D columns of out[s] = sum of weights[e] * rows[at[e]], bounds[s] <= e < bounds[s + 1]."""
    s = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start, end = tl.load(bounds + s), tl.load(bounds + s + 1)
    total = tl.zeros((BLOCK_J, BLOCK_D), tl.float32)
    for e0 in range(start, end, BLOCK_J):
        e = e0 + tl.arange(0, BLOCK_J)
        weight = tl.load(weights + e, mask=e < end, other=0.0).to(tl.float32)
        row = tl.load(at + e, mask=e < end, other=0).to(tl.int64)
        mask = (e < end)[:, None] & (d < d_in)[None, :]
        total += weight[:, None] * tl.load(rows + row[:, None] * d_in + d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + s * d_in + d, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=d < d_in)


def _check(values: Tensor, indices: Tensor, counts: Tensor, W_dec: Tensor) -> None:
    if values.dim() != 2 or indices.shape != values.shape or counts.shape != values.shape[:1] or W_dec.dim() != 2:
        raise ValueError(
            f"values {tuple(values.shape)}, indices {tuple(indices.shape)}, counts {tuple(counts.shape)} and W_dec "
            f"{tuple(W_dec.shape)} do not fit: [n, width], [n, width], [n] and [d_sae, d_in] are wanted"
        )


def sparse_decode(values: Tensor, indices: Tensor, counts: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Computes x_hat [n_tokens, d_in], in the dtype that values and W_dec promote to.

    values, indices: [n_tokens, width], of which the first counts [n_tokens] are used. W_dec: [d_sae, d_in]. b_dec:
    [d_in].
    """
    _check(values, indices, counts, W_dec)
    (n_tokens, width), (n_features, d_in) = values.shape, W_dec.shape
    out = W_dec.new_empty((n_tokens, d_in), dtype=torch.promote_types(values.dtype, W_dec.dtype))
    values, indices, counts, W_dec = (t.contiguous() for t in (values, indices, counts, W_dec))
    if out.numel() > 0:
        tile = decode_tile(d_in)
        with launching_on(values):
            sparse_decode_kernel[(n_tokens, triton.cdiv(d_in, tile.columns))](
                values, indices, counts, W_dec, b_dec.contiguous(), out, n_features, d_in, width,
                BLOCK_J=tile.rows, BLOCK_D=tile.columns, num_warps=tile.warps,
            )  # fmt: skip
    return out


def sparse_decode_dvalues(g: Tensor, values: Tensor, indices: Tensor, counts: Tensor, W_dec: Tensor) -> Tensor:
    """Computes dL/dvalues [n_tokens, width] in values' dtype, zero at unused places, from g = dL/dx_hat [n_tokens,
    d_in]."""
    _check(values, indices, counts, W_dec)
    (n_tokens, width), (n_features, d_in) = values.shape, W_dec.shape
    out = torch.zeros_like(values, memory_format=torch.contiguous_format)
    g, indices, counts, W_dec = (t.contiguous() for t in (g, indices, counts, W_dec))
    if out.numel() > 0:
        tile = decode_tile(d_in)
        with launching_on(g):
            sparse_dots_kernel[(n_tokens,)](
                g, indices, counts, W_dec, out, n_features, d_in, width,
                BLOCK_J=tile.rows, BLOCK_D=tile.columns, num_warps=tile.warps,
            )  # fmt: skip
    return out


def sparse_decode_dweight(g: Tensor, values: Tensor, indices: Tensor, counts: Tensor, W_dec: Tensor) -> Tensor:
    """Computes dL/dW_dec [d_sae, d_in] in W_dec's dtype, from g = dL/dx_hat [n_tokens, d_in].

    Entries are sorted by feature, then token, and added in that order. This waits for the GPU to learn the number of
    entries.
    """
    _check(values, indices, counts, W_dec)
    width, n_features = values.shape[1], W_dec.shape[0]
    used = torch.arange(width, device=values.device) < counts.unsqueeze(1)
    entries = used.flatten().nonzero().squeeze(1)
    features, order = indices.flatten()[entries].sort(stable=True)
    entries = entries[order]
    tokens, weights = entries // width, values.flatten()[entries]
    bounds = torch.searchsorted(features, torch.arange(n_features + 1, device=features.device))
    per_feature = bounds.diff()
    if n_features == 0 or int(per_feature.max()) <= RUN:
        return _segment_sum(g, tokens, weights, bounds, W_dec.dtype)
    runs = (per_feature + RUN - 1) // RUN
    run_bounds = torch.cat([runs.new_zeros(1), runs.cumsum(0)])
    feature_of = torch.repeat_interleave(torch.arange(n_features, device=runs.device), runs)
    run = torch.arange(len(feature_of), device=runs.device)
    starts = bounds[feature_of] + RUN * (run - run_bounds[feature_of])
    partial = _segment_sum(g, tokens, weights, torch.cat([starts, bounds[-1:]]), torch.float32)
    return _segment_sum(partial, run, torch.ones_like(run, dtype=torch.float32), run_bounds, W_dec.dtype)


def _segment_sum(rows: Tensor, at: Tensor, weights: Tensor, bounds: Tensor, dtype: torch.dtype) -> Tensor:
    rows, d_in = rows.contiguous(), rows.shape[1]
    out = rows.new_empty((len(bounds) - 1, d_in), dtype=dtype)
    if out.numel() > 0:
        tile = decode_tile(d_in)
        with launching_on(rows):
            segment_sum_kernel[(len(bounds) - 1, triton.cdiv(d_in, tile.columns))](
                rows, at, weights, bounds, out, d_in,
                BLOCK_J=tile.rows, BLOCK_D=tile.columns, num_warps=tile.warps,
            )  # fmt: skip
    return out
