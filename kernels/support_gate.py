"""The gate at the entries of a support: codes in the forward pass, gradients in the backward pass, all in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import entry_block, entry_programs
from .launch import PackedGate, launching_on, pack_gate
from .rational import gate_backward, gate_forward, load_coefficients
from .support_list import Entries


@triton.jit
def entry_gate_forward_kernel(
    values, tokens, features, offsets, z, dense, coefficients, rows, n_features, n_tokens, capacity,
    P: tl.constexpr, Q: tl.constexpr, IDENTITY: tl.constexpr, SHARED: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Computes z [capacity] float32, and also writes it into dense [n_features, n_tokens] at the entry's place."""
    total = tl.minimum(tl.load(offsets + n_features), capacity)
    step = tl.num_programs(0).to(tl.int64) * BLOCK_E
    for e0 in range(tl.program_id(0).to(tl.int64) * BLOCK_E, total, step):
        e = e0 + tl.arange(0, BLOCK_E)
        mask = e < total
        f = tl.load(features + e, mask=mask, other=0).to(tl.int64)
        n = tl.load(tokens + e, mask=mask, other=0)
        h = tl.load(values + e, mask=mask, other=0.0)
        c = load_coefficients(coefficients, f, mask, n_features, P + Q + 4, SHARED)
        theta = tl.load(rows + f, mask=mask, other=0.0)
        code, _ = gate_forward(h, theta, theta, c, P, Q, True, True, IDENTITY, True)
        tl.store(z + e, code, mask=mask)
        tl.store(dense + f * n_tokens + n, code.to(dense.dtype.element_ty), mask=mask)


@triton.jit
def entry_gate_backward_kernel(
    values, features, offsets, dz, dcounts, dl1, dh, dt, coefficients, rows, n_features, capacity,
    P: tl.constexpr, Q: tl.constexpr, IDENTITY: tl.constexpr, RATIONAL_BACKWARD: tl.constexpr,
    HAS_DCOUNTS: tl.constexpr, HAS_DL1: tl.constexpr, SHARED: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Computes dh and dt (the gradient with respect to the gate's argument), [capacity] float32."""
    total = tl.minimum(tl.load(offsets + n_features), capacity)
    step = tl.num_programs(0).to(tl.int64) * BLOCK_E
    for e0 in range(tl.program_id(0).to(tl.int64) * BLOCK_E, total, step):
        e = e0 + tl.arange(0, BLOCK_E)
        mask = e < total
        f = tl.load(features + e, mask=mask, other=0).to(tl.int64)
        h = tl.load(values + e, mask=mask, other=0.0)
        g = tl.load(dz + e, mask=mask, other=0.0)
        c = load_coefficients(coefficients, f, mask, n_features, P + Q + 4, SHARED)
        theta = tl.load(rows + f, mask=mask, other=0.0)
        dcount, dl1_e = tl.zeros_like(h), tl.zeros_like(h)
        if HAS_DCOUNTS:
            dcount = tl.load(dcounts + f, mask=mask, other=0.0)
        if HAS_DL1:
            dl1_e = tl.load(dl1 + f, mask=mask, other=0.0)
        by_h, by_t, _u, _v, _e, _t, _s, _last, _z = gate_backward(
            h, g, dcount, dl1_e, theta, theta, c, P, Q, True, True, IDENTITY, True, RATIONAL_BACKWARD, HAS_DL1
        )
        tl.store(dh + e, by_h, mask=mask)
        tl.store(dt + e, by_t, mask=mask)


def entry_gate_forward(
    entries: Entries, gate: Sequence[Tensor], dense: Tensor, *, p: int, q: int, identity: bool
) -> Tensor:
    """Computes the codes of the entries, [capacity] float32, for a gate that is gated, clamped and hard.

    gate: the seven tensors of `launch.pack_gate`. dense [n_features, n_tokens]: memory that also receives the codes, in
    its dtype, at the entries' places only (usually that of h, which is no longer needed).
    """
    packed = _check(entries, gate, p, q)
    z = torch.empty_like(entries.values)
    block = entry_block(p, q, packed.shared)
    if len(z) > 0:
        with launching_on(z):
            entry_gate_forward_kernel[(entry_programs(len(z), block),)](
                entries.values, entries.tokens, entries.features, entries.offsets, z, dense,
                packed.coefficients, packed.rows, *dense.shape, len(z),
                P=p, Q=q, IDENTITY=identity, SHARED=packed.shared, BLOCK_E=block, num_warps=4, num_stages=1,
            )  # fmt: skip
    return z


def entry_gate_backward(
    entries: Entries,
    dz: Tensor,
    dcounts: Tensor | None,
    dl1: Tensor | None,
    gate: Sequence[Tensor],
    *,
    p: int,
    q: int,
    identity: bool,
    backward_rational: bool,
) -> tuple[Tensor, Tensor]:
    """Computes dh and dt [capacity] float32 from dz [capacity] float32. dcounts, dl1: see `rational_backward`.

    The gradient of a threshold is minus the sum of its entries' dt over C_in. The gradients of a, b, the centre and
    C_in are not computed; the first three are not zero outside the support.
    """
    packed = _check(entries, gate, p, q)
    dh, dt = dz.new_empty((2, *dz.shape))
    block = entry_block(p, q, packed.shared)
    flags = {"IDENTITY": identity, "RATIONAL_BACKWARD": backward_rational}
    flags |= {"HAS_DCOUNTS": dcounts is not None, "HAS_DL1": dl1 is not None, "SHARED": packed.shared}
    per_feature = [packed.rows if one is None else one.float().contiguous() for one in (dcounts, dl1)]
    if len(dz) > 0:
        with launching_on(dz):
            entry_gate_backward_kernel[(entry_programs(len(dz), block),)](
                entries.values, entries.features, entries.offsets, dz, *per_feature, dh, dt,
                packed.coefficients, packed.rows, len(entries.offsets) - 1, len(dz),
                P=p, Q=q, **flags, BLOCK_E=block, num_warps=4, num_stages=1,
            )  # fmt: skip
    return dh, dt


def _check(entries: Entries, gate: Sequence[Tensor], p: int, q: int) -> PackedGate:
    packed = pack_gate(gate, p, q)
    if packed.rows.shape[1] != len(entries.offsets) - 1:
        raise ValueError(f"the gate has {packed.rows.shape[1]} features, the entries {len(entries.offsets) - 1}")
    return packed
