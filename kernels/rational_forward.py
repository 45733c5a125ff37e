"""Pointwise gate: computes the code z, the activity counts and the sums of |z| from h [n_features, n_tokens].

For use after a library's matrix product; `encode_forward` contains its own product. h includes the bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .autotune import pick, pointwise_tiles, shape_key
from .configs import PointwiseTile, pointwise_tile
from .launch import launching_on, pack_gate, split_tokens
from .rational import gate_forward, load_coefficients


@triton.jit
def rational_forward_kernel(
    h, z, partial, coefficients, rows, n_features, n_tokens, split_size,
    P: tl.constexpr, Q: tl.constexpr,
    GATED: tl.constexpr, CLAMP: tl.constexpr, IDENTITY: tl.constexpr, HARD: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_F: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_F features, split_size tokens. partial [n_splits, 2, n_features] float32: counts, l1.

    The tile is [BLOCK_F, LANES, VECTOR]. A thread holds VECTOR neighbouring tokens of a feature, so sums over the last
    axis stay in the thread, and the lanes are added once, after the loop.
    """
    f0 = tl.program_id(0).to(tl.int64) * BLOCK_F
    f_local = tl.arange(0, BLOCK_F)[:, None, None]
    f, f_mask = f0 + f_local, f_local < n_features - f0
    c = load_coefficients(coefficients, f, f_mask, n_features, P + Q + 4, SHARED)
    theta = tl.load(rows + f, mask=f_mask, other=0.0)
    activity = tl.load(rows + n_features + f, mask=f_mask, other=0.0)

    lane, vector = tl.arange(0, LANES)[None, :, None], tl.arange(0, VECTOR)[None, None, :]
    tile = f_local.to(tl.int64) * n_tokens + lane * VECTOR + vector
    base = f0 * n_tokens
    start = tl.program_id(1) * split_size
    count, l1 = tl.zeros((BLOCK_F, LANES), tl.float32), tl.zeros((BLOCK_F, LANES), tl.float32)
    for n0 in tl.range(start, tl.minimum(start + split_size, n_tokens), LANES * VECTOR, num_stages=STAGES):
        mask = f_mask & (lane * VECTOR + vector < n_tokens - n0)
        value = tl.load(h + base + n0 + tile, mask=mask, other=0.0).to(tl.float32)
        code, active = gate_forward(value, theta, activity, c, P, Q, GATED, CLAMP, IDENTITY, HARD)
        tl.store(z + base + n0 + tile, code.to(z.dtype.element_ty), mask=mask)
        count += tl.sum(tl.where(mask, active, 0.0), axis=2)
        l1 += tl.sum(tl.where(mask, tl.abs(code), 0.0), axis=2)
    f_local = tl.arange(0, BLOCK_F)
    row = partial + tl.program_id(1).to(tl.int64) * 2 * n_features + f0 + f_local
    tl.store(row, tl.sum(count, axis=1), mask=f_local < n_features - f0)
    tl.store(row + n_features, tl.sum(l1, axis=1), mask=f_local < n_features - f0)


def rational_forward(
    h_fm: Tensor,
    gate: Sequence[Tensor],
    *,
    p: int,
    q: int,
    gated: bool,
    clamp: bool,
    identity: bool,
    hard: bool,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes z_fm [n_features, n_tokens] in out_dtype (h's by default), counts and l1 from h_fm [n_features,
    n_tokens].

    gate: the seven tensors of `launch.pack_gate`. counts, l1 [n_features] float32: the number of active codes and the
    sum of |z| (before z is rounded to its dtype), block by block in a fixed order. h_fm is copied first if its tokens
    are not contiguous.
    """
    n_features, n_tokens = h_fm.shape
    h_fm = h_fm.contiguous()
    z_fm = torch.empty_like(h_fm, dtype=out_dtype or h_fm.dtype)
    if h_fm.numel() == 0:
        return z_fm, *h_fm.new_zeros((2, n_features), dtype=torch.float32)
    packed = pack_gate(gate, p, q)
    constants = {
        "P": p, "Q": q, "GATED": gated, "CLAMP": clamp, "IDENTITY": identity, "HARD": hard, "SHARED": packed.shared,
    }  # fmt: skip

    def launch(tile: PointwiseTile) -> Tensor:
        blocks = triton.cdiv(n_features, tile.features)
        split = split_tokens(n_tokens, blocks, tile.lanes * tile.vector)
        partial = h_fm.new_empty((split.count, 2, n_features), dtype=torch.float32)
        rational_forward_kernel[(blocks, split.count)](
            h_fm, z_fm, partial, packed.coefficients, packed.rows, n_features, n_tokens, split.tokens, **constants,
            BLOCK_F=tile.features, LANES=tile.lanes, VECTOR=tile.vector, STAGES=tile.stages,
            num_warps=tile.warps, num_stages=1,
        )  # fmt: skip
        return partial

    with launching_on(h_fm):
        tile = pick(
            "rational_forward", pointwise_tile(h_fm.dtype, n_tokens),
            lambda: pointwise_tiles(h_fm.itemsize, n_tokens), h_fm,
            {**constants, **shape_key(n_features, n_tokens), "dtypes": (h_fm.dtype, z_fm.dtype)}, launch,
        )  # fmt: skip
        partial = launch(tile)
    return z_fm, *partial.sum(0, dtype=torch.float64).float()
