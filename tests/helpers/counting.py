"""Dispatch modes that count what operators do: bytes alive at once, bytes read and written, launches."""

from __future__ import annotations

import weakref
from collections import defaultdict

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


class Launches(TorchDispatchMode):
    """Counts what a GPU would run, with Triton's kernels in the interpreter.

    Attributes:
        operators, moved: of PyTorch's operators that are no views, how many, and the bytes that they read and write
            (what new tensors are filled like is not read). launched: how often each kernel ran. gathered, flat:
            {kernel: bytes} of two-dimensional loads, and of everything else that it reads and writes.
    """

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.operators, self.moved = 0, 0
        self.launched, self.gathered, self.flat = defaultdict(int), defaultdict(float), defaultdict(float)
        self._kernel = None
        from triton.runtime import interpreter

        builder, run = interpreter.InterpreterBuilder, interpreter.GridExecutor.__call__
        load, store = builder.create_masked_load, builder.create_masked_store

        def loaded(own, ptrs, mask, *rest):
            found = load(own, ptrs, mask, *rest)
            kind = self.gathered if mask.data.ndim == 2 and mask.data.shape[-1] > 1 else self.flat
            kind[self._kernel] += float(mask.data.sum()) * found.data.dtype.itemsize
            return found

        def stored(own, ptrs, value, mask, *rest):
            self.flat[self._kernel] += float(mask.data.sum()) * value.data.dtype.itemsize
            return store(own, ptrs, value, mask, *rest)

        def launch(own, *args, **kwargs):
            self._kernel = own.fn.__name__.removesuffix("_kernel")
            self.launched[self._kernel] += 1
            try:
                return run(own, *args, **kwargs)
            finally:
                self._kernel = None

        monkeypatch.setattr(builder, "create_masked_load", loaded)
        monkeypatch.setattr(builder, "create_masked_store", stored)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        is_view = any(one.alias_info and not one.alias_info.is_write for one in func._schema.arguments)
        skipped = ("_unsafe_view", "detach", "_local_scalar_dense", "promote_types")
        if self._kernel or is_view or name in skipped or name.startswith(("empty", "new_empty")):
            return out
        made = name.startswith("new_") or name.endswith("_like")
        kwargs = {key: one for key, one in (kwargs or {}).items() if key != "out"}  # it is what they return
        tensors = [one for one in tree_leaves(out if made else (args, kwargs, out)) if isinstance(one, torch.Tensor)]
        self.operators += 1
        self.moved += sum(min(one.untyped_storage().nbytes(), one.numel() * one.element_size()) for one in tensors)
        return out
