"""Rounds the rows of a matrix to a narrow dtype, for a product that only finds candidates (`ops/screening.py`).

One pass: a row is read once and written once, and its norm, by which the product's error is bounded, comes with it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import MOST_COLUMNS, row_warps
from .launch import launching_on

LARGEST = {torch.float8_e4m3fn: 448.0}
"""The largest number of a dtype whose rows need a scale; bfloat16 has the range of float32."""


class Narrow(NamedTuple):
    """rows [n_rows, d_in] in the narrow dtype; scales, norms [n_rows] float32: what a row's products are multiplied by,
    and the norms of the rows before rounding."""

    rows: Tensor
    scales: Tensor
    norms: Tensor


@triton.jit
def narrow_rows_kernel(matrix, rows, scales, norms, d_in, largest, SCALED: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program: one row. If SCALED, its largest number becomes the dtype's `largest`."""
    f = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    value = tl.load(matrix + f * d_in + d, mask=d < d_in, other=0.0).to(tl.float32)
    tl.store(norms + f, tl.sqrt(tl.sum(value * value)))
    if SCALED:
        most = tl.max(tl.abs(value), axis=0)
        scale = tl.where(most > 1e-30, most / largest, 1.0)
        # Dividing may round above the largest number, and that would become NaN.
        value = value / scale
        value = tl.where(value > largest, largest, tl.where(value < -largest, -largest, value))  # NaN stays NaN
        tl.store(scales + f, scale)
    tl.store(rows + f * d_in + d, value.to(rows.dtype.element_ty), mask=d < d_in)


def narrow_rows(matrix: Tensor, dtype: torch.dtype) -> Narrow:
    """Rounds matrix [n_rows, d_in] to bfloat16 or float8_e4m3fn; a row with NaN or infinity has NaN in its products."""
    n_rows, d_in = matrix.shape
    if d_in > MOST_COLUMNS:
        raise ValueError(f"rows of {d_in} numbers do not fit a multiprocessor's registers; {MOST_COLUMNS} do")
    matrix = matrix.detach().contiguous()
    rows = torch.empty_like(matrix, dtype=dtype)
    scales, norms = matrix.new_ones(n_rows, dtype=torch.float32), matrix.new_zeros(n_rows, dtype=torch.float32)
    if matrix.numel() > 0:
        with launching_on(matrix):
            narrow_rows_kernel[(n_rows,)](
                matrix, rows, scales, norms, d_in, LARGEST.get(dtype, 0.0),
                SCALED=dtype in LARGEST, BLOCK_D=triton.next_power_of_2(d_in), num_warps=row_warps(d_in),
            )  # fmt: skip
    return Narrow(rows, scales, norms)
