"""The rational gate and the SAE encoder in plain, differentiable PyTorch.

This file defines what every backend computes. It is the oracle of the tests (in float64), the baseline of the
benchmarks, and `backend="eager"`. The notation is that of the paper (arXiv:2606.14990).

    t = (h - theta) / C_in          s = clip(t, -1, 1) - c          r = P(s) / (1 + |B(s)|)
    direct:  z = C_out * (r + max(t - 1, 0))
    gated:   z = h * r              (amplitude "rational")    or    z = h * 1[h > theta]   (amplitude "identity")

The shipped *code* has exact zeros: a feature is active if |z| > activity_threshold (direct) or h > theta (gated).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rsae_triton.common.errors import ConfigError

MAX_DEGREE = 12
FORMS = ("direct", "gated")
DOMAINS = ("clamp", "free")
AMPLITUDES = ("rational", "identity")
BACKWARDS = ("soft", "rational")


@dataclass(frozen=True)
class GateSpec:
    """The settings of a gate, as opposed to its parameters; hashable, so that a backend can specialise on them.

    Attributes:
        p, q: degrees of numerator and denominator, 0 to 12 each.
        form: "direct" (the gate is the rational) or "gated" (the rational is a smooth Heaviside, multiplied by h).
        domain: "clamp" clips t to [-1, 1] and continues a direct gate with slope one; "free" does neither.
        amplitude: in the gated form, what multiplies h where the gate is open: the "rational" r, or the "identity" 1
            (the rational then only affects the backward pass).
        hard: True computes the shipped code (exact zeros), False the dense rational one.
        backward: "soft" is the derivative of the forward computation. "rational" treats the zeros as if the rational
            had made them: the gate's derivative is r' everywhere, active or not.
    """

    p: int
    q: int
    form: str = "direct"
    domain: str = "clamp"
    amplitude: str = "rational"
    hard: bool = True
    backward: str = "soft"

    def __post_init__(self) -> None:
        for name, degree in (("numerator degree", self.p), ("denominator degree", self.q)):
            if isinstance(degree, bool) or not isinstance(degree, int) or not 0 <= degree <= MAX_DEGREE:
                raise ConfigError(f"{name} is {degree!r}; give an integer from 0 to {MAX_DEGREE}")
        for name, value, allowed in (
            ("form", self.form, FORMS),
            ("domain", self.domain, DOMAINS),
            ("amplitude", self.amplitude, AMPLITUDES),
            ("backward", self.backward, BACKWARDS),
        ):
            if value not in allowed:
                raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(allowed)}")
        if self.amplitude == "identity" and (self.form == "direct" or not self.hard):
            raise ConfigError(
                "amplitude='identity' is the hard code of the gated form; use form='gated' and hard=True, "
                "or amplitude='rational'"
            )


class GateTensors(NamedTuple):
    """The parameters of a gate per feature, expanded from its groups; float32 (float64 in the oracle).

    a [G, p+1], b [G, q], centre [G], input_scale [G], output_scale [G] with G = 1 (shared) or d_sae;
    threshold [d_sae], activity_threshold [d_sae].
    """

    a: Tensor
    b: Tensor
    centre: Tensor
    input_scale: Tensor
    output_scale: Tensor
    threshold: Tensor
    activity_threshold: Tensor


class Encoded(NamedTuple):
    """The result of an encoder: the code, and the sums per feature that a loss needs.

    Attributes:
        z: [n_tokens, d_sae], the code in x's dtype.
        counts: [d_sae] float32, on how many tokens each feature is active. In the gated form its derivative is the
            rational's, so that a penalty on its sum (l0) can be trained.
        l1: [d_sae] float32, the sum over tokens of |z| (of z before it is rounded to x's dtype); differentiable.
    """

    z: Tensor
    counts: Tensor
    l1: Tensor


def transformed() -> bool:
    """Whether torch.func (grad, vjp, jvp, vmap, jacfwd, ...) or forward-mode AD is active.

    The operators and kernels have no rules for these; the formulas in this module do.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def refuse_transforms(what: str) -> None:
    """Raises ConfigError if `transformed`: operations without rules for torch.func would fail or return zeros."""
    if transformed():
        raise ConfigError(f"{what} is not for torch.func or forward mode; use encode(x) and decode(z), which are")


class _HardForward(torch.autograd.Function):
    """Returns `hard` and passes the incoming gradient to `soft` (a straight-through estimator, exact in the forward
    pass)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(hard: Tensor, soft: Tensor) -> Tensor:
        return hard.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return tangents[1].clone() if tangents[1] is not None else torch.zeros_like(tangents[0])


def horner(s: Tensor, coefficients: Tensor) -> Tensor:
    """sum_k coefficients[..., k] * s**k; s [n_tokens, d_sae], coefficients [G, degree+1], G = 1 or d_sae."""
    value = coefficients[:, -1].expand_as(s)
    for k in range(coefficients.shape[1] - 2, -1, -1):
        value = value * s + coefficients[:, k]
    return value


def rational(s: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Returns P(s) / (1 + |B(s)|), the safe Pade form, with B = b_1 s + ... + b_q s^q (paper, eq. 3). Shapes: see
    `horner`."""
    numerator = horner(s, a)
    if b.shape[1] == 0:
        return numerator
    return numerator / (1 + (horner(s, b) * s).abs())


def rational_gate(h: Tensor, gate: GateTensors, spec: GateSpec) -> tuple[Tensor, Tensor]:
    """Computes the code from pre-activations, and which of it is active.

    Args:
        h: [n_tokens, d_sae] pre-activations; computed in h's dtype promoted with the coefficients'.
        gate: expanded coefficients. spec: the kind of gate.

    Returns:
        z [n_tokens, d_sae], and active [n_tokens, d_sae] in z's dtype (1 where the code is not set to zero). In the
        gated form the derivative of `active` is r', so that a penalty on its sum (l0) can be trained.
    """
    t = (h - gate.threshold) / gate.input_scale
    u = t.clamp(-1, 1) if spec.domain == "clamp" else t
    r = rational(u - gate.centre, gate.a, gate.b)
    if spec.form == "direct":
        tail = (t - 1).relu() if spec.domain == "clamp" else 0
        z = gate.output_scale * (r + tail)
        active = (z.abs() > gate.activity_threshold).to(z.dtype)
        if not spec.hard:
            return z, active
        return (z * active if spec.backward == "soft" else _HardForward.apply(z * active, z)), active

    open_ = (h > gate.threshold).to(r.dtype)
    active = _HardForward.apply(open_, r)
    if not spec.hard:
        return h * r, active
    multiplier = r * open_ if spec.amplitude == "rational" else open_
    if spec.backward == "rational":
        multiplier = _HardForward.apply(multiplier, r)
    return h * multiplier, active


def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, gate: GateTensors, spec: GateSpec) -> Encoded:
    """Encodes x [n_tokens, d_in] and returns `Encoded`; b_dec is subtracted from x unless it is None."""
    h = (x if b_dec is None else x - b_dec) @ W_enc + b_enc
    accumulator = torch.promote_types(h.dtype, torch.float32)
    z, active = rational_gate(h.to(accumulator), gate, spec)
    return Encoded(z.to(h.dtype), active.sum(0), z.abs().sum(0))
