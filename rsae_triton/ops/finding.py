"""Finds the entries of a sparse code: computes the dense product in blocks, and keeps what matters of each.

A block of features stays in the cache until its entries are found, and is then discarded. How the product is computed
and a block searched depends on the machine and the shapes alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from rsae_triton.ops import entry_loops as loops
from rsae_triton.ops import native
from rsae_triton.ops.backends import kernels
from rsae_triton.ops.encode import product_dtype
from rsae_triton.ops.entries import Entries
from rsae_triton.ops.products import bfloat16_products, rows_by_tokens

BLOCK = 1024
"""Number of features in a block."""
MANY = 1 / 40
"""If candidates make up more than this fraction of the places so far, bfloat16 saves nothing. The first block is small,
to find out early."""
WORTH = 2**17
"""Number of places of a block from which another thread pays."""


@torch.no_grad()
def find_entries(
    x_c: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    low: Tensor,
    *,
    most: int | None = None,
    dtype: torch.dtype | None = None,
    screened: bool = False,
) -> Entries | None:
    """Finds the places where h = x_c @ W_enc + b_enc exceeds low [d_sae], or is NaN, without an [n_tokens, d_sae]
    tensor.

    Args:
        x_c: [n_tokens, d_in]. W_enc: [d_in, d_sae], fastest with contiguous columns.
        most: return None as soon as there are more entries than this.
        dtype: of the product; that of x_c, or of autocast, when None.
        screened: compute the product in bfloat16, and h again in float32 wherever rounding may hide an entry. The
            entries are the same up to rounding. Ignored where `can_screen` says no.
    """
    dtype = product_dtype(x_c) if dtype is None else dtype
    exact = torch.promote_types(dtype, torch.float32)
    n, b_enc, low = len(x_c), b_enc.to(exact).contiguous(), low.to(exact).contiguous()
    compiled = x_c.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and native.library() is not None
    weights = (x_c, W_enc, b_enc, low)
    if compiled and n > 0:
        screens = _Screens(x_c) if screened and can_screen(x_c, dtype) else None
        found = _scanned(*weights, dtype, screens, most)
    else:
        found = _compared(*weights, dtype, most)
    if found is None:
        return None
    parts, counts = found
    tokens, features, values = (torch.cat(one) for one in zip(*parts, strict=True))
    return Entries(tokens, features, values, pad(counts.cumsum(0), (1, 0)), n)


@torch.no_grad()
def find_by_kernels(
    x_c: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, width: Tensor, dtype: torch.dtype
) -> Entries:
    """Does what `find_entries` does with the Triton kernels, for low = threshold - width; waits once, for the number
    of entries.

    The kernels' support has a margin for rounding, so that it may hold a few entries just below low.
    """
    device = kernels()
    h = torch.mm(W_enc.t().to(dtype), x_c.to(dtype).t())
    marks = device.support_mark(h, threshold, width, b_enc)
    size = int(marks.in_support.sum())
    tokens, features, values, offsets = device.list_entries(h, marks, max(size, 1))
    return Entries(tokens[:size].long(), features[:size].long(), values[:size], offsets, len(x_c))


Found = tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]
"""Lists of tokens, features and values in order, and the number of entries of each feature."""


def _compared(
    x_c: Tensor, W_enc: Tensor, b_enc: Tensor, low: Tensor, dtype: torch.dtype, most: int | None
) -> Found | None:
    """Finds entries by PyTorch's operations."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    counts = torch.zeros(len(low), dtype=torch.int64, device=low.device)
    for first, h in _blocks(x_c, W_enc, dtype):
        own = slice(first, first + len(h))
        h = h.to(low.dtype).add_(b_enc[own, None])
        flat = (~(h <= low[own, None])).view(-1).nonzero().squeeze(1)
        features = flat // max(len(x_c), 1)
        counts[own] = torch.bincount(features, minlength=len(h))
        parts.append((flat - features * len(x_c), features + first, h.view(-1)[flat]))
        if most is not None and sum(len(one[0]) for one in parts) > most:
            return None
    return parts, counts


def _scanned(
    x_c: Tensor, W_enc: Tensor, b_enc: Tensor, low: Tensor, dtype: torch.dtype, screens: _Screens | None,
    most: int | None,
) -> Found | None:  # fmt: skip
    """Finds entries by the compiled loops; each thread scans its part of every block."""
    threads = max(1, min(torch.get_num_threads(), len(x_c) * min(BLOCK, len(low)) // WORTH))
    room = len(x_c) * len(low) // 64 // threads
    growing = [loops.Growing(low.new_empty(0), room) for _ in range(threads)]
    counts = torch.zeros(len(low), dtype=torch.int64)
    taken: list[tuple[loops.Growing, int, int]] = []
    for first, h in _blocks(x_c, W_enc, dtype, screens):

        def scan(k: int, h: Tensor = h, first: int = first) -> tuple[loops.Growing, int, int]:
            rows = slice(len(h) * k // threads, len(h) * (k + 1) // threads)
            own = slice(first + rows.start, first + rows.stop)
            before = growing[k].used
            if rows.start < rows.stop:
                screen = screens.of(rows) if screens is not None and screens.on else None
                growing[k].scan(h[rows], b_enc[own], low[own], own.start, counts[own], screen)
            return growing[k], before, growing[k].used

        taken += native.each(threads, scan)
        if screens is not None and screens.on:
            screens.on = sum(one.candidates for one in growing) <= MANY * (first + len(h)) * len(x_c)
        if most is not None and sum(one.used for one in growing) > most:
            return None
    return [one.taken(start, stop) for one, start, stop in taken], counts


@torch.no_grad()
def find_largest(
    x_c: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, least: float = -math.inf, dtype: torch.dtype | None = None
) -> Entries | None:
    """Finds the k largest h of every token that exceed `least`; among equal ones, the lowest features. None if one is
    NaN."""
    dtype = product_dtype(x_c) if dtype is None else dtype
    exact = torch.promote_types(dtype, torch.float32)
    n, d_sae = len(x_c), W_enc.shape[1]
    largest = loops.Largest(n, min(k, d_sae), least, x_c.new_empty(0, dtype=exact))
    bias = b_enc.to(exact)
    for first, h in _blocks(x_c, W_enc, dtype):
        largest.take(h.to(exact), bias[first : first + len(h)], first)
        if largest.nan:
            return None
    places = (largest.features >= 0).view(-1).nonzero().squeeze(1)
    return _sorted(places // max(min(k, d_sae), 1), largest.features.view(-1)[places], largest.values.view(-1)[places],
                   d_sae, n)  # fmt: skip


@torch.no_grad()
def find_most(
    x_c: Tensor, W_enc: Tensor, b_enc: Tensor, count: int, *, dtype: torch.dtype | None = None
) -> tuple[Entries, Tensor] | None:
    """Finds the `count` largest relu(h) of all tokens together, including all that equal the last one, and returns them
    with the last one; None if an h is NaN. Only entries above 0 are returned."""
    dtype = product_dtype(x_c) if dtype is None else dtype
    exact = torch.promote_types(dtype, torch.float32)
    n, d_sae, zero = len(x_c), W_enc.shape[1], x_c.new_zeros((), dtype=exact)
    bias, floor = b_enc.to(exact), zero
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    total = 0
    for first, h in _blocks(x_c, W_enc, dtype):
        h = h.to(exact).add_(bias[first : first + len(h), None])
        if bool(h.sum().isnan()):  # also for two opposite infinities, which no code contains
            return None
        if first == 0 and h.numel() > count:
            floor = h.view(-1).topk(count, sorted=False).values.min().clamp_min(0)
        flat = ((h >= floor) & (h > 0)).view(-1).nonzero().squeeze(1)
        found.append((flat % max(n, 1), flat // max(n, 1) + first, h.view(-1)[flat]))
        total += len(flat)
        if total > 2 * count:
            found, floor = _cut(found, count)
            total = len(found[0][0])
    if total >= count:
        found, floor = _cut(found, count)
    else:
        floor = zero
    tokens, features, values = (torch.cat(one) for one in zip(*found, strict=True))
    return Entries(tokens, features, values, loops.offsets_of(features, d_sae), n), floor


def _cut(found: list[tuple[Tensor, Tensor, Tensor]], count: int) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
    tokens, features, values = (torch.cat(one) for one in zip(*found, strict=True))
    floor = values.topk(count, sorted=False).values.min()
    keep = (values >= floor).nonzero().squeeze(1)
    return [(tokens[keep], features[keep], values[keep])], floor


def _sorted(tokens: Tensor, features: Tensor, values: Tensor, d_sae: int, n_tokens: int) -> Entries:
    """Makes entries from places that are sorted by token."""
    features, order = features.sort(stable=True)
    return Entries(tokens[order], features, values[order], loops.offsets_of(features, d_sae), n_tokens)


def _blocks(
    x_c: Tensor, W_enc: Tensor, dtype: torch.dtype, screens: _Screens | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Yields the first feature of each block and the block's h - b_enc, [features, n_tokens]; the next block may
    overwrite it."""
    weights, x = W_enc.t(), x_c.to(dtype).contiguous()
    space = x.new_empty((min(BLOCK, len(weights)), len(x)))
    first = 0
    while first < len(weights):
        size = BLOCK // 8 if first == 0 and screens is not None else BLOCK
        with torch.autocast(x.device.type, enabled=False):
            block = weights[first : first + size].to(dtype)
            screened = screens is not None and screens.on
            h = screens.product(block) if screened else rows_by_tokens(block, x, space[: len(block)])  # type: ignore[union-attr]
        yield first, h
        first += len(block)


class _Screens:
    """The product in bfloat16, and a bound of its error; `on` until there are too many candidates."""

    on = True

    def __init__(self, x: Tensor) -> None:
        self._x = x.contiguous()
        self._rounded, _, errors = loops.rounded_rows(self._x)
        self._lengths = torch.linalg.vector_norm(self._x, dim=1)
        # |rounded product - product| <= |dx| |w'| + |x| |dw|, plus the error of two sums of d_in terms in float32.
        self._share = float((errors / self._lengths).nan_to_num(0, 0, 0).max()) if len(x) else 0.0
        self._sums = (x.shape[1] + 2) * 2.0**-22
        self._screen: loops.Screen | None = None

    def product(self, weights: Tensor) -> Tensor:
        weights = weights.contiguous()
        rounded, lengths, errors = loops.rounded_rows(weights)
        margin = (lengths * (self._share + self._sums) + errors).mul_(1 + 2.0**-12)
        self._screen = loops.Screen(margin, self._lengths, self._x, weights)
        return torch.mm(rounded, self._rounded.t())

    def of(self, rows: slice) -> loops.Screen:
        assert self._screen is not None
        margin, lengths, x, weights = self._screen
        return loops.Screen(margin[rows], lengths, x, weights[rows])


def can_screen(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a product can be screened: float32 on a CPU with bfloat16 products in hardware, and a compiler."""
    return (
        x.device.type == "cpu"
        and x.dtype == dtype == torch.float32
        and bfloat16_products()
        and native.library() is not None
    )
