"""Dispatch modes that count what operators do: bytes alive at once, bytes read and written."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make while it is on (this thread only).

    Attributes:
        peak: most bytes alive at once. largest: elements of the largest single tensor made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._owners: dict[int, int] = {}
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        self._known |= given - self._owners.keys()
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor):
                self._own(one)
        return out

    def _own(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        if key not in self._owners:
            self._owners[key] = 0
            self.live += size
            self.peak = max(self.peak, self.live)
            self.largest = max(self.largest, size // tensor.element_size())
        self._owners[key] += 1
        weakref.finalize(tensor, self._end, key, size)

    def _end(self, key: int, size: int) -> None:
        self._owners[key] -= 1
        if not self._owners[key]:
            del self._owners[key]
            self.live -= size


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write, matrix products apart; an expanded tensor counts what it holds.

    Attributes:
        pointwise, products: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pointwise = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        is_view = any(one.alias_info and not one.alias_info.is_write for one in func._schema.arguments)
        if is_view or name in ("_unsafe_view", "detach") or name.startswith(("empty", "new_empty")):
            return out
        tensors = [one for one in tree_leaves((args, kwargs, out)) if isinstance(one, torch.Tensor)]
        moved = sum(min(one.untyped_storage().nbytes(), one.numel() * one.element_size()) for one in tensors)
        if name in ("mm", "addmm"):
            self.products += moved
        else:
            self.pointwise += moved
        return out
