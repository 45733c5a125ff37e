"""Memory that is reused, because new memory costs a CPU a page fault every 1024 numbers."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar, Token
from typing import Any, NamedTuple

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


class Made(NamedTuple):
    """What a step knows of the gradients that it made: the squared norms of those of W_enc and W_dec, of the latter
    without its part along W_dec's rows (`radial` removed) and with it, and the dtype of the step's products."""

    encoder: Tensor
    without_radial: Tensor
    decoder: Tensor
    dtype: torch.dtype


class StepMemory:
    """What the training steps of a loop pass on to the next. On the CPU that is the memory of the pieces of
    `rational_autoencode`, and of the last step's gradients of W_enc and W_dec; it saves a twentieth of a step. On a GPU
    it is copies of the weights in the products' dtype, which the optimiser writes in its own pass, and the norms that
    it gave W_dec's rows.

        memory = StepMemory()
        memory.zero_grad(sae.parameters())      # the gradients' content is lost, whoever else may hold them
        with memory:
            loss = sae.autoencode(x, chunk_tokens=512).total
        loss.backward()

    Attributes:
        whole: the caller's promise that the loss itself is differentiated, not a multiple of it, so that gradients need
            not be scaled. made: what the last step knows of its gradients, if it made them on its support on a GPU.
        screen: how such a step screens its product (`screening.Screen`); None for a whole product.
    """

    def __init__(self) -> None:
        self.space = Workspace()
        self.whole = False
        self.made: Made | None = None
        self.screen: Any = None
        self._copies: dict[int, tuple[int, Tensor]] = {}
        self._norms: dict[int, tuple[int, Tensor]] = {}
        self._spare: list[Tensor] = []
        self._token: Token[StepMemory | None] | None = None

    def zero_grad(self, parameters: Iterable[nn.Parameter], keep: bool = True) -> None:
        """Sets all gradients to None. keep: the next step inside `with` reuses the memory of the matrices'
        gradients."""
        self._spare, self.made = [], None
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

    def cast(self, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns a matrix in this dtype: the optimiser's copy, if nothing has changed the matrix since."""
        version, copy = self._copies.get(_storage(matrix), (-1, matrix))
        if matrix.dtype == dtype or version != matrix._version or copy.dtype != dtype:
            return matrix.to(dtype)
        return copy if matrix.is_contiguous() else copy.t()

    def copy_for(self, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns memory for a copy of a matrix, or of its transpose if that is contiguous. The caller fills it when it
        writes the matrix, in a way that PyTorch does not count as a change."""
        rows = matrix.detach() if matrix.is_contiguous() else matrix.detach().t()
        _, copy = self._copies.get(_storage(matrix), (0, rows))
        copy = copy if copy.dtype == dtype else torch.empty_like(rows, dtype=dtype)
        self._copies[_storage(matrix)] = matrix._version, copy
        return copy

    def norms(self, matrix: Tensor) -> Tensor:
        """Returns the norms of a matrix's rows in float32; those of `know_norms`, if nothing has changed it since."""
        version, norms = self._norms.get(_storage(matrix), (-1, matrix))
        if version == matrix._version:
            return norms
        return torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float32)

    def know_norms(self, matrix: Tensor, norms: Tensor) -> None:
        """Says what the norms of a matrix's rows are, after a step that gave the rows these lengths."""
        self._norms[_storage(matrix)] = matrix._version, norms.flatten().float()


def _storage(matrix: Tensor) -> int:
    return matrix.untyped_storage()._cdata


_current: ContextVar[StepMemory | None] = ContextVar("step_memory", default=None)


def current() -> StepMemory:
    """The memory of the surrounding `with`, or one for this step alone."""
    return _current.get() or StepMemory()


def _reusable(grad: Tensor) -> bool:
    if type(grad) is not Tensor or grad.device.type != "cpu":
        return False
    return grad.dim() == 2 and (grad.is_contiguous() or grad.t().is_contiguous()) and not grad._is_view()
