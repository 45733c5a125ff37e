"""Sums across processes that hold the features of one SAE between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Across(NamedTuple):
    """How a part of an SAE works with the others.

    Attributes:
        sum: adds up a tensor over the processes, in place, and returns it. first: whether this process is the one
            that adds b_dec, and takes its gradient through the decoder.
    """

    sum: Callable[[Tensor], Tensor]
    first: bool


class _Sum(torch.autograd.Function):
    """Every process goes on with the same sum, so that each part's gradient is that of the sum."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, across: Across) -> Tensor:
        return across.sum(part.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def decode_across(feature_acts: Tensor, W_dec: Tensor, b_dec: Tensor, across: Across) -> Tensor:
    """Codes [..., part of d_sae] -> the whole reconstruction [..., d_in], added up in float32 at least."""
    part = feature_acts @ W_dec
    part = part.to(torch.promote_types(part.dtype, torch.float32))
    return _Sum.apply(part + b_dec if across.first else part, across)


class _Part(torch.autograd.Function):
    """What all processes hold alike goes into each one's own part: its gradient is the sum over the parts."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, across: Across) -> Tensor:
        ctx.across = across
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.across.sum(grads[0].clone(memory_format=torch.contiguous_format)), None


def sum_of(part: Tensor, across: Across | None) -> Tensor:
    """The sum of all processes' parts, on every process; `part` itself where there is one."""
    return part if across is None else _Sum.apply(part, across)


def part_of(whole: Tensor, across: Across | None) -> Tensor:
    """A tensor that all processes hold alike, where each goes on by itself until the next `sum_of`."""
    return whole if across is None else _Part.apply(whole, across)
