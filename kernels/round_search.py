"""A round's search on entries (docs/rounds.md), and its derivative: one program a token, which goes through the rows of
the decoder that its entries name three times.

    e = r - z W,   c = e W^T,   g = weight c  where the gate is open,   m = g W,   alpha = <m, e> / (epsilon + ||m||^2)
    y = z + alpha g,   after = e - alpha m,   raw = after W^T at every entry

Sums are float32, in an order that only the input fixes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import row_warps
from .launch import launching_on

SEARCH_COLUMNS = 8192
"""Longest row that a program holds in registers."""


class Search(NamedTuple):
    """y, c (zero where the gate is closed), raw [n_entries]; e, m, after [n_tokens, d_in]; alpha [n_tokens]; float32.
    raw has no elements where it was not asked for."""

    y: Tensor
    c: Tensor
    e: Tensor
    m: Tensor
    after: Tensor
    alpha: Tensor
    raw: Tensor


class SearchGrads(NamedTuple):
    """dz, dweight, dc [n_entries], the last two zero where the gate is closed; de, dm [n_tokens, d_in]; depsilon
    [n_tokens]; float32."""

    dz: Tensor
    dweight: Tensor
    dc: Tensor
    de: Tensor
    dm: Tensor
    depsilon: Tensor


@triton.jit
def rows_at(order, features, opened, w, j, end, d, d_in, ALL: tl.constexpr):
    """Which entries j are of, whether they are there and open, and their rows of w: zeros where they are not read."""
    here = j < end
    at = tl.load(order + j, mask=here, other=0)
    on = here & (tl.load(opened + at, mask=here, other=0) != 0)
    f = tl.load(features + at, mask=here, other=0).to(tl.int64)
    read = here if ALL else on
    part = tl.load(w + f[:, None] * d_in + d[None, :], mask=read[:, None] & (d < d_in)[None, :], other=0.0)
    return at, here, on, part.to(tl.float32)


@triton.jit
def round_search_kernel(
    r, w, z, weight, opened, features, order, starts, epsilon, y, c, e, m, after, alpha, raw, d_in,
    CORRECT: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: a token."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < d_in
    start, end = tl.load(starts + n), tl.load(starts + n + 1)
    own = tl.load(r + n * d_in + d, mask=inside, other=0.0).to(tl.float32)
    for j0 in range(start, end, BLOCK_J):
        at, here, on, part = rows_at(order, features, opened, w, j0 + tl.arange(0, BLOCK_J), end, d, d_in, False)
        own -= tl.sum(tl.load(z + at, mask=on, other=0.0)[:, None] * part, axis=0)
    move = tl.zeros((BLOCK_D,), tl.float32)
    for j0 in range(start, end, BLOCK_J):
        at, here, on, part = rows_at(order, features, opened, w, j0 + tl.arange(0, BLOCK_J), end, d, d_in, False)
        g = tl.load(weight + at, mask=on, other=0.0) * tl.sum(own[None, :] * part, axis=1)
        move += tl.sum(g[:, None] * part, axis=0)
    far = tl.sum(move * own, axis=0) / (tl.load(epsilon) + tl.sum(move * move, axis=0))
    left = own - far * move
    tl.store(e + n * d_in + d, own, mask=inside)
    tl.store(m + n * d_in + d, move, mask=inside)
    tl.store(after + n * d_in + d, left, mask=inside)
    tl.store(alpha + n, far)
    for j0 in range(start, end, BLOCK_J):
        at, here, on, part = rows_at(order, features, opened, w, j0 + tl.arange(0, BLOCK_J), end, d, d_in, CORRECT)
        # Made again rather than kept: what one thread wrote another may not see yet.
        dots = tl.where(on, tl.sum(own[None, :] * part, axis=1), 0.0)
        g = tl.load(weight + at, mask=on, other=0.0) * dots
        tl.store(c + at, dots, mask=here)
        tl.store(y + at, tl.load(z + at, mask=here, other=0.0) + tl.where(on, far * g, 0.0), mask=here)
        if CORRECT:
            tl.store(raw + at, tl.sum(left[None, :] * part, axis=1), mask=here)


@triton.jit
def round_search_back_kernel(
    w, weight, opened, c, e, m, alpha, epsilon, dy, dafter, draw, features, order, starts, dz, dweight, dc, de, dm,
    depsilon, d_in, HAS_DAFTER: tl.constexpr, HAS_DRAW: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: a token."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < d_in
    start, end = tl.load(starts + n), tl.load(starts + n + 1)
    own = tl.load(e + n * d_in + d, mask=inside, other=0.0)
    move = tl.load(m + n * d_in + d, mask=inside, other=0.0)
    far = tl.load(alpha + n)
    left = tl.zeros((BLOCK_D,), tl.float32)
    if HAS_DAFTER:
        left += tl.load(dafter + n * d_in + d, mask=inside, other=0.0)
    by_code = tl.zeros((BLOCK_J,), tl.float32)
    for j0 in range(start, end, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        here = j < end
        at = tl.load(order + j, mask=here, other=0)
        on = here & (tl.load(opened + at, mask=here, other=0) != 0)
        dots = tl.load(weight + at, mask=on, other=0.0) * tl.load(c + at, mask=on, other=0.0)
        by_code += tl.load(dy + at, mask=on, other=0.0) * dots
        if HAS_DRAW:
            f = tl.load(features + at, mask=here, other=0).to(tl.int64)
            part = tl.load(w + f[:, None] * d_in + d[None, :], mask=here[:, None] & inside[None, :], other=0.0)
            left += tl.sum(tl.load(draw + at, mask=here, other=0.0)[:, None] * part.to(tl.float32), axis=0)
    dfar = tl.sum(by_code, axis=0) - tl.sum(left * move, axis=0)
    dtop = dfar / (tl.load(epsilon) + tl.sum(move * move, axis=0))
    dbelow = -far * dtop
    dmove = dtop * own + 2 * dbelow * move - far * left
    left += dtop * move
    tl.store(dm + n * d_in + d, dmove, mask=inside)
    tl.store(depsilon + n, dbelow)
    for j0 in range(start, end, BLOCK_J):
        at, here, on, part = rows_at(order, features, opened, w, j0 + tl.arange(0, BLOCK_J), end, d, d_in, False)
        dg = far * tl.load(dy + at, mask=on, other=0.0) + tl.sum(dmove[None, :] * part, axis=1)
        by_dot = tl.where(on, dg * tl.load(weight + at, mask=on, other=0.0), 0.0)
        tl.store(dweight + at, tl.where(on, dg * tl.load(c + at, mask=on, other=0.0), 0.0), mask=here)
        tl.store(dc + at, by_dot, mask=here)
        left += tl.sum(by_dot[:, None] * part, axis=0)
    tl.store(de + n * d_in + d, left, mask=inside)
    for j0 in range(start, end, BLOCK_J):
        at, here, on, part = rows_at(order, features, opened, w, j0 + tl.arange(0, BLOCK_J), end, d, d_in, True)
        slope = tl.load(dy + at, mask=here, other=0.0) - tl.sum(left[None, :] * part, axis=1)
        tl.store(dz + at, slope, mask=here)


def tile(d_in: int, itemsize: int) -> dict[str, int]:
    """Whole rows of W, whose numbers have so many bytes, and as many at a time as fit the registers."""
    columns = triton.next_power_of_2(max(d_in, 16))
    warps = max(4, row_warps(d_in))
    at_a_time = (4 if itemsize == 4 else 2) * 128 * warps // columns
    return {"BLOCK_D": columns, "BLOCK_J": max(1, min(16, at_a_time)), "num_warps": warps}


def round_search(
    z: Tensor, weight: Tensor, r: Tensor, W: Tensor, epsilon: Tensor, opened: Tensor, features: Tensor, order: Tensor,
    starts: Tensor, *, correct: bool,
) -> Search:  # fmt: skip
    """z, weight [n_entries] float32 and opened [n_entries] bool of entries of any order; features [n_entries]; order
    [n_entries] sorts them by token, whose first is starts [n_tokens + 1]; r [n_tokens, d_in], W [n_features, d_in] of
    any dtype; epsilon: one number."""
    _check(z, r, W, starts)
    y, c, alpha = torch.empty_like(z), torch.zeros_like(z), z.new_empty(len(r))
    e, m, after = (z.new_empty(r.shape) for _ in range(3))
    raw = torch.empty_like(z) if correct else z.new_empty(0)
    if len(r) > 0:
        with launching_on(z):
            round_search_kernel[(len(r),)](
                r.contiguous(), W.contiguous(), z, weight, opened.view(torch.uint8), features, order, starts, epsilon,
                y, c, e, m, after, alpha, raw, r.shape[1], CORRECT=correct, **tile(r.shape[1], W.element_size()),
            )  # fmt: skip
    return Search(y, c, e, m, after, alpha, raw)


def round_search_back(
    found: Search, weight: Tensor, W: Tensor, epsilon: Tensor, opened: Tensor, features: Tensor, order: Tensor,
    starts: Tensor, dy: Tensor, dafter: Tensor | None, draw: Tensor | None,
) -> SearchGrads:  # fmt: skip
    """Returns the gradients of `round_search`. dy, draw [n_entries] and dafter [n_tokens, d_in]: float32, None where
    they are zero."""
    _check(dy, found.e, W, starts)
    dz, dweight, dc = torch.empty_like(dy), torch.zeros_like(dy), torch.zeros_like(dy)
    de, dm, depsilon = torch.empty_like(found.e), torch.empty_like(found.e), torch.empty_like(found.alpha)
    if len(de) > 0:
        with launching_on(dy):
            round_search_back_kernel[(len(de),)](
                W.contiguous(), weight, opened.view(torch.uint8), found.c, found.e, found.m, found.alpha, epsilon, dy,
                found.e if dafter is None else dafter, dy if draw is None else draw, features, order, starts, dz,
                dweight, dc, de, dm, depsilon, de.shape[1], HAS_DAFTER=dafter is not None, HAS_DRAW=draw is not None,
                **tile(de.shape[1], W.element_size()),
            )  # fmt: skip
    return SearchGrads(dz, dweight, dc, de, dm, depsilon)


def _check(values: Tensor, rows: Tensor, W: Tensor, starts: Tensor) -> None:
    if rows.shape[1] != W.shape[1] or len(starts) != len(rows) + 1 or rows.shape[1] > SEARCH_COLUMNS:
        raise ValueError(
            f"rows {tuple(rows.shape)}, W {tuple(W.shape)} and starts {tuple(starts.shape)} do not fit: [n, d_in], "
            f"[d_sae, d_in] and [n + 1] are wanted, and d_in of at most {SEARCH_COLUMNS}"
        )
    if values.dtype != torch.float32:
        raise ValueError(f"values are {values.dtype}; float32 is wanted")
