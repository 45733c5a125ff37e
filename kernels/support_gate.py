"""The gate at the entries of a support: codes in the forward pass, gradients in the backward pass, all in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import entry_block, entry_programs
from .launch import check_gate, launching_on
from .rational import gate_backward, gate_forward
from .support_list import Entries


@triton.jit
def load_sets(pointer, row, mask, COUNT: tl.constexpr, SHARED: tl.constexpr):
    """Loads COUNT numbers of each entry's set, which begin at `row`; scalars if all share one set."""
    c = ()
    for k in tl.static_range(COUNT):
        value = tl.load(pointer + k) if SHARED else tl.load(pointer + row + k, mask=mask, other=0.0)
        c = c + (value,)  # noqa: RUF005 (Triton's front end has no starred tuples)
    return c


@triton.jit
def load_gate(
    a, b, centre, scale, f, mask, per_a, per_b, per_centre, per_scale,
    P: tl.constexpr, Q: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Returns the coefficients `c` of rational.py from the gate's own tensors; per_a and so on: 1 if there is a set for
    each feature, 0 if all share one. C_out, which a gated gate does not have, is not looked at."""
    c = load_sets(a, f * per_a * (P + 1), mask, P + 1, SHARED) + load_sets(b, f * per_b * Q, mask, Q, SHARED)
    c = c + load_sets(centre, f * per_centre, mask, 1, SHARED)
    width = tl.load(scale) if SHARED else tl.load(scale + f * per_scale, mask=mask, other=1.0)
    return c + (1.0 / width, width)  # noqa: RUF005


@triton.jit
def entry_gate_forward_kernel(
    values, tokens, features, offsets, z, dense, a, b, centre, scale, threshold,
    n_features, n_tokens, capacity, per_a, per_b, per_centre, per_scale,
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
        c = load_gate(a, b, centre, scale, f, mask, per_a, per_b, per_centre, per_scale, P, Q, SHARED)
        theta = tl.load(threshold + f, mask=mask, other=0.0)
        code, _ = gate_forward(h, theta, theta, c, P, Q, True, True, IDENTITY, True)
        tl.store(z + e, code, mask=mask)
        tl.store(dense + f * n_tokens + n, code.to(dense.dtype.element_ty), mask=mask)


@triton.jit
def entry_gate_backward_kernel(
    values, features, offsets, dz, norms, dh, dtheta, a, b, centre, scale, threshold,
    n_features, capacity, per_a, per_b, per_centre, per_scale, dcount, dl1,
    P: tl.constexpr, Q: tl.constexpr, IDENTITY: tl.constexpr, RATIONAL_BACKWARD: tl.constexpr,
    HAS_DL1: tl.constexpr, SHARED: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Computes dh and dtheta [capacity] float32."""
    total = tl.minimum(tl.load(offsets + n_features), capacity)
    step = tl.num_programs(0).to(tl.int64) * BLOCK_E
    for e0 in range(tl.program_id(0).to(tl.int64) * BLOCK_E, total, step):
        e = e0 + tl.arange(0, BLOCK_E)
        mask = e < total
        f = tl.load(features + e, mask=mask, other=0).to(tl.int64)
        h = tl.load(values + e, mask=mask, other=0.0)
        g = tl.load(dz + e, mask=mask, other=0.0)
        c = load_gate(a, b, centre, scale, f, mask, per_a, per_b, per_centre, per_scale, P, Q, SHARED)
        theta = tl.load(threshold + f, mask=mask, other=0.0)
        dl1_e = tl.zeros_like(h)
        if HAS_DL1:
            dl1_e = dl1 * tl.load(norms + f, mask=mask, other=0.0)
        by_h, by_t, _u, _v, _e, _t, _s, _last, _z = gate_backward(
            h, g, tl.zeros_like(h) + dcount, dl1_e, theta, theta, c, P, Q, True, True, IDENTITY, True,
            RATIONAL_BACKWARD, HAS_DL1,
        )  # fmt: skip
        tl.store(dh + e, by_h, mask=mask)
        tl.store(dtheta + e, -by_t * c[P + Q + 2], mask=mask)


def entry_gate_forward(
    entries: Entries, gate: Sequence[Tensor], dense: Tensor, *, p: int, q: int, identity: bool
) -> Tensor:
    """Computes the codes of the entries, [capacity] float32, for a gate that is gated, clamped and hard.

    gate: the seven tensors of `check_gate`. dense [n_features, n_tokens]: memory that also receives the codes, in its
    dtype, at the entries' places only (usually that of h, which is no longer needed).
    """
    tensors, steps, shared = _given(entries, gate, p, q)
    z = torch.empty_like(entries.values)
    block = entry_block(p, q, shared)
    if len(z) > 0:
        with launching_on(z):
            entry_gate_forward_kernel[(entry_programs(len(z), block),)](
                entries.values, entries.tokens, entries.features, entries.offsets, z, dense,
                *tensors, *dense.shape, len(z), *steps,
                P=p, Q=q, IDENTITY=identity, SHARED=shared, BLOCK_E=block, num_warps=4, num_stages=1,
            )  # fmt: skip
    return z


def entry_gate_backward(
    entries: Entries,
    dz: Tensor,
    dcount: float,
    dl1: float,
    norms: Tensor | None,
    gate: Sequence[Tensor],
    *,
    p: int,
    q: int,
    identity: bool,
    backward_rational: bool,
) -> tuple[Tensor, Tensor]:
    """Computes dh and dtheta [capacity] float32 from dz [capacity] float32; dtheta is the part of each entry in its
    threshold's gradient.

    dcount: the gradient of every count. dl1: that of every sum of |z|, times the feature's norm (norms [n_features]
    float32, needed unless dl1 is 0). The gradients of a, b, the centre and C_in are not computed; the first three are
    not zero outside the support.
    """
    tensors, steps, shared = _given(entries, gate, p, q)
    if dl1 and (norms is None or norms.shape != gate[5].shape):
        raise ValueError("the gradient of l1 needs the norms of the features")
    dh, dtheta = torch.empty_like(dz), torch.empty_like(dz)
    block = entry_block(p, q, shared)
    if len(dz) > 0:
        with launching_on(dz):
            entry_gate_backward_kernel[(entry_programs(len(dz), block),)](
                entries.values, entries.features, entries.offsets, dz, dz if norms is None else norms, dh, dtheta,
                *tensors, len(entries.offsets) - 1, len(dz), *steps, float(dcount), float(dl1),
                P=p, Q=q, IDENTITY=identity, RATIONAL_BACKWARD=backward_rational, HAS_DL1=dl1 != 0, SHARED=shared,
                BLOCK_E=block, num_warps=4, num_stages=1,
            )  # fmt: skip
    return dh, dtheta


def _given(entries: Entries, gate: Sequence[Tensor], p: int, q: int) -> tuple[list[Tensor], list[int], bool]:
    """The kernels' pointers and steps of a gate, and whether all features share one set."""
    n_features = check_gate(gate, p, q)
    if n_features != len(entries.offsets) - 1:
        raise ValueError(f"the gate has {n_features} features, the entries {len(entries.offsets) - 1}")
    tensors = [gate[k].detach().float().contiguous() for k in (0, 1, 2, 3, 5)]
    steps = [int(len(one) > 1) for one in tensors[:4]]
    return tensors, steps, not any(steps)
