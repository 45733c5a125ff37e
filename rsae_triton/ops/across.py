"""Sums across the processes that share the features of one SAE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Across(NamedTuple):
    """How a part of an SAE works with the other parts.

    Attributes:
        sum: adds up a tensor over the processes, in place, and returns it. first: whether this is the process that adds
            b_dec and computes its gradient through the decoder.
    """

    sum: Callable[[Tensor], Tensor]
    first: bool


class _Sum(torch.autograd.Function):
    """All processes continue with the same sum, so the gradient of each part is that of the sum."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, across: Across) -> Tensor:
        return across.sum(part.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def decode_across(feature_acts: Tensor, W_dec: Tensor, b_dec: Tensor, across: Across) -> Tensor:
    """Decodes codes [..., part of d_sae] to the whole reconstruction [..., d_in], summed in at least float32."""
    part = feature_acts @ W_dec
    part = part.to(torch.promote_types(part.dtype, torch.float32))
    return _Sum.apply(part + b_dec if across.first else part, across)


class _Part(torch.autograd.Function):
    """The input is the same on all processes, and each uses it for its own part, so its gradient is the sum over the
    parts."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, across: Across) -> Tensor:
        ctx.across = across
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.across.sum(grads[0].clone(memory_format=torch.contiguous_format)), None


def sum_of(part: Tensor, across: Across | None) -> Tensor:
    """Returns the sum of all processes' parts, on every process; `part` itself if there is only one."""
    return part if across is None else _Sum.apply(part, across)


def part_of(whole: Tensor, across: Across | None) -> Tensor:
    """Passes on a tensor that is the same on all processes, each of which continues alone until the next `sum_of`."""
    return whole if across is None else _Part.apply(whole, across)
