"""The gate of ReLU, JumpReLU and TopK SAEs at the entries of a support: codes in the forward pass, gradients in the
backward pass, in float32.

A code is h where h exceeds a threshold. A JumpReLU's threshold is trained through a rectangle of some width around it
(arXiv:2407.14435); the others' has no gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import entry_programs
from .launch import launching_on
from .support_list import Entries

BLOCK = 256
"""Number of entries that a program takes at a time."""


class Slopes(NamedTuple):
    """Gradients of entries, [capacity] float32: dh with respect to h; dtheta, the part of each entry in its threshold's
    gradient, through the rectangle.

    sizes and bounded belong to the bounded penalty sum tanh(4 |z| norm), and are None without it: sizes [capacity] = 4
    |z| (1 - tanh^2), its gradient with respect to the feature's norm, and `bounded`, the penalty of all entries
    together (a scalar).
    """

    dh: Tensor
    dtheta: Tensor
    sizes: Tensor | None
    bounded: Tensor | None


@triton.jit
def threshold_forward_kernel(
    values, tokens, features, offsets, z, dense, thresholds, n_features, n_tokens, capacity, BLOCK_E: tl.constexpr
):  # fmt: skip
    """Computes z [capacity] float32, and also writes it into dense [n_features, n_tokens] at the entry's place."""
    total = tl.minimum(tl.load(offsets + n_features), capacity)
    step = tl.num_programs(0).to(tl.int64) * BLOCK_E
    for e0 in range(tl.program_id(0).to(tl.int64) * BLOCK_E, total, step):
        e = e0 + tl.arange(0, BLOCK_E)
        mask = e < total
        f = tl.load(features + e, mask=mask, other=0).to(tl.int64)
        n = tl.load(tokens + e, mask=mask, other=0)
        h = tl.load(values + e, mask=mask, other=0.0)
        code = tl.where(h <= tl.load(thresholds + f, mask=mask, other=0.0), 0.0, h)  # written this way, NaN stays NaN
        tl.store(z + e, code, mask=mask)
        tl.store(dense + f * n_tokens + n, code.to(dense.dtype.element_ty), mask=mask)


@triton.jit
def threshold_backward_kernel(
    values, features, offsets, dz, norms, dh, dtheta, sizes, partial, thresholds,
    n_features, capacity, width, bounded, dcount, dl1,
    RECTANGLE: tl.constexpr, TO_H: tl.constexpr, HAS_DL1: tl.constexpr, BOUNDED: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Computes dh, dtheta, sizes [capacity] and partial [programs], each program's sum of tanh. width: of the rectangle
    (RECTANGLE). TO_H: h gets the rectangle's gradient too. bounded: multiplies the sum of tanh (BOUNDED)."""
    total = tl.minimum(tl.load(offsets + n_features), capacity)
    step = tl.num_programs(0).to(tl.int64) * BLOCK_E
    penalty = tl.zeros((BLOCK_E,), tl.float32)
    for e0 in range(tl.program_id(0).to(tl.int64) * BLOCK_E, total, step):
        e = e0 + tl.arange(0, BLOCK_E)
        mask = e < total
        f = tl.load(features + e, mask=mask, other=0).to(tl.int64)
        h = tl.load(values + e, mask=mask, other=0.0)
        g = tl.load(dz + e, mask=mask, other=0.0)
        theta = tl.load(thresholds + f, mask=mask, other=0.0)
        on = mask & ~(h <= theta)
        sign = tl.where(h > 0.0, 1.0, tl.where(h < 0.0, -1.0, 0.0))
        if HAS_DL1 or BOUNDED:
            norm = tl.load(norms + f, mask=mask, other=0.0)
        if HAS_DL1:
            g += tl.where(on, dl1 * norm * sign, 0.0)
        if BOUNDED:
            small = tl.exp(-8.0 * tl.abs(h) * norm)
            rest = 4.0 * small / ((1.0 + small) * (1.0 + small))  # 1 - tanh^2
            g += tl.where(on, bounded * 4.0 * norm * rest * sign, 0.0)
            tl.store(sizes + e, tl.where(on, 4.0 * tl.abs(h) * rest, 0.0), mask=mask)
            penalty += tl.where(on, (1.0 - small) / (1.0 + small), 0.0)
        by_t = tl.zeros_like(h)
        if RECTANGLE:
            by_t = tl.where(tl.abs(h - theta) < 0.5 * width, (g * h + dcount) / width, 0.0)
        by_h = tl.where(on, g, 0.0)
        if TO_H:
            by_h += by_t
        tl.store(dh + e, by_h, mask=mask)
        tl.store(dtheta + e, -by_t, mask=mask)
    if BOUNDED:
        tl.store(partial + tl.program_id(0), tl.sum(penalty))


def threshold_forward(entries: Entries, thresholds: Tensor, dense: Tensor) -> Tensor:
    """Computes the codes of the entries, [capacity] float32; thresholds [n_features] float32.

    dense [n_features, n_tokens]: memory that also receives the codes, in its dtype, at the entries' places only.
    """
    _check(entries, thresholds)
    z = torch.empty_like(entries.values)
    if len(z) > 0:
        with launching_on(z):
            threshold_forward_kernel[(entry_programs(len(z), BLOCK),)](
                entries.values, entries.tokens, entries.features, entries.offsets, z, dense, thresholds,
                *dense.shape, len(z), BLOCK_E=BLOCK, num_warps=4, num_stages=1,
            )  # fmt: skip
    return z


def threshold_backward(
    entries: Entries,
    thresholds: Tensor,
    dz: Tensor,
    dcount: float,
    dl1: float,
    norms: Tensor | None,
    *,
    width: float = 0.0,
    to_h: bool = False,
    bounded: float = 0.0,
) -> Slopes:
    """Computes `Slopes` from dz [capacity] float32.

    Args:
        dcount, dl1, norms: see `entry_gate_backward`; `bounded` needs the norms too.
        width: of the rectangle; 0 if thresholds are not trained. to_h: whether its slope is also passed to h.
        bounded: the weight of the bounded penalty; 0 for none.
    """
    _check(entries, thresholds)
    if (bounded or dl1) and norms is None:
        raise ValueError("the penalty needs the norms of the features")
    dh, dtheta = torch.empty_like(dz), torch.empty_like(dz)
    sizes = torch.empty_like(dz) if bounded else dz
    programs = entry_programs(len(dz), BLOCK)
    partial = dz.new_zeros(max(programs, 1)) if bounded else dz
    if len(dz) > 0:
        with launching_on(dz):
            threshold_backward_kernel[(programs,)](
                entries.values, entries.features, entries.offsets, dz, dz if norms is None else norms, dh, dtheta,
                sizes, partial, thresholds, len(entries.offsets) - 1, len(dz), float(width), float(bounded),
                float(dcount), float(dl1), RECTANGLE=width > 0, TO_H=width > 0 and to_h, HAS_DL1=dl1 != 0,
                BOUNDED=bounded > 0, BLOCK_E=BLOCK, num_warps=4, num_stages=1,
            )  # fmt: skip
    return Slopes(dh, dtheta, *((sizes, partial.sum()) if bounded else (None, None)))


def _check(entries: Entries, thresholds: Tensor) -> None:
    if thresholds.shape != (len(entries.offsets) - 1,) or thresholds.dtype != torch.float32:
        raise ValueError(
            f"thresholds are {thresholds.dtype} {tuple(thresholds.shape)}, the entries of "
            f"{len(entries.offsets) - 1} features; one float32 number for each is wanted"
        )
