"""Names of the variants that `aot` compiles: kernels as they would be launched, for the tables and the record."""

from __future__ import annotations

from typing import NamedTuple

import torch

ARCHS = (80, 90, 100)
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
PRODUCTS = ("encode_forward", "encode_backward", "sparse_encode")
"""Kernels whose machine code must use the tensor cores."""
NO_GATE = (
    "gather_rows", "keep_largest", "sparse_decode", "sparse_dots", "segment_sum", "support_mark", "list_entries",
    "count_rows", "list_rows", "support_decode", "entry_dots", "long_runs", "feature_sums", "row_norms", "adam_rows",
    "remove_radial", "narrow_rows", "block_sums", "totals", "threshold_forward", "threshold_backward", "round_search",
    "round_search_back",
)  # fmt: skip


class Variant(NamedTuple):
    """A kernel as it would be launched: for which GPU, in which dtype, and with which gate (if it has one)."""

    kernel: str
    arch: int
    dtype: torch.dtype
    p: int = 0
    q: int = 0
    shared: bool = True
    gated: bool = False
    precision: str = "tf32"
    ragged: bool = False
    """True: the number of tokens is not a multiple of 16, so codes cannot be stored 16 bytes at a time."""
    ranked: bool = False
    """The top-k variant of the sparse kernels: codes in float32."""
    frozen: bool = False
    """A backward pass without gradients of the coefficients."""
    sized: bool = False
    """Sums of given sizes instead of |z|."""
    together: bool = False
    """The two matrices' sums added up in one, as for the rounds' gradients."""

    screen: str = ""
    """The variants of a screened product: "first" (to find candidates) and "second" (to decide)."""

    def __str__(self) -> str:
        words = [NAMES[self.dtype]]
        if self.dtype == torch.float32 and self.kernel in PRODUCTS:
            words.append(self.precision)
        if self.kernel not in NO_GATE:
            words += ["gated" if self.gated else "direct", f"({self.p}, {self.q})"]
            words.append("shared" if self.shared else "per feature")
        words += ["ragged"] * self.ragged + ["top-k"] * self.ranked
        words += [f"screen, {self.screen}"] * bool(self.screen)
        return " ".join(words + ["frozen"] * self.frozen + ["sized"] * self.sized + ["together"] * self.together)

    @property
    def key(self) -> str:
        return f"{self.kernel} sm_{self.arch} {self}"
