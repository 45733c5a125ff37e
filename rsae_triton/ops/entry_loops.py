"""Loops over entries, by PyTorch's operations (any device, any dtype) or in C++ (float32 on the CPU, native.py).

Both give the same results up to rounding. Entries are sorted by feature, then token; `offsets` [d_sae + 1] are the
start of each feature's entries. Matrices have one row per token or per feature.
"""

from __future__ import annotations

import ctypes
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from rsae_triton.ops import native
from rsae_triton.ops.backends import kernels
from rsae_triton.ops.native import address, integer

CHUNK = 2**22
"""How many numbers are gathered at a time, where no library function avoids gathering."""
LEAST = 1024
"""Number of entries or rows from which another thread pays."""


class Screen(NamedTuple):
    """Data for checking a product in bfloat16: the error bound margin[row] * lengths[token], and what h is recomputed
    from, x [n_tokens, d_in] and the weights of the rows, in float32."""

    margin: Tensor
    lengths: Tensor
    x: Tensor
    weights: Tensor

    def pointers(self) -> tuple[Any, ...]:
        return *(address(one) for one in self), integer(self.x.shape[1])


def rounded_rows(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns rows rounded to bfloat16, the norm of each rounded row, and the norm of its rounding error."""
    library = native.library()
    assert library is not None
    out, sizes = torch.empty_like(weights, dtype=torch.bfloat16), weights.new_empty(2, len(weights))
    native.split(len(weights), lambda start, stop: library.round_rows(
        address(weights[start:stop]), integer(stop - start), integer(weights.shape[1]), address(out[start:stop]),
        address(sizes[0, start:stop]), address(sizes[1, start:stop]),
    ), LEAST)  # fmt: skip
    return out, sizes[0], sizes[1]


class Growing:
    """Collects entries as they are found, in memory that grows."""

    def __init__(self, like: Tensor, capacity: int) -> None:
        self._like, self._capacity, self.used, self.candidates = like, max(capacity, 1024), 0, 0
        self._parts = self._memory()

    def _memory(self) -> tuple[Tensor, ...]:
        index = self._like.new_empty((2, self._capacity), dtype=torch.int64)
        return index[0], index[1], self._like.new_empty(self._capacity, dtype=torch.float32)

    def scan(
        self, h: Tensor, bias: Tensor, low: Tensor, first: int, counts: Tensor, screen: Screen | None = None
    ) -> None:
        """Takes what is above `low` in h [rows, n_tokens] (float32 or bfloat16), for the features from `first` on. With
        `screen`, h is in bfloat16 and is recomputed where it may be above."""
        library = native.library()
        assert library is not None
        name = "screen" if screen else "find_float" if h.dtype == torch.float32 else "find_bfloat16"
        again = () if screen is None else screen.pointers()
        while True:
            free = self._capacity - self.used
            places = [ctypes.c_void_p(one.data_ptr() + self.used * one.element_size()) for one in self._parts]
            tried = ctypes.c_int64(0)
            found = getattr(library, name)(
                address(h), integer(len(h)), integer(h.shape[1]), integer(h.stride(0)), address(bias), address(low),
                *again, integer(first), *places, address(counts), integer(free),
                *([] if screen is None else [ctypes.byref(tried)]),
            )  # fmt: skip
            if found <= free:
                self.used += found
                self.candidates += tried.value
                return
            self._capacity = max(2 * self._capacity, self.used + found)
            old, self._parts = self._parts, self._memory()
            for one, before in zip(self._parts, old, strict=True):
                one[: self.used] = before[: self.used]

    def taken(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        tokens, features, values = (one[start:stop] for one in self._parts)
        return tokens, features, values


class Largest:
    """The k largest pre-activations of every token, updated block of features by block.

    least: what a value must exceed. If a token has fewer than k such values, its other places stay empty (feature -1).
    """

    def __init__(self, n_tokens: int, k: int, least: float, like: Tensor) -> None:
        self.values = like.new_full((n_tokens, k), least)
        self.features = torch.full((n_tokens, k), -1, dtype=torch.int64, device=like.device)
        self.floor = like.new_full((n_tokens,), least)
        self.nan = False

    def take(self, h: Tensor, bias: Tensor, first: int) -> None:
        """Takes h [rows, n_tokens], without bias, for the features from `first` on."""
        n_tokens, k = self.values.shape
        if native.usable(h, self.floor):
            library = native.library()
            assert library is not None
            bad = native.split(n_tokens, lambda start, stop: library.top_k(
                address(h), integer(len(h)), integer(n_tokens), integer(h.stride(0)), address(bias), integer(first),
                integer(k), address(self.floor), address(self.values), address(self.features), integer(start),
                integer(stop),
            ), 64)  # fmt: skip
            self.nan |= any(bad)
            return
        values = (h + bias[:, None]).t()
        self.nan |= bool(values.isnan().any())
        features = torch.arange(first, first + len(h), device=h.device).expand(n_tokens, -1)
        # Earlier features come first: among equal values, a stable sort then keeps the lowest feature.
        both = torch.cat([self.values, torch.where(values > self.floor[:, None], values, -torch.inf)], 1)
        order = both.sort(dim=1, descending=True, stable=True).indices[:, :k]
        self.values = both.gather(1, order)
        self.features = torch.cat([self.features, features], 1).gather(1, order)
        self.floor = self.values[:, -1].contiguous()


def decode(values: Tensor, tokens: Tensor, features: Tensor, n_tokens: int, W: Tensor) -> Tensor:
    """Sums value * W[feature] over each token's entries, [n_tokens, d]."""
    if native.usable(values, W):
        out = W.new_zeros(n_tokens, W.shape[1])
        # Each thread takes some columns, so entries are added in order, whatever the number of threads.
        native.split(W.shape[1], lambda start, stop: native.library().decode(  # type: ignore[union-attr]
            address(values), address(tokens), address(features), integer(len(values)), address(W),
            integer(W.shape[1]), address(out), integer(start), integer(stop),
        ), 64)  # fmt: skip
        return out
    dtype = torch.promote_types(values.dtype, W.dtype)
    tokens, order = tokens.sort(stable=True)
    starts = offsets_of(tokens, n_tokens)
    return embedding_bag(
        features[order], W.to(dtype), starts, mode="sum",
        per_sample_weights=values[order].to(dtype), include_last_offset=True,
    )  # fmt: skip


def dots(g: Tensor, tokens: Tensor, features: Tensor, offsets: Tensor, W: Tensor) -> Tensor:
    """Returns g[token] . W[feature] for every entry."""
    if native.usable(g, W):
        out = g.new_empty(len(tokens))
        native.split(len(tokens), lambda start, stop: native.library().dots(  # type: ignore[union-attr]
            address(g), address(tokens), address(features), address(W), integer(W.shape[1]), address(out),
            integer(start), integer(stop),
        ), LEAST)  # fmt: skip
        return out
    dtype = torch.promote_types(torch.promote_types(g.dtype, W.dtype), torch.float32)
    if g.device.type == "cpu" and dtype == g.dtype == W.dtype:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about compressed tensors being in beta
            pattern = torch.sparse_csr_tensor(
                offsets, tokens, g.new_zeros(len(tokens)), size=(len(W), len(g)), check_invariants=False
            )
            return torch.sparse.sampled_addmm(pattern, W, g.t(), beta=0.0).values()
    step = max(1, CHUNK // max(W.shape[1], 1))
    parts = [
        (g[t].to(dtype) * W[f].to(dtype)).sum(1) for t, f in zip(tokens.split(step), features.split(step), strict=True)
    ]
    return torch.cat(parts) if parts else g.new_zeros(0, dtype=dtype)


def rows(
    terms: list[tuple[Tensor, Tensor]], tokens: Tensor, offsets: Tensor, out: Tensor, *, add: bool,
    by_kernel: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Sets out[f], or with `add` adds to it, the sum of value * g[token] over terms (values, g) and the entries of f.
    by_kernel: the entries' features, where a Triton kernel is to do it."""
    if not terms:
        return out if add else out.zero_()
    d = out.shape[1]
    if by_kernel is not None and all(one.dtype == torch.float32 for term in terms for one in term):
        return _rows_by_kernel(terms, tokens, by_kernel, offsets, out, add)
    if native.usable(out, *(one for term in terms for one in term)):
        pointers = ctypes.c_void_p * len(terms)
        values, g = (pointers(*(term[k].data_ptr() for term in terms)) for k in (0, 1))
        native.split(len(out), lambda start, stop: native.library().rows(  # type: ignore[union-attr]
            integer(len(terms)), values, g, address(tokens), address(offsets), integer(d), address(out),
            integer(int(add)), integer(start), integer(stop),
        ), LEAST)  # fmt: skip
        return out
    for values_of, rows_of in terms:
        dtype = torch.promote_types(values_of.dtype, rows_of.dtype)
        made = embedding_bag(
            tokens, rows_of.to(dtype), offsets, mode="sum",
            per_sample_weights=values_of.to(dtype), include_last_offset=True,
        )  # fmt: skip
        out = out.add_(made) if add else out.copy_(made)
        add = True
    return out


def _rows_by_kernel(
    terms: list[tuple[Tensor, Tensor]], tokens: Tensor, features: Tensor, offsets: Tensor, out: Tensor, add: bool
) -> Tensor:
    """Two terms in one pass over the entries."""
    for k in range(0, len(terms), 2):
        # An odd one out goes with zeros, for which no rows are read.
        (values, g), (others, rows_of) = terms[k], [*terms, (torch.zeros_like(terms[k][0]), terms[k][1])][k + 1]
        at = kernels().Entries(tokens, features, values, offsets)
        kernels().feature_sums(at, values, values, others, values, g, rows_of, into=out, add=add or k > 0)
    return out


def sums(values: Tensor, offsets: Tensor) -> Tensor:
    """Sums each feature's values in order, [d_sae], so that the result is the same every time."""
    return torch.segment_reduce(values, "sum", offsets=offsets, initial=0)


def offsets_of(sorted_ids: Tensor, length: int) -> Tensor:
    """Returns where each of `length` ids begins in a sorted list of ids, and the end: [length + 1]."""
    offsets = sorted_ids.new_zeros(length + 1)
    torch.cumsum(torch.bincount(sorted_ids, minlength=length), 0, out=offsets[1:])
    return offsets
