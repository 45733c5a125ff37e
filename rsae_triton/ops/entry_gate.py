"""A gated, clamped, hard gate with frozen coefficients at entries: z, what is active, and the derivative by hand."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from rsae_triton.ops import native
from rsae_triton.ops.explicit import rational_parts
from rsae_triton.ops.native import address, integer
from rsae_triton.ops.reference import GateSpec, GateTensors, rational_gate

LEAST = 2**14
"""Number of entries from which another thread pays."""


def gate_at(h: Tensor, gate: GateTensors, spec: GateSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gate at every entry, as defined in `rational_gate`.

    Args:
        h: [n_entries], in the gate's precision. gate: its rows are those of the entries, or one row that all share.

    Returns:
        z and active [n_entries], differentiable, and where the gate is open [n_entries] (bool; True for NaN).
    """
    opened = ~(h.detach() <= gate.threshold.detach())
    if torch.is_grad_enabled() and any(one.requires_grad for one in gate[:4]):
        z, active = rational_gate(h.unsqueeze(0), gate, spec)
        return z.squeeze(0), active.squeeze(0), opened
    z, active = _Gate.apply(h, gate.threshold, gate, spec)
    return z, active, opened


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, theta: Tensor, gate: GateTensors, spec: GateSpec) -> tuple[Tensor, Tensor]:
        h = h.contiguous()
        wide = (h > theta).to(h.dtype)
        soft = spec.backward == "soft"
        if spec.amplitude == "identity" and not any(ctx.needs_input_grad):
            return h * wide, wide
        r, slope = ramp(h, gate._replace(threshold=theta), spec)
        factor = wide if spec.amplitude == "identity" else r * wide
        # The part of dz that goes through r: none if the forward pass does not depend on r and the derivative is soft.
        through = h if not soft else h * wide if spec.amplitude == "rational" else torch.zeros_like(h)
        ctx.save_for_backward(factor, slope, through)
        ctx.set_materialize_grads(False)
        return h * factor, wide

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        factor, slope, through = ctx.saved_tensors
        dz, dactive = grads
        dr = None if dz is None else dz * through
        dr = dactive if dr is None else dr if dactive is None else dr.add_(dactive)
        if dr is None:
            return None, None, None, None
        dt = dr * slope
        return dt if dz is None else torch.addcmul(dt, dz, factor), -dt, None, None


def ramp(h: Tensor, gate: GateTensors, spec: GateSpec) -> tuple[Tensor, Tensor]:
    """Returns r of h [n_entries] and dr/dh, which is zero outside the ramp; gate: see `gate_at`."""
    theta = gate.threshold.detach().contiguous()
    if native.usable(h, theta) and all(len(one) == 1 for one in gate[:4]):
        r, slope = torch.empty_like(h), torch.empty_like(h)
        a, b = gate.a.contiguous(), pad(gate.b, (1, 0)).contiguous()
        native.split(len(h), lambda start, stop: native.library().ramp(  # type: ignore[union-attr]
            address(h), address(theta), address(a), integer(spec.p), address(b), integer(spec.q),
            ctypes.c_float(gate.centre.item()), ctypes.c_float(gate.input_scale.item()), address(r), address(slope),
            integer(start), integer(stop),
        ), LEAST)  # fmt: skip
        return r, slope
    own = GateTensors(*(one.detach() for one in gate))
    t, _, _, r, slope, _ = (one.squeeze(1) for one in rational_parts(h.unsqueeze(1), own, spec))
    return r, torch.where(t.abs() <= 1, slope / own.input_scale, 0)
