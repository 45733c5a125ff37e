"""Fused encoder: z = gate(W_enc^T x_c^T + b_enc), a tiled matrix product with the whole gate as its epilogue.

The pre-activation stays in the float32 accumulator until the gate has been applied, and is written to memory only if
requested. The layout is feature-major: a thread of the accumulator owns few features and many tokens, so it needs few
sets of coefficients, and it sums activity over tokens in its own registers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .autotune import pick, product_tiles, shape_key
from .configs import MatmulTile, matmul_tile
from .launch import capability, dot_precision, launching_on, pack_gate
from .product import product, tile_of_program, token_parts
from .rational import gate_forward, load_coefficients


@triton.jit
def _epilogue(
    value, z_tile, h_tile, n_local, n_left, f_mask, theta, activity, c,
    P: tl.constexpr, Q: tl.constexpr,
    GATED: tl.constexpr, CLAMP: tl.constexpr, IDENTITY: tl.constexpr, HARD: tl.constexpr,
    SAVE_H: tl.constexpr,
):  # fmt: skip
    """Applies the gate to a part of the tile and stores it: its columns n_local [1, columns], value [BLOCK_F, columns].

    z_tile, h_tile: pointers to the tile's rows [BLOCK_F, 1]; n_left: number of tokens from the tile's first one on.
    Returns the number of active codes of each feature and the sum of their |z|, [BLOCK_F] each.
    """
    mask = f_mask & (n_local < n_left)
    if SAVE_H:
        stored = value.to(h_tile.dtype.element_ty)
        tl.store(h_tile + n_local, stored, mask=mask)
        value = stored.to(tl.float32)  # the same value that the backward pass reads, so that both decide alike
    code, active = gate_forward(value, theta, activity, c, P, Q, GATED, CLAMP, IDENTITY, HARD)
    tl.store(z_tile + n_local, code.to(z_tile.dtype.element_ty), mask=mask)
    return tl.sum(tl.where(mask, active, 0.0), axis=1), tl.sum(tl.where(mask, tl.abs(code), 0.0), axis=1)


@triton.jit
def encode_forward_kernel(
    x, w, z, h, partial, coefficients, rows,
    n_features, n_tokens, d_in, stride_xn, stride_xd, stride_wd, stride_wf,
    P: tl.constexpr, Q: tl.constexpr,
    GATED: tl.constexpr, CLAMP: tl.constexpr, IDENTITY: tl.constexpr, HARD: tl.constexpr,
    SAVE_H: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SUB: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: the [BLOCK_F, BLOCK_N] tile of z. partial [n_token_blocks, 2, n_features] float32: counts, l1.

    The gate is evaluated in SUB (1, 2 or 4) parts, so that the accumulator and all intermediates of Horner's rule are
    not alive at the same time.
    """
    f_block, n_block = tile_of_program(n_features, n_tokens, BLOCK_F, BLOCK_N, GROUP)
    f0, n0 = f_block.to(tl.int64) * BLOCK_F, n_block.to(tl.int64) * BLOCK_N
    value = product(w, x, f0, n0, n_features, n_tokens, d_in, stride_wf, stride_wd, stride_xn, stride_xd,
                    BLOCK_F, BLOCK_N, BLOCK_D, PRECISION)  # fmt: skip

    # Loaded after the loop, so that the coefficients take no registers while the accumulator is computed.
    f_local = tl.arange(0, BLOCK_F)
    f_in = f_local < n_features - f0
    f, f_mask = f0 + f_local[:, None], f_in[:, None]
    c = load_coefficients(coefficients, f, f_mask, n_features, P + Q + 4, SHARED)
    theta = tl.load(rows + f, mask=f_mask, other=0.0)
    activity = tl.load(rows + n_features + f, mask=f_mask, other=0.0)
    value += tl.load(rows + 2 * n_features + f, mask=f_mask, other=0.0)
    z_tile, h_tile = z + n0 + f * n_tokens, h + n0 + f * n_tokens
    n_left = (n_tokens - n0).to(tl.int32)
    PART: tl.constexpr = BLOCK_N // SUB
    count, l1 = tl.zeros((BLOCK_F,), tl.float32), tl.zeros((BLOCK_F,), tl.float32)
    parts = token_parts(value, BLOCK_F, BLOCK_N, SUB)
    for i in tl.static_range(SUB):
        n_part = i * PART + tl.arange(0, PART)[None, :]
        more, more_l1 = _epilogue(parts[i], z_tile, h_tile, n_part, n_left, f_mask, theta, activity,
                                  c, P, Q, GATED, CLAMP, IDENTITY, HARD, SAVE_H)  # fmt: skip
        count, l1 = count + more, l1 + more_l1
    row = partial + n_block.to(tl.int64) * 2 * n_features + f0 + f_local
    tl.store(row, count, mask=f_in)
    tl.store(row + n_features, l1, mask=f_in)


def encode_forward(
    x_c: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    gate: Sequence[Tensor],
    *,
    p: int,
    q: int,
    gated: bool,
    clamp: bool,
    identity: bool,
    hard: bool,
    save_h: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Computes z_fm [n_features, n_tokens] in x_c's dtype, h_fm (in dtype save_h, or None), counts and l1 of a batch.

    Args:
        x_c, W_enc: [n_tokens, d_in] and [d_in, n_features], of one dtype and any strides. b_enc: [n_features].
        gate: the seven tensors of `launch.pack_gate`.

    counts, l1 [n_features] float32 are the number of active codes and the sum of |z| before z is rounded to its dtype.
    The gate is applied to the float32 accumulator, or to h as it is saved; so a code is active in the backward pass
    exactly where it is in the forward pass.
    """
    (n_tokens, d_in), n_features = x_c.shape, W_enc.shape[1]
    if W_enc.shape[0] != d_in or b_enc.shape != (n_features,) or gate[5].shape != (n_features,):
        raise ValueError(
            f"x_c {tuple(x_c.shape)}, W_enc {tuple(W_enc.shape)}, b_enc {tuple(b_enc.shape)} and threshold "
            f"{tuple(gate[5].shape)} do not fit: [n, d_in], [d_in, d_sae], [d_sae] and [d_sae] are wanted"
        )
    if x_c.dtype != W_enc.dtype:
        raise ValueError(f"x_c is {x_c.dtype} and W_enc {W_enc.dtype}; give both the same dtype")
    z_fm = x_c.new_empty((n_features, n_tokens))
    h_fm = None if save_h is None else torch.empty_like(z_fm, dtype=save_h)
    if z_fm.numel() == 0:
        return z_fm, h_fm, *x_c.new_zeros((2, n_features), dtype=torch.float32)
    packed = pack_gate(gate, p, q, b_enc)
    constants = {
        "P": p, "Q": q, "GATED": gated, "CLAMP": clamp, "IDENTITY": identity, "HARD": hard,
        "SAVE_H": h_fm is not None, "SHARED": packed.shared, "PRECISION": dot_precision(x_c.dtype),
    }  # fmt: skip

    def launch(tile: MatmulTile) -> Tensor:
        token_blocks = triton.cdiv(n_tokens, tile.tokens)
        partial = x_c.new_empty((token_blocks, 2, n_features), dtype=torch.float32)
        encode_forward_kernel[(triton.cdiv(n_features, tile.features) * token_blocks,)](
            x_c, W_enc, z_fm, z_fm if h_fm is None else h_fm, partial, packed.coefficients, packed.rows,
            n_features, n_tokens, d_in, *x_c.stride(), *W_enc.stride(), **constants,
            BLOCK_F=tile.features, BLOCK_N=tile.tokens, BLOCK_D=tile.inner, SUB=tile.sub, GROUP=tile.group,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return partial

    with launching_on(x_c):
        tile = pick(
            "encode_forward", matmul_tile(capability(x_c), x_c.dtype, p, q, packed.shared, n_tokens),
            lambda: product_tiles(capability(x_c), x_c.itemsize, backward=False), x_c,
            {**constants, "h": save_h, **shape_key(n_features, n_tokens, x_c, W_enc)}, launch,
        )  # fmt: skip
        partial = launch(tile)
    return z_fm, h_fm, *partial.sum(0, dtype=torch.float64).float()
