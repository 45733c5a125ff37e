"""Fused backward pass: g_z = W_dec g^T, a tiled matrix product with the gate's derivative in its epilogue.

The gradient of the code stays in the float32 accumulator; dh and, if wanted, the recomputed code are written. There are
no atomics: every program writes its own sums, which are added in a fixed order in float64, so two calls agree to the
last bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .autotune import pick, product_tiles, shape_key
from .configs import MatmulTile, backward_tile
from .launch import capability, dot_precision, launching_on, pack_gate
from .product import product, tile_of_program, token_parts
from .rational import gate_backward, load_coefficients
from .rational_backward import GateGrads, accumulate, finish


@triton.jit
def _by_lane(part, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr):
    """Reshapes [ROWS, COLUMNS] to [ROWS, LANES, COLUMNS / LANES], so that a thread of the product holds the last axis
    whole.

    Pairs of columns go to LANES threads in turn, which is how the tensor cores of sm_80 and sm_90 leave a row with 4
    lanes.
    """
    if LANES == 1:
        return tl.reshape(part, (ROWS, 1, COLUMNS))
    pairs = tl.reshape(part, (ROWS, COLUMNS // (2 * LANES), LANES, 2))
    return tl.reshape(tl.permute(pairs, (0, 2, 1, 3)), (ROWS, LANES, COLUMNS // LANES))


@triton.jit
def _by_token(part, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr):
    """Undoes `_by_lane`."""
    if LANES == 1:
        return tl.reshape(part, (ROWS, COLUMNS))
    pairs = tl.reshape(part, (ROWS, LANES, COLUMNS // (2 * LANES), 2))
    return tl.reshape(tl.permute(pairs, (0, 2, 1, 3)), (ROWS, COLUMNS))


@triton.jit
def encode_backward_kernel(
    g, w, h, dh, z, dcounts, dl1, partial, coefficients, rows,
    n_features, n_tokens, d_in, stride_gn, stride_gd, stride_wf, stride_wd,
    P: tl.constexpr, Q: tl.constexpr,
    GATED: tl.constexpr, CLAMP: tl.constexpr, IDENTITY: tl.constexpr, HARD: tl.constexpr,
    RATIONAL_BACKWARD: tl.constexpr, HAS_DCOUNTS: tl.constexpr, HAS_DL1: tl.constexpr,
    SAVE_Z: tl.constexpr, COEFFICIENTS: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SUB: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: the [BLOCK_F, BLOCK_N] tile of dh. partial [n_token_blocks, P+Q+5 or 3, n_features] float32, as
    in `rational_backward_kernel`.

    The epilogue works on SUB (1, 2 or 4) parts. The LANES threads that share a feature keep separate sums until all
    parts are done.
    """
    f_block, n_block = tile_of_program(n_features, n_tokens, BLOCK_F, BLOCK_N, GROUP)
    f0, n0 = f_block.to(tl.int64) * BLOCK_F, n_block.to(tl.int64) * BLOCK_N
    PART: tl.constexpr = BLOCK_N // SUB
    f_local, token = tl.arange(0, BLOCK_F), tl.arange(0, PART)[None, :]
    f, f_in = f0 + f_local[:, None], f_local[:, None] < n_features - f0
    n_left = (n_tokens - n0).to(tl.int32)
    corner = n0 + f * n_tokens
    # Loaded before the product, which hides their latency.
    h_parts = ()
    for i in tl.static_range(SUB):
        here = f_in & (token < n_left - i * PART)
        h_parts = h_parts + (tl.load(h + corner + i * PART + token, mask=here, other=0.0),)  # noqa: RUF005
    g_z = product(w, g, f0, n0, n_features, n_tokens, d_in, stride_wf, stride_wd, stride_gn, stride_gd,
                  BLOCK_F, BLOCK_N, BLOCK_D, PRECISION)  # fmt: skip

    f3, f3_in = f0 + f_local[:, None, None], f_local[:, None, None] < n_features - f0
    c = load_coefficients(coefficients, f3, f3_in, n_features, P + Q + 4, SHARED)
    theta = tl.load(rows + f3, mask=f3_in, other=0.0)
    activity = tl.load(rows + n_features + f3, mask=f3_in, other=0.0)
    dcount_f, dl1_f = tl.zeros((BLOCK_F, 1, 1), tl.float32), tl.zeros((BLOCK_F, 1, 1), tl.float32)
    if HAS_DCOUNTS:
        dcount_f = tl.load(dcounts + f3, mask=f3_in, other=0.0)
    if HAS_DL1:
        dl1_f = tl.load(dl1 + f3, mask=f3_in, other=0.0)
    COUNT: tl.constexpr = P + Q + 5 if COEFFICIENTS else 3
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros((BLOCK_F, LANES), tl.float32),)  # noqa: RUF005
    g_parts = token_parts(g_z, BLOCK_F, BLOCK_N, SUB)
    for i in tl.static_range(SUB):
        here = f_in & (token < n_left - i * PART)
        # Beyond the last token all gradients are 0 (since the product is), and h = theta keeps their factors finite.
        inside = _by_lane(tl.broadcast_to(token < n_left - i * PART, (BLOCK_F, PART)), BLOCK_F, PART, LANES)
        part = _by_lane(g_parts[i], BLOCK_F, PART, LANES)
        inside = inside & ((part.to(tl.int32, bitcast=True) | 1) != 0)
        value = tl.where(inside, _by_lane(h_parts[i], BLOCK_F, PART, LANES).to(tl.float32), theta)
        dcount, dl1_n = tl.where(inside, dcount_f, 0.0), tl.where(inside, dl1_f, 0.0)
        dvalue, dt, u, v, e, t, s, last, code = gate_backward(
            value, part, dcount, dl1_n, theta, activity, c,
            P, Q, GATED, CLAMP, IDENTITY, HARD, RATIONAL_BACKWARD, HAS_DL1,
        )  # fmt: skip
        where = corner + i * PART + token
        tl.store(dh + where, _by_token(dvalue.to(dh.dtype.element_ty), BLOCK_F, PART, LANES), mask=here)
        if SAVE_Z:
            tl.store(z + where, _by_token(code.to(z.dtype.element_ty), BLOCK_F, PART, LANES), mask=here)
        if GATED:
            last = dvalue
        sums = accumulate(sums, u, v, s, e, dt, t, last, P, Q, COEFFICIENTS)
    row = partial + n_block.to(tl.int64) * COUNT * n_features + f0
    for k in tl.static_range(COUNT):
        tl.store(row + f_local, tl.sum(sums[k], axis=1), mask=f_local < n_features - f0)
        row += n_features


# `inside` in the kernel has a term that is always true but depends on the product. Without it LLVM computes the masks
# of all parts before the loop over d_in and keeps them in registers (sm_90, 128 x 64 tile: 255 registers instead of
# 181).


def encode_backward(
    g: Tensor,
    W_dec: Tensor,
    h_fm: Tensor,
    dcounts: Tensor | None,
    dl1: Tensor | None,
    gate: Sequence[Tensor],
    *,
    p: int,
    q: int,
    gated: bool,
    clamp: bool,
    identity: bool,
    hard: bool,
    backward_rational: bool,
    coefficients: bool = True,
    z_dtype: torch.dtype | None = None,
    dh_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, GateGrads]:
    """Computes dh_fm, the recomputed code z_fm and the gate's gradients, from g, W_dec and h_fm.

    The result is that of `rational_backward(h_fm, W_dec @ g.T, ...)`, but the [n_features, n_tokens] product is neither
    stored nor rounded.

    Args:
        g, W_dec: dL/dx_hat [n_tokens, d_in] and [n_features, d_in], of one dtype and any strides.
        h_fm: [n_features, n_tokens]; copied first if its tokens are not contiguous.
        dcounts, dl1, gate, coefficients: see `rational_backward`.
        dh_dtype: of dh_fm; g's by default. z_dtype: of z_fm, for the gradient of W_dec; None for no z_fm.
    """
    (n_tokens, d_in), n_features = g.shape, W_dec.shape[0]
    if W_dec.shape[1] != d_in or h_fm.shape != (n_features, n_tokens) or gate[5].shape != (n_features,):
        raise ValueError(
            f"g {tuple(g.shape)}, W_dec {tuple(W_dec.shape)}, h {tuple(h_fm.shape)} and threshold "
            f"{tuple(gate[5].shape)} do not fit: [n, d_in], [d_sae, d_in], [d_sae, n] and [d_sae] are wanted"
        )
    if g.dtype != W_dec.dtype:
        raise ValueError(f"g is {g.dtype} and W_dec {W_dec.dtype}; give both the same dtype")
    packed = pack_gate(gate, p, q)
    h_fm = h_fm.contiguous()
    dh_fm = torch.empty_like(h_fm, dtype=dh_dtype or g.dtype)
    z_fm = None if z_dtype is None else torch.empty_like(h_fm, dtype=z_dtype)
    counted = gated and dcounts is not None
    constants = {
        "P": p, "Q": q, "GATED": gated, "CLAMP": clamp, "IDENTITY": identity, "HARD": hard,
        "RATIONAL_BACKWARD": backward_rational, "HAS_DCOUNTS": counted, "HAS_DL1": dl1 is not None,
        "SAVE_Z": z_fm is not None, "COEFFICIENTS": coefficients, "SHARED": packed.shared,
        "PRECISION": dot_precision(g.dtype),
    }  # fmt: skip
    n_sums = p + q + 5 if coefficients else 3
    dcounts = dcounts.float().contiguous() if counted else packed.rows
    dl1 = packed.rows if dl1 is None else dl1.float().contiguous()

    def launch(tile: MatmulTile) -> Tensor:
        token_blocks = triton.cdiv(n_tokens, tile.tokens)
        partial = g.new_empty((token_blocks, n_sums, n_features), dtype=torch.float32)
        encode_backward_kernel[(triton.cdiv(n_features, tile.features) * token_blocks,)](
            g, W_dec, h_fm, dh_fm, dh_fm if z_fm is None else z_fm, dcounts, dl1, partial,
            packed.coefficients, packed.rows, n_features, n_tokens, d_in, *g.stride(), *W_dec.stride(), **constants,
            BLOCK_F=tile.features, BLOCK_N=tile.tokens, BLOCK_D=tile.inner, SUB=tile.sub, LANES=tile.lanes,
            GROUP=tile.group, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return partial

    if h_fm.numel() == 0:
        partial = g.new_zeros((1, n_sums, n_features), dtype=torch.float32)
    else:
        with launching_on(g):
            tile = pick(
                "encode_backward", backward_tile(capability(g), g.dtype, p, q, n_tokens),
                lambda: product_tiles(capability(g), g.itemsize, backward=True), g,
                {**constants, "h": h_fm.dtype, "dh": dh_fm.dtype, "z": z_dtype,
                 **shape_key(n_features, n_tokens, g, W_dec)}, launch,
            )  # fmt: skip
            partial = launch(tile)
    return dh_fm, z_fm, finish(partial.sum(0, dtype=torch.float64), gate, p, q, gated)
