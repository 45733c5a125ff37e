"""The gate and its derivative, written out in feature-major order, without autograd.

These functions have three uses: Inductor compiles each into a fused loop (`backend="cpu"` with a C++ compiler), tests
compare the kernels with them, and they define what a backend has to return.
Shapes: h, z, dz are [d_sae, n_tokens]; all tensors of `GateTensors` have G = 1 or d_sae rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rsae_triton.ops.reference import GateSpec, GateTensors


def _column(values: Tensor) -> Tensor:
    return values.unsqueeze(-1)


def _horner(s: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluates a polynomial and its derivative at s; coefficients [G, degree+1]."""
    value = _column(coefficients[:, -1]).expand_as(s)
    slope = torch.zeros_like(s)
    for k in range(coefficients.shape[1] - 2, -1, -1):
        slope = slope * s + value
        value = value * s + _column(coefficients[:, k])
    return value, slope


def rational_parts(h: Tensor, gate: GateTensors, spec: GateSpec) -> tuple[Tensor, ...]:
    """Returns t, s, Q, r, r' and sign(B) for every element."""
    t = (h - _column(gate.threshold)) / _column(gate.input_scale)
    s = (t.clamp(-1, 1) if spec.domain == "clamp" else t) - _column(gate.centre)
    P, dP = _horner(s, gate.a)
    if spec.q == 0:
        one = torch.ones_like(s)
        return t, s, one, P, dP, torch.zeros_like(s)
    B, dB = _horner(s, torch.cat([torch.zeros_like(gate.b[:, :1]), gate.b], dim=1))
    Q, sign = 1 + B.abs(), B.sign()
    r = P / Q
    # Never forms Q^2 or P' Q, which overflow float32 long before r does.
    return t, s, Q, r, (dP - r * sign * dB) / Q, sign


def gate_forward(h: Tensor, gate: GateTensors, spec: GateSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the code z of h [d_sae, n_tokens], in the same shape, and for each feature the number of active tokens
    and sum |z|."""
    opened = (h > _column(gate.threshold)).to(h.dtype)
    if spec.amplitude == "identity":
        z = h * opened
        return z, opened.sum(1), z.abs().sum(1)
    t, _, _, r, _, _ = rational_parts(h, gate, spec)
    if spec.form == "gated":
        z = h * r * opened if spec.hard else h * r
        return z, opened.sum(1), z.abs().sum(1)
    z = _column(gate.output_scale) * (r + (t - 1).clamp(min=0) if spec.domain == "clamp" else r)
    active = (z.abs() > _column(gate.activity_threshold)).to(h.dtype)
    z = z * active if spec.hard else z
    return z, active.sum(1), z.abs().sum(1)


def gate_backward(
    h: Tensor,
    dz: Tensor,
    dcounts: Tensor | None,
    dl1: Tensor | None,
    gate: GateTensors,
    spec: GateSpec,
    coefficients: bool = True,
) -> tuple[Tensor, Tensor, GateTensors]:
    """Returns the gradients of `gate_forward`.

    Args:
        h, dz: [d_sae, n_tokens]. dcounts, dl1: [d_sae] or None, the incoming gradients of counts and l1. Only the gated
            form's counts have a gradient; that of l1 joins dz as dl1 * sign(z), sign(0) = 0.
        coefficients: False skips the gradients of a, b and centre (which are frozen), leaving them zero.

    Returns:
        dh [d_sae, n_tokens]; its sum over tokens (the gradient of b_enc) [d_sae]; and the gradients of the gate, **per
        feature** ([d_sae, ...] even if the coefficients are shared; the caller sums them).
    """
    t, s, Q, r, slope, sign = rational_parts(h, gate, spec)
    inside = (t.abs() <= 1).to(h.dtype) if spec.domain == "clamp" else torch.ones_like(t)
    masked = spec.hard and spec.backward == "soft"
    d_output_scale = h.new_zeros(len(h))
    if spec.form == "direct":
        above = (t > 1).to(h.dtype) if spec.domain == "clamp" else torch.zeros_like(t)
        value = r + above * (t - 1)
        z = _column(gate.output_scale) * value
        active = (z.abs() > _column(gate.activity_threshold)).to(h.dtype)
        if dl1 is not None:
            dz = dz + _column(dl1) * (z * active if spec.hard else z).sign()
        if masked:
            dz = dz * active
        d_output_scale = (dz * value).sum(1)
        dr = dz * _column(gate.output_scale)
        dt = dr * (slope * inside + above)
        dh = dt / _column(gate.input_scale)
    else:
        opened = (h > _column(gate.threshold)).to(h.dtype)
        if dl1 is not None:
            z = h if spec.amplitude == "identity" else h * r
            dz = dz + _column(dl1) * (z * opened if spec.hard else z).sign()
        through_r = torch.zeros_like(h) if masked and spec.amplitude == "identity" else dz * h
        dr = through_r * opened if masked else through_r
        if dcounts is not None:
            dr = dr + _column(dcounts)
        dt = dr * slope * inside
        amplitude = dz if spec.amplitude == "identity" else dz * r
        dh = dt / _column(gate.input_scale) + (amplitude * opened if spec.hard else amplitude)
    d_theta = -dt.sum(1) / gate.input_scale
    d_input_scale = -(dt * t).sum(1) / gate.input_scale
    if coefficients:
        w = dr / Q
        da = torch.stack([(w * s**i).sum(1) for i in range(spec.p + 1)], dim=1)
        v = -w * r * sign
        powers = [(v * s**j).sum(1) for j in range(1, spec.q + 1)]
        db = torch.stack(powers, dim=1) if powers else h.new_zeros(len(h), 0)
        d_centre = -(dr * slope).sum(1)
    else:
        da, db, d_centre = (
            h.new_zeros(len(h), spec.p + 1),
            h.new_zeros(len(h), spec.q),
            h.new_zeros(len(h)),
        )
    unused = torch.zeros_like(d_theta)
    return dh, dh.sum(1), GateTensors(da, db, d_centre, d_input_scale, d_output_scale, d_theta, unused)
