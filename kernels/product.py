"""The tiled matrix product of the fused kernels, as device functions: w [n_features, d_in] times x [n_tokens, d_in].

The result is feature-major and stays in float32 registers, for the caller's epilogue.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of_program(n_features, n_tokens, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Returns the feature block and the token block of this program.

    Programs that run at the same time cover GROUP feature blocks by many token blocks, so that both inputs stay in L2.
    """
    feature_blocks, token_blocks = tl.cdiv(n_features, BLOCK_F), tl.cdiv(n_tokens, BLOCK_N)
    per_group = GROUP * token_blocks
    first = tl.program_id(0) // per_group * GROUP
    height = tl.minimum(feature_blocks - first, GROUP)
    within = tl.program_id(0) % per_group
    return first + within % height, within // height


@triton.jit
def product(
    w, x, f0, n0, n_features, n_tokens, d_in, stride_wf, stride_wd, stride_xn, stride_xd,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns the tile [BLOCK_F, BLOCK_N] float32 that starts at feature f0 and token n0 (int64); 0 outside the
    matrices."""
    f, n, d = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    f_in, n_in = f < n_features - f0, n < n_tokens - n0
    w_tile = w + f0 * stride_wf + f[:, None] * stride_wf + d[None, :] * stride_wd
    x_tile = x + n0 * stride_xn + n[None, :] * stride_xn + d[:, None] * stride_xd
    value = tl.zeros((BLOCK_F, BLOCK_N), tl.float32)
    for d0 in range(0, d_in, BLOCK_D):
        w_part = tl.load(w_tile, mask=f_in[:, None] & (d[None, :] < d_in - d0), other=0.0)
        x_part = tl.load(x_tile, mask=n_in[None, :] & (d[:, None] < d_in - d0), other=0.0)
        value = tl.dot(w_part, x_part, value, input_precision=PRECISION)
        w_tile += BLOCK_D * stride_wd
        x_tile += BLOCK_D * stride_xd
    return value


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns the left and the right half of a [ROWS, COLUMNS] tile."""
    pairs = tl.reshape(tile, (ROWS, 2, COLUMNS // 2))
    return tl.split(tl.permute(pairs, (0, 2, 1)))


@triton.jit
def token_parts(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUB: tl.constexpr):
    """Cuts the tile into a tuple of SUB (1, 2 or 4) parts of COLUMNS / SUB columns, from left to right."""
    parts = (tile,)
    if SUB > 1:
        parts = halves(tile, ROWS, COLUMNS)
    if SUB == 4:
        left, right = halves(parts[0], ROWS, COLUMNS // 2), halves(parts[1], ROWS, COLUMNS // 2)
        parts = (left[0], left[1], right[0], right[1])
    return parts
