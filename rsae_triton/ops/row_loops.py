"""The optimiser's work on a matrix, row by row in compiled loops (float32 on the CPU, `native.py`).

Done separately, removing the radial part of a gradient, clipping, Adam and restoring row norms read and write each
matrix eight times or more. Here a row stays in the cache for all of it.
"""

from __future__ import annotations

import ctypes

from torch import Tensor

from rsae_triton.ops import native
from rsae_triton.ops.native import address, integer

usable = native.usable
LEAST = 256
"""Number of rows from which another thread pays."""


def remove_radial_(gradient: Tensor, weight: Tensor) -> Tensor:
    """Removes the part along each row of `weight` from the gradient's row, in place. Returns the squared norm of each
    row. Both are [rows, d]."""
    library = native.library()
    assert library is not None
    squares = gradient.new_empty(len(gradient))
    native.split(len(gradient), lambda start, stop: library.gradient_rows(
        address(gradient), address(weight), integer(weight.shape[1]), address(squares), integer(start), integer(stop)
    ), LEAST)  # fmt: skip
    return squares


def adam_(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    norms: Tensor | None,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    scale: float = 1.0,
    decay: float = 0.0,
) -> None:
    """Makes one step of Adam on weight [rows, d] and its moments `first` and `second`, in place.

    Args:
        norms: [rows] or [rows, 1], the norm that each row gets afterwards; None leaves it. step: counts from 1.
        scale: the gradient is multiplied by this first. decay: the fraction by which the weight is reduced first.
    """
    library = native.library()
    assert library is not None
    one, two = betas
    lengths = None if norms is None else norms.contiguous()
    numbers = [scale, decay, lr / (1 - one**step), (1 - two**step) ** -0.5, one, two, eps]
    native.split(len(weight), lambda start, stop: library.adam_rows(
        address(weight), address(gradient), address(first), address(second),
        None if lengths is None else address(lengths), integer(weight.shape[1]),
        *(ctypes.c_float(number) for number in numbers), integer(start), integer(stop),
    ), LEAST)  # fmt: skip
