"""Adam on a weight matrix, row by row, in one pass: the radial part of the gradient, clipping, Adam, the row's norm.

As separate passes, these would read and write the matrices several times. Here each element of the weights, the
gradient and Adam's two moments is read once, and new values are written once: 28 bytes, and 2 more for a copy in
bfloat16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import MOST_COLUMNS, row_warps
from .launch import launching_on


@triton.jit
def row_norms_kernel(grad, weight, squares, d_in, RADIAL: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program: the squared norm of one row of the gradient, without its part along the weights' row if RADIAL."""
    f = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    g = tl.load(grad + f * d_in + d, mask=d < d_in, other=0.0).to(tl.float32)
    if RADIAL:
        w = tl.load(weight + f * d_in + d, mask=d < d_in, other=0.0).to(tl.float32)
        g -= w * (tl.sum(g * w) / tl.maximum(tl.sum(w * w), 1e-12))
    tl.store(squares + f, tl.sum(g * g))


@triton.jit
def remove_radial_kernel(grad, weight, d_in, BLOCK_D: tl.constexpr):
    """One program: removes the part of one row of the gradient along the weights' row, in place."""
    f = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    g = tl.load(grad + f * d_in + d, mask=d < d_in, other=0.0).to(tl.float32)
    w = tl.load(weight + f * d_in + d, mask=d < d_in, other=0.0).to(tl.float32)
    g -= w * (tl.sum(g * w) / tl.maximum(tl.sum(w * w), 1e-12))
    tl.store(grad + f * d_in + d, g.to(grad.dtype.element_ty), mask=d < d_in)


@triton.jit
def adam_rows_kernel(
    weight, grad, mean, square, copy, norms, numbers, d_in,
    RADIAL: tl.constexpr, NORMS: tl.constexpr, COPY: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: one row. numbers [7] float32: the step size over its bias correction, the root of the second
    moment's bias correction, the decay's factor, the factor on the gradient, beta1, beta2, eps."""
    f = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside, at = d < d_in, f * d_in + d
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if RADIAL:
        g -= w * (tl.sum(g * w) / tl.maximum(tl.sum(w * w), 1e-12))
    g *= tl.load(numbers + 3)
    beta1, beta2 = tl.load(numbers + 4), tl.load(numbers + 5)
    first = tl.load(mean + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(square + at, mask=inside, other=0.0).to(tl.float32)
    first += (1.0 - beta1) * (g - first)
    second = beta2 * second + (1.0 - beta2) * g * g
    w *= tl.load(numbers + 2)
    w -= tl.load(numbers) * first / (tl.sqrt(second) / tl.load(numbers + 1) + tl.load(numbers + 6))
    if NORMS:
        w *= tl.load(norms + f) / tl.maximum(tl.sqrt(tl.sum(w * w)), 1e-12)
    tl.store(mean + at, first.to(mean.dtype.element_ty), mask=inside)
    tl.store(square + at, second.to(square.dtype.element_ty), mask=inside)
    tl.store(weight + at, w.to(weight.dtype.element_ty), mask=inside)
    if COPY:
        tl.store(copy + at, w.to(copy.dtype.element_ty), mask=inside)


def row_norms(grad: Tensor, weight: Tensor | None) -> Tensor:
    """Returns the squared norm of every row of grad [n_rows, d_in], [n_rows] float32, for clipping. With `weight`, the
    gradient's part along the weight's rows (the radial part) is left out."""
    n_rows, d_in = _check(grad=grad, weight=weight)
    squares = grad.new_zeros(n_rows, dtype=torch.float32)
    if grad.numel() > 0:
        with launching_on(grad):
            row_norms_kernel[(n_rows,)](
                grad, grad if weight is None else weight, squares, d_in,
                RADIAL=weight is not None, BLOCK_D=triton.next_power_of_2(d_in), num_warps=row_warps(d_in),
            )  # fmt: skip
    return squares


def remove_radial(grad: Tensor, weight: Tensor) -> None:
    """Removes the part of grad [n_rows, d_in] along the rows of weight, in place."""
    n_rows, d_in = _check(grad=grad, weight=weight)
    if grad.numel() > 0:
        with launching_on(grad):
            remove_radial_kernel[(n_rows,)](
                grad, weight, d_in, BLOCK_D=triton.next_power_of_2(d_in), num_warps=row_warps(d_in)
            )


def adam_rows(
    weight: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    numbers: Tensor,
    *,
    radial: bool,
    norms: Tensor | None = None,
    copy: Tensor | None = None,
) -> None:
    """Makes one step of Adam or AdamW on weight [n_rows, d_in], in place; mean and square are Adam's moments.

    Args:
        grad: is not changed. numbers [7] float32, on the device: from `adam_numbers`.
        radial: whether to remove the gradient's part along the row. norms [n_rows] float32: the rows' norms after the
            step; None leaves them. copy [n_rows, d_in]: receives the new weights in its own dtype.
    """
    n_rows, d_in = _check(weight=weight, grad=grad, mean=mean, square=square, copy=copy)
    if numbers.shape != (7,) or numbers.dtype != torch.float32:
        raise ValueError(f"numbers is {numbers.dtype} {tuple(numbers.shape)}; take those of adam_numbers")
    if norms is not None and norms.shape != (n_rows,):
        raise ValueError(f"norms has shape {tuple(norms.shape)}; one number for each of {n_rows} rows is wanted")
    if weight.numel() == 0:
        return
    with launching_on(weight):
        adam_rows_kernel[(n_rows,)](
            weight, grad, mean, square, weight if copy is None else copy, numbers if norms is None else norms.float(),
            numbers, d_in, RADIAL=radial, NORMS=norms is not None, COPY=copy is not None,
            BLOCK_D=triton.next_power_of_2(d_in), num_warps=row_warps(d_in),
        )  # fmt: skip


def adam_numbers(
    step: int | Tensor, lr: float, clip: Tensor, *, betas: tuple[float, float], eps: float, weight_decay: float = 0.0
) -> Tensor:
    """Returns the numbers that `adam_rows` needs for step number `step` (from 1 on), on the device of `clip`.

    step: a tensor if the count is kept on the GPU, as torch's fused optimisers do; it is not waited for. clip: a scalar
    tensor that multiplies the gradient. weight_decay: of AdamW (times lr), 0 for Adam.
    """
    known = [lr, 1.0, 1 - lr * weight_decay, 1.0, *betas, eps]
    numbers = torch.tensor(known, dtype=torch.float64, device=clip.device)
    first, second = (1 - numbers[place].pow(step) for place in (4, 5))
    numbers[0] /= first
    numbers[1] = second.sqrt()
    numbers[3] = clip
    return numbers.float()


def _check(**tensors: Tensor | None) -> tuple[int, int]:
    there = {name: one for name, one in tensors.items() if one is not None}
    shapes = {tuple(one.shape) for one in there.values()}
    if len(shapes) != 1 or len(min(shapes)) != 2 or not all(one.is_contiguous() for one in there.values()):
        raise ValueError(
            f"{', '.join(f'{name} {tuple(one.shape)}' for name, one in there.items())}: contiguous matrices of one "
            "shape are wanted"
        )
    n_rows, d_in = min(shapes)
    if d_in > MOST_COLUMNS:
        raise ValueError(f"rows of {d_in} numbers do not fit into the registers of a program ({MOST_COLUMNS} do)")
    return n_rows, d_in
