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
