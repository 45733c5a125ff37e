"""Computes the loss of a gated SAE and its gradients on the support: one dense product instead of five.

If the gate is gated, clamped and hard, and its coefficients are frozen, everything except h itself is exactly zero
outside the support {h > theta - C_in}: the code, the gradients of h and of theta, the slope of the counts. So only h is
computed densely, block by block (`find_entries`), and all else on the support's entries. The loss and its gradients
equal those of `pieces.run` up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rsae_triton.ops import entry_loops as loops
from rsae_triton.ops import explicit
from rsae_triton.ops.encode import through_encoder
from rsae_triton.ops.entries import Entries
from rsae_triton.ops.finding import find_entries
from rsae_triton.ops.reference import GateSpec, GateTensors
from rsae_triton.ops.step import Step
from rsae_triton.ops.tiles import wide
from rsae_triton.ops.workspace import current


def has_support(spec: GateSpec, wanted: list[bool]) -> bool:
    """Whether a gate and all gradients in `wanted` (in the order of `autoencode`) are zero outside the gate's
    support."""
    return spec.form == "gated" and spec.domain == "clamp" and spec.hard and not any(wanted[5:8])


def lowest(gate: GateTensors) -> Tensor:
    """Returns theta - C_in [d_sae], below which a gate and its derivatives are zero."""
    return gate.threshold - gate.input_scale


def at_entries(gate: GateTensors, entries: Entries) -> GateTensors:
    """Returns the gate of every entry's feature; tensors that all features share stay one row."""
    return GateTensors(*(one[entries.features] if k >= 5 or len(one) > 1 else one for k, one in enumerate(gate)))


def run(step: Step, *, exact: bool = False, most: int | None = None) -> tuple[Tensor, ...] | None:
    """Computes a sparse step: total, mse, l1, l0, counts, x_hat, the number of entries, and the gradients of total.
    Returns None if there are more entries than `most`."""
    x, W_enc, b_enc, W_dec, b_dec, gate, spec, l1_weight, l0_weight = step[:9]
    subtract, target, scale, dtype, wanted, across = step[9:]
    accurate, memory = wide(dtype), current()
    x_c = (x - b_dec if subtract else x).to(accurate)
    entries = find_entries(x_c, W_enc, b_enc, lowest(gate), most=most, dtype=dtype, screened=not exact)
    if entries is None:
        return None
    mean = 1 / max(len(x), 1)
    own, h = at_entries(gate, entries), entries.values.unsqueeze(1)
    z, active, _ = explicit.gate_forward(h, own, spec)  # every entry is treated as a feature of its own
    counts = loops.sums(active, entries.offsets)
    z = z.squeeze(1)
    x_hat = loops.decode(z, entries.tokens, entries.features, len(x), W_dec).to(accurate)
    if step.adds_b_dec:
        x_hat += b_dec
    if across is not None:
        x_hat = across.sum(x_hat)
    residual = x_hat - (x if target is None else target)
    if scale is not None:
        residual.mul_(scale)
    mse, l0 = residual.square().sum() * mean, counts.sum() * mean
    l1, norms = loops.sums(z.abs(), entries.offsets), torch.linalg.vector_norm(W_dec, dim=1, dtype=accurate)
    l1_mean = torch.dot(l1, norms) * mean
    total = mse + l1_weight * l1_mean + l0_weight * l0
    size = torch.tensor(len(z))
    if not any(wanted):
        return total, mse, l1_mean, l0, counts, x_hat.to(x.dtype), size, *(x.new_empty(0) for _ in wanted)
    g = residual.mul_(2 * mean if scale is None else scale * (2 * mean))
    dz = loops.dots(g, entries.tokens, entries.features, entries.offsets, W_dec).unsqueeze(1)
    dcounts = z.new_full((len(z),), l0_weight * mean) if l0_weight else None
    dl1 = norms[entries.features] * (l1_weight * mean) if l1_weight else None
    dh, db, grads = explicit.gate_backward(h, dz, dcounts, dl1, own, spec, coefficients=False)
    dh, db_enc = dh.squeeze(1), loops.sums(db, entries.offsets)

    def rows(values: Tensor, of: Tensor, out: Tensor) -> Tensor:
        return loops.rows([(values, of)], entries.tokens, entries.offsets, out, add=False)

    def dx() -> Tensor:
        made = loops.decode(dh, entries.tokens, entries.features, len(x), W_enc.t())
        return made.sub_(g) if target is None else made

    def of_encoder() -> Tensor:
        # In W_enc's memory layout; otherwise it would be copied when it becomes the parameter's gradient.
        out = memory.gradient(W_enc, wide(W_enc.dtype))
        made = rows(dh, x_c, out.t() if out.t().is_contiguous() else torch.empty_like(out.t())).t()
        return made if made.stride() == out.stride() else out.copy_(made)

    def of_decoder() -> Tensor:
        made = rows(z, g, memory.gradient(W_dec, wide(W_dec.dtype)))
        if l1_weight:
            made.addcmul_(W_dec, (torch.where(norms > 0, l1 / norms, 0) * (l1_weight * mean)).unsqueeze(1))
        return made

    def db_dec() -> Tensor:
        own = g.sum(0) if step.adds_b_dec else g.new_zeros(g.shape[1])
        return own - through_encoder(W_enc, db_enc) if subtract else own

    def folded(k: int) -> Tensor:
        per_feature = loops.sums(grads[k], entries.offsets)
        return per_feature if len(gate[k]) == len(per_feature) else per_feature.double().sum(0, keepdim=True)

    nothing = [lambda k=k: torch.zeros_like(gate[k]) for k in range(3)]
    made = (dx, of_encoder, lambda: db_enc, of_decoder, db_dec, *nothing, *(lambda k=k: folded(k) for k in (3, 4, 5)))
    gradients = (
        make().to(like.dtype) if want else like.new_empty(0)
        for make, like, want in zip(made, step.likes, wanted, strict=True)
    )
    return total, mse, l1_mean, l0, counts, x_hat.to(x.dtype), size, *gradients
