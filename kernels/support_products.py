"""Products at the entries of a support: reconstructions from rows of codes, and the gradients of the entries' codes.

The dense step computes these for every token and feature, the sparse step for the entries only. A reconstruction is
compared with its target where it is made, in registers. Sums are float32, in an
order that depends on the input only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import decode_tile, dots_tile, entry_programs
from .launch import launching_on
from .support_list import Entries, Rows

RESIDUAL_PROGRAMS = 2048
"""Number of programs that a reconstruction which is compared with its target aims for: each leaves a row of sums."""


class Residual(NamedTuple):
    """A reconstruction compared with its target: x_hat [n_tokens, d_in]; g [n_tokens, d_in], the squared error's
    gradient; error = x_hat - target (times the tokens' scales), if it was asked for. losses [runs, column blocks]: sums
    of the squares, and columns [runs, d_in]: of the gradients, by runs of tokens; float32."""

    x_hat: Tensor
    g: Tensor
    error: Tensor | None
    losses: Tensor
    columns: Tensor


@triton.jit
def support_decode_kernel(
    values, features, offsets, used, w, bias, out, target, scale, g, error, losses, columns,
    n_tokens, d_in, n_features, capacity, per_program, factor,
    DECODE: tl.constexpr, LIMITED: tl.constexpr, HAS_BIAS: tl.constexpr, LOSS: tl.constexpr, SCALED: tl.constexpr,
    ERROR: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D columns of per_program tokens. DECODE: makes out, which is read otherwise. LIMITED: it is
    NaN if used[n_features] is above the capacity. LOSS: compares it with the target. factor: of the gradients."""
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < d_in
    start = tl.zeros((BLOCK_D,), tl.float32)
    if DECODE:
        if HAS_BIAS:
            start += tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
        if LIMITED:
            start = tl.where(tl.load(used + n_features) > capacity, float("nan"), start)
    loss, total = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    n0 = tl.program_id(0).to(tl.int64) * per_program
    for n in range(n0, tl.minimum(n0 + per_program, n_tokens)):
        at = n * d_in + d
        if DECODE:
            first = tl.minimum(tl.load(offsets + n), capacity)
            end = tl.minimum(tl.load(offsets + n + 1), capacity)
            made = tl.zeros((BLOCK_J, BLOCK_D), tl.float32)
            for j0 in range(first, end, BLOCK_J):
                j = j0 + tl.arange(0, BLOCK_J)
                f = tl.load(features + j, mask=j < end, other=0).to(tl.int64)
                value = tl.load(values + j, mask=j < end, other=0.0).to(tl.float32)
                part = tl.load(w + f[:, None] * d_in + d[None, :], mask=(j < end)[:, None] & inside[None, :], other=0.0)
                made += value[:, None] * part.to(tl.float32)
            x_hat = tl.sum(made, axis=0) + start
            tl.store(out + at, x_hat.to(out.dtype.element_ty), mask=inside)
        else:
            x_hat = tl.load(out + at, mask=inside, other=0.0)
        if LOSS:
            left = x_hat - tl.load(target + at, mask=inside, other=0.0).to(tl.float32)
            slope = left * factor
            if SCALED:
                own = tl.load(scale + n)
                left *= own
                slope = left * own * factor
            left = tl.where(inside, left, 0.0)
            loss += left * left
            if ERROR:
                tl.store(error + at, left, mask=inside)
            tl.store(g + at, slope.to(g.dtype.element_ty), mask=inside)
            total += slope
    if LOSS:
        tl.store(losses + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(loss))
        tl.store(columns + tl.program_id(0).to(tl.int64) * d_in + d, total, mask=inside)


@triton.jit
def entry_dots_kernel(
    g, w, tokens, features, offsets, out, n_features, n_tokens, d_in, capacity,
    DENSE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Computes out[e] = g[token] . w[feature], or out[feature, token] if DENSE; the programs share the blocks of
    entries."""
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
        at = f * n_tokens + n if DENSE else e
        tl.store(out + at, tl.sum(dots, axis=1).to(out.dtype.element_ty), mask=here)


def support_decode(rows: Rows, W_dec: Tensor, b_dec: Tensor | None, entries: Entries | None = None) -> Tensor:
    """Computes x_hat [n_tokens, d_in] float32 from rows of codes, W_dec [n_features, d_in] and b_dec [d_in]; NaN if
    there are more entries than their lists have room for."""
    out = W_dec.new_empty((len(rows.offsets) - 1, W_dec.shape[1]), dtype=torch.float32)
    _decode(rows, W_dec, b_dec, entries, out)
    return out


def support_residual(
    rows: Rows | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    entries: Entries | None,
    target: Tensor,
    scale: Tensor | None,
    factor: float,
    dtype: torch.dtype,
    *,
    x_hat: Tensor | None = None,
    error: bool = False,
) -> Residual:
    """Does what `support_decode` does, into x_hat of the target's dtype, and compares it with target [n_tokens, d_in]
    in the same pass.

    Args:
        rows: None if x_hat is given. scale: [n_tokens, 1] float32, multiplies each token's error; or None.
        factor, dtype: of g = factor * scale * error. error: whether the error is wanted.
    """
    (n_tokens, d_in), tile = target.shape, decode_tile(W_dec.shape[1])
    per_program = max(1, n_tokens * triton.cdiv(d_in, tile.columns) // RESIDUAL_PROGRAMS)
    runs, blocks = triton.cdiv(n_tokens, per_program), triton.cdiv(d_in, tile.columns)
    made = Residual(
        target.new_empty(target.shape) if x_hat is None else x_hat,  # contiguous, whatever the target is
        W_dec.new_empty((n_tokens, d_in), dtype=dtype),
        W_dec.new_empty((n_tokens, d_in), dtype=torch.float32) if error else None,
        W_dec.new_empty((runs, blocks), dtype=torch.float32),
        W_dec.new_empty((runs, d_in), dtype=torch.float32),
    )
    _decode(rows, W_dec, b_dec, entries, made.x_hat, made, target.contiguous(), scale, factor, per_program)
    return made


def _decode(
    rows: Rows | None, W_dec: Tensor, b_dec: Tensor | None, entries: Entries | None, out: Tensor,
    made: Residual | None = None, target: Tensor | None = None, scale: Tensor | None = None, factor: float = 0.0,
    per_program: int = 1,
) -> None:  # fmt: skip
    (n_tokens, d_in), W_dec = out.shape, W_dec.contiguous()
    if out.numel() == 0:
        return
    tile = decode_tile(d_in)
    lists = (out, out, out) if rows is None else (rows.values, rows.features, rows.offsets)
    others = (out, out, out, out, out) if made is None else (
        target, out if scale is None else scale.contiguous(), made.g, out if made.error is None else made.error,
        made.losses,
    )  # fmt: skip
    with launching_on(out):
        support_decode_kernel[(triton.cdiv(n_tokens, per_program), triton.cdiv(d_in, tile.columns))](
            *lists, out if entries is None else entries.offsets, W_dec, out if b_dec is None else b_dec.contiguous(),
            out, *others, out if made is None else made.columns, n_tokens, d_in, len(W_dec),
            0 if rows is None else len(rows.values), per_program, float(factor), DECODE=rows is not None,
            LIMITED=entries is not None, HAS_BIAS=b_dec is not None, LOSS=made is not None, SCALED=scale is not None,
            ERROR=made is not None and made.error is not None, BLOCK_J=tile.rows, BLOCK_D=tile.columns,
            num_warps=tile.warps,
        )  # fmt: skip


def entry_dots(g: Tensor, W_dec: Tensor, entries: Entries, *, into: Tensor | None = None) -> Tensor:
    """Computes dL/dz of every entry, [capacity] float32, from g = dL/dx_hat [n_tokens, d_in] and W_dec [n_features,
    d_in].

    into: contiguous memory [n_features, n_tokens] that receives the dot products, at the entries' places only.
    """
    n_features, d_in = W_dec.shape
    if g.shape[1] != d_in or len(entries.offsets) != n_features + 1:
        raise ValueError(
            f"g {tuple(g.shape)}, W_dec {tuple(W_dec.shape)} and entries of {len(entries.offsets) - 1} features do "
            "not fit: [n, d_in], [d_sae, d_in] and d_sae are wanted"
        )
    if into is not None and (into.shape != (n_features, len(g)) or not into.is_contiguous()):
        raise ValueError(f"into is {tuple(into.shape)}; contiguous memory of [{n_features}, {len(g)}] is wanted")
    out, room = torch.empty_like(entries.values) if into is None else into, len(entries.values)
    g, W_dec = g.contiguous(), W_dec.contiguous()
    if out.numel() > 0 and room > 0:
        tile = dots_tile(d_in)
        with launching_on(out):
            entry_dots_kernel[(entry_programs(room, tile.rows),)](
                g, W_dec, entries.tokens, entries.features, entries.offsets, out, n_features, len(g), d_in, room,
                DENSE=into is not None, BLOCK_E=tile.rows, BLOCK_D=tile.columns, num_warps=tile.warps,
            )  # fmt: skip
    return out
