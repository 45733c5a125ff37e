"""Memory that is reused, because new memory costs a CPU a page fault every 1024 numbers."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar, Token
from typing import Any

import torch
from torch import Tensor, nn


class Workspace:
    """Memory for the pieces of one loss, by name."""

    def __init__(self) -> None:
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, int], like: Tensor) -> Tensor:
        """Returns a contiguous tensor of this shape, in the dtype and on the device of `like`, with arbitrary
        content."""
        size = shape[0] * shape[1]
        one = self._flat.get(name)
        if one is None or one.numel() < size or one.dtype != like.dtype or one.device != like.device:
            self._flat.pop(name, None)
            self._flat[name] = like.new_empty(size)
        return self._flat[name][:size].view(shape)


class StepMemory:
    """Memory that the training steps of a loop pass on to the next on the CPU: that of the pieces of
    `rational_autoencode`, and that of the last step's gradients of W_enc and W_dec. It saves a twentieth of a step.

        memory = StepMemory()
        memory.zero_grad(sae.parameters())      # the gradients' content is lost, whoever else may hold them
        with memory:
            loss = sae.autoencode(x, chunk_tokens=512).total
        loss.backward()
    """

    def __init__(self) -> None:
        self.space = Workspace()
        self._spare: list[Tensor] = []
        self._token: Token[StepMemory | None] | None = None

    def zero_grad(self, parameters: Iterable[nn.Parameter], keep: bool = True) -> None:
        """Sets all gradients to None. keep: the next step inside `with` reuses the memory of the matrices'
        gradients."""
        self._spare = []
        for one in parameters:
            if keep and (grad := one.grad) is not None and _reusable(grad):
                self._spare.append(grad)
            one.grad = None

    def __enter__(self) -> StepMemory:
        self._token = _current.set(self)
        return self

    def __exit__(self, *_: Any) -> None:
        assert self._token is not None
        _current.reset(self._token)
        self._spare = []

    def gradient(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory of this shape and layout: returned by the last step, or new."""
        for place, one in enumerate(self._spare):
            if (one.shape, one.stride(), one.dtype, one.device) == (like.shape, like.stride(), dtype, like.device):
                return self._spare.pop(place)
        return torch.empty_like(like, dtype=dtype)


_current: ContextVar[StepMemory | None] = ContextVar("step_memory", default=None)


def current() -> StepMemory:
    """The memory of the surrounding `with`, or one for this step alone."""
    return _current.get() or StepMemory()


def _reusable(grad: Tensor) -> bool:
    if type(grad) is not Tensor or grad.device.type != "cpu":
        return False
    return grad.dim() == 2 and (grad.is_contiguous() or grad.t().is_contiguous()) and not grad._is_view()
