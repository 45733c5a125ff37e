"""Pointwise backward pass: computes dh and the gradient of every number of the gate from h, dz [n_features, n_tokens].

There are no atomics: a program keeps the sums of a run of tokens in registers, and the runs are added in a fixed order
in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .autotune import pick, pointwise_tiles, shape_key
from .configs import PointwiseTile, pointwise_tile
from .launch import launching_on, pack_gate, split_tokens
from .rational import gate_backward, load_coefficients


class GateGrads(NamedTuple):
    """Gradients of a gate's tensors, each in its tensor's own shape (summed over features if it is shared)."""

    a: Tensor
    b: Tensor
    centre: Tensor
    input_scale: Tensor
    output_scale: Tensor
    threshold: Tensor
    b_enc: Tensor


@triton.jit
def accumulate(sums, u, v, s, e, dt, t, last, P: tl.constexpr, Q: tl.constexpr, COEFFICIENTS: tl.constexpr):
    """Adds one tile's terms to the tuple of sums, over the axis that a thread holds whole.

    The sums for a, b and the centre come first, and exist only if COEFFICIENTS says that these are trained.
    """
    FIRST: tl.constexpr = P + Q + 2 if COEFFICIENTS else 0
    found = ()
    if COEFFICIENTS:
        over_a, over_b = (), ()
        power = tl.full(s.shape, 1.0, tl.float32)
        # One loop for both, so that each power of s is computed once and discarded at once.
        for k in tl.static_range(P + Q + 1):
            if k <= P:
                over_a = over_a + (sums[k] + tl.sum(u * power, axis=2),)  # noqa: RUF005 (no starred tuples in Triton)
            if k >= 1 and k <= Q:
                over_b = over_b + (sums[P + k] + tl.sum(v * power, axis=2),)  # noqa: RUF005
            if k < P or k < Q:
                power = power * s
        found = over_a + over_b + (sums[P + Q + 1] + tl.sum(e, axis=2),)
    return found + (  # noqa: RUF005
        sums[FIRST] + tl.sum(dt, axis=2),
        sums[FIRST + 1] + tl.sum(dt * t, axis=2),
        sums[FIRST + 2] + tl.sum(last, axis=2),
    )


@triton.jit
def rational_backward_kernel(
    h, dz, dh, dcounts, dl1, partial, coefficients, rows, n_features, n_tokens, split_size,
    P: tl.constexpr, Q: tl.constexpr,
    GATED: tl.constexpr, CLAMP: tl.constexpr, IDENTITY: tl.constexpr, HARD: tl.constexpr,
    RATIONAL_BACKWARD: tl.constexpr, HAS_DCOUNTS: tl.constexpr, HAS_DL1: tl.constexpr,
    COEFFICIENTS: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_F: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_F features, split_size tokens. The tile is that of `rational_forward_kernel`.

    partial [n_splits, P+Q+5, n_features] float32: sums of u s^i, v s^j, e, dt, dt t and, last, of dh (gated) or gain
    (direct, where the sum of dh follows from that of dt / C_in). Without COEFFICIENTS only the last three. dh may be dz
    itself.
    """
    f0 = tl.program_id(0).to(tl.int64) * BLOCK_F
    f_local = tl.arange(0, BLOCK_F)[:, None, None]
    f, f_mask = f0 + f_local, f_local < n_features - f0
    # Done before the loop by hand, because Triton does not move loads past the store of dh.
    c = load_coefficients(coefficients, f, f_mask, n_features, P + Q + 4, SHARED)
    theta = tl.load(rows + f, mask=f_mask, other=0.0)
    activity = tl.load(rows + n_features + f, mask=f_mask, other=0.0)
    dcount_f, dl1_f = tl.zeros((BLOCK_F, 1, 1), tl.float32), tl.zeros((BLOCK_F, 1, 1), tl.float32)
    if HAS_DCOUNTS:
        dcount_f = tl.load(dcounts + f, mask=f_mask, other=0.0)
    if HAS_DL1:
        dl1_f = tl.load(dl1 + f, mask=f_mask, other=0.0)

    lane, vector = tl.arange(0, LANES)[None, :, None], tl.arange(0, VECTOR)[None, None, :]
    tile = f_local.to(tl.int64) * n_tokens + lane * VECTOR + vector
    base = f0 * n_tokens
    start = tl.program_id(1) * split_size
    COUNT: tl.constexpr = P + Q + 5 if COEFFICIENTS else 3
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros((BLOCK_F, LANES), tl.float32),)  # noqa: RUF005
    for n0 in tl.range(start, tl.minimum(start + split_size, n_tokens), LANES * VECTOR, num_stages=STAGES):
        mask = f_mask & (lane * VECTOR + vector < n_tokens - n0)
        value = tl.load(h + base + n0 + tile, mask=mask, other=0.0).to(tl.float32)
        # Beyond the last token all gradients are 0, and h = theta keeps their factors finite.
        value = tl.where(mask, value, theta)
        g = tl.load(dz + base + n0 + tile, mask=mask, other=0.0).to(tl.float32)
        dcount, dl1_n = tl.where(mask, dcount_f, 0.0), tl.where(mask, dl1_f, 0.0)
        dvalue, dt, u, v, e, t, s, last, _code = gate_backward(
            value, g, dcount, dl1_n, theta, activity, c,
            P, Q, GATED, CLAMP, IDENTITY, HARD, RATIONAL_BACKWARD, HAS_DL1,
        )  # fmt: skip
        tl.store(dh + base + n0 + tile, dvalue.to(dh.dtype.element_ty), mask=mask)
        if GATED:
            last = dvalue
        sums = accumulate(sums, u, v, s, e, dt, t, last, P, Q, COEFFICIENTS)
    f_local = tl.arange(0, BLOCK_F)
    row = partial + tl.program_id(1).to(tl.int64) * COUNT * n_features + f0
    for k in tl.static_range(COUNT):
        tl.store(row + f_local, tl.sum(sums[k], axis=1), mask=f_local < n_features - f0)
        row += n_features


def rational_backward(
    h_fm: Tensor,
    dz_fm: Tensor,
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
    inplace: bool = False,
) -> tuple[Tensor, GateGrads]:
    """Computes dh_fm in dz's dtype and the gate's gradients in float32, from h_fm, dz_fm [n_features, n_tokens].

    Args:
        dcounts: [n_features] or None, the gradient of the activity counts (gated form only).
        dl1: [n_features] or None, the gradient of the sums of |z|; dl1 sign(z) is added to dz, with sign(0) = 0.
        gate: the seven tensors of `launch.pack_gate`.
        coefficients: False skips the gradients of a, b and centre (which are frozen), leaving them zero.
        inplace: dh may overwrite dz. (If dz's tokens are not contiguous it is copied and the copy overwritten, so use
            the returned dh.)
    """
    n_features, n_tokens = h_fm.shape
    if dz_fm.shape != h_fm.shape:
        raise ValueError(f"dz {tuple(dz_fm.shape)} does not fit h {tuple(h_fm.shape)}")
    packed = pack_gate(gate, p, q)
    h_fm, dz_given = h_fm.contiguous(), dz_fm
    dz_fm = dz_fm.contiguous()
    dh_fm = dz_fm if inplace or dz_fm is not dz_given else torch.empty_like(dz_fm)
    counted = gated and dcounts is not None
    constants = {
        "P": p, "Q": q, "GATED": gated, "CLAMP": clamp, "IDENTITY": identity, "HARD": hard,
        "RATIONAL_BACKWARD": backward_rational, "HAS_DCOUNTS": counted, "HAS_DL1": dl1 is not None,
        "COEFFICIENTS": coefficients, "SHARED": packed.shared,
    }  # fmt: skip
    n_sums = p + q + 5 if coefficients else 3
    dcounts = dcounts.float().contiguous() if counted else packed.rows
    dl1 = packed.rows if dl1 is None else dl1.float().contiguous()

    def launch(tile: PointwiseTile, out: Tensor) -> Tensor:
        blocks = triton.cdiv(n_features, tile.features)
        split = split_tokens(n_tokens, blocks, tile.lanes * tile.vector)
        partial = h_fm.new_empty((split.count, n_sums, n_features), dtype=torch.float32)
        rational_backward_kernel[(blocks, split.count)](
            h_fm, dz_fm, out, dcounts, dl1, partial, packed.coefficients, packed.rows,
            n_features, n_tokens, split.tokens, **constants,
            BLOCK_F=tile.features, LANES=tile.lanes, VECTOR=tile.vector, STAGES=tile.stages,
            num_warps=tile.warps, num_stages=1,
        )  # fmt: skip
        return partial

    if h_fm.numel() == 0:
        partial = h_fm.new_zeros((1, n_sums, n_features), dtype=torch.float32)
    else:
        with launching_on(h_fm):
            tile = pick(
                "rational_backward", pointwise_tile(h_fm.dtype, n_tokens),
                lambda: pointwise_tiles(h_fm.itemsize, n_tokens), h_fm,
                {**constants, **shape_key(n_features, n_tokens), "dtypes": (h_fm.dtype, dz_fm.dtype)},
                lambda tile: launch(tile, torch.empty_like(dz_fm)),  # dz must survive all trials
            )  # fmt: skip
            partial = launch(tile, dh_fm)
    return dh_fm, finish(partial.sum(0, dtype=torch.float64), gate, p, q, gated)


def finish(sums: Tensor, gate: Sequence[Tensor], p: int, q: int, gated: bool) -> GateGrads:
    """Computes the gradients from the sums [p+q+5, n_features] in float64 (or from the last three of them, the others
    being zero), summed to as many sets as each tensor has."""
    if len(sums) == 3:
        sums = torch.cat([sums.new_zeros(p + q + 2, sums.shape[1]), sums])
    da, db, (de, ddt, ddt_t, dlast) = sums[: p + 1], sums[p + 1 : p + 1 + q], sums[p + 1 + q :]
    input_scale = gate[3].detach().double()
    dtheta = -ddt / input_scale

    def fold(gradient: Tensor, like: Tensor) -> Tensor:
        if like.shape[0] == 1:
            gradient = gradient.sum(-1, keepdim=True)
        return gradient.t().float().contiguous() if gradient.dim() == 2 else gradient.float()

    return GateGrads(
        a=fold(da, gate[0]),
        b=fold(db, gate[1]),
        centre=fold(-de, gate[2]),
        input_scale=fold(-ddt_t / input_scale, gate[3]),
        output_scale=fold(torch.zeros_like(dlast) if gated else dlast, gate[4]),
        threshold=dtheta.float(),
        b_enc=(dlast if gated else -dtheta).float(),
    )
