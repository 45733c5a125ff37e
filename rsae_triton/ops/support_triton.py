"""`support.run` on a GPU: a library product without its bias, then Triton kernels that work on the support's entries.

How many entries there are stays on the GPU. The lists have a fixed capacity, so nothing waits, no shape depends on a
value, and the step can be captured in a CUDA graph. Where there are more entries than the capacity the loss and its
gradients are NaN: the caller compares the size that is returned when it looks at numbers anyway, and makes the step
densely instead.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rsae_triton.ops.backends import kernels
from rsae_triton.ops.encode import centred, through_encoder
from rsae_triton.ops.reference import GateSpec
from rsae_triton.ops.step import Step
from rsae_triton.ops.support import has_support
from rsae_triton.ops.tiles import wide

DENSITY = 0.0125
"""Share of [n_tokens, d_sae] that the lists have room for by default: above it, as predicted, the dense step is faster
(docs/kernels.md)."""


def can_run(spec: GateSpec, wanted: list[bool]) -> bool:
    """Whether these kernels make all that is `wanted` (in the order of `autoencode`): not the gradients of x and of
    C_in, which frozen coefficients and activations read from disk do not need."""
    return has_support(spec, wanted) and not wanted[0] and not wanted[8]


def capacity_for(places: int) -> int:
    """Room for entries in so many places of [n_tokens, d_sae]: a function of shape alone, so that a run keeps its
    memory from step to step."""
    return max(1024, math.ceil(DENSITY * places / 1024) * 1024)


def run(step: Step, capacity: int | None = None) -> tuple[Tensor, ...]:
    """As `support.run`: total, mse, l1, l0, counts, x_hat, the number of entries (a tensor on the GPU, more than the
    capacity where nothing of this is to be used), and the gradients of total."""
    x, W_enc, b_enc, W_dec, b_dec, gate, spec, l1_weight, l0_weight = step[:9]
    subtract, target, scale, dtype, _, across = step[9:]
    device = kernels()
    (n, _), d_sae, exact = x.shape, len(W_dec), wide(dtype)
    room = capacity_for(n * d_sae) if capacity is None else capacity
    mean = 1 / max(n, 1)
    # Gradients of the mean; in float16 those would vanish, and those of the sum overflow.
    unit = mean if dtype != torch.float16 else 2.0 ** -math.ceil(math.log2(max(n, 1)) / 2)
    x_c, W_d = centred(x, b_dec if subtract else None, dtype), W_dec.to(dtype)
    h = torch.mm(W_enc.t().to(dtype), x_c.t())
    marks = device.support_mark(h, gate.threshold, gate.input_scale, b_enc)
    entries = device.list_entries(h, marks, room)
    flags: dict[str, Any] = {"p": spec.p, "q": spec.q, "identity": spec.amplitude == "identity"}
    z = device.entry_gate_forward(entries, gate, h, **flags)  # h's memory holds the codes from here on
    rows = device.list_rows(h, marks, room)
    del h
    size = entries.offsets[-1]
    # NaN where entries were left out, which would be wrong without a word: x_hat, and so the loss and its gradients.
    bias = torch.where(size > room, torch.nan, b_dec if step.adds_b_dec else 0.0)
    bias = bias.expand(b_dec.shape).to(b_dec.dtype)
    x_hat = device.support_decode(rows, W_d, bias)
    if across is not None:
        x_hat = across.sum(x_hat)
    residual = x_hat - (x if target is None else target)
    if scale is not None:
        residual.mul_(scale)
    counts = marks.counts.to(exact)
    mse, l0 = residual.square().sum() * mean, counts.sum() * mean
    norms = torch.linalg.vector_norm(W_dec, dim=1, dtype=exact)
    g = residual.mul_(2 * unit if scale is None else scale * (2 * unit))
    g_p = g.to(dtype)
    dz = device.entry_dots(g_p, W_d, entries)
    dcounts = norms.new_full((d_sae,), l0_weight * unit) if l0_weight else None
    dl1 = norms * (l1_weight * unit) if l1_weight else None
    rational = spec.backward == "rational"
    dh, dt = device.entry_gate_backward(entries, dz, dcounts, dl1, gate, **flags, backward_rational=rational)
    sums = device.feature_sums(entries, z, dh, dt, g_p, x_c)
    l1 = torch.dot(sums.l1, norms) * mean
    total = mse + l1_weight * l1 + l0_weight * l0
    outcome = (total, mse, l1, l0, counts, x_hat.to(x.dtype), size)
    return *outcome, *_gradients(step, sums, g, norms, l1_weight * unit, mean / unit)


def _gradients(step: Step, sums: Any, g: Tensor, norms: Tensor, l1_weight: float, rescale: float) -> list[Tensor]:
    """In the order of `step.likes`, each in its tensor's dtype, of no elements where it is not wanted."""
    wanted, W_dec = step.wanted, step.W_dec
    found: dict[int, Tensor] = {1: sums.encoder.t(), 2: sums.dh, 3: sums.decoder, 10: -sums.dt / step.gate.input_scale}
    if wanted[3] and l1_weight:
        sums.decoder.addcmul_(W_dec, (torch.where(norms > 0, sums.l1 / norms, 0) * l1_weight).unsqueeze(1))
    if wanted[4]:
        found[4] = g.sum(0) if step.adds_b_dec else torch.zeros_like(g[0])
        if step.subtract:
            found[4] = found[4] - through_encoder(step.W_enc, sums.dh)
    made = []
    for place, (like, want) in enumerate(zip(step.likes, wanted, strict=True)):
        if not want:
            made.append(like.new_empty(0))
        elif place not in found:  # of the output scale, which the gated form does not have
            made.append(torch.zeros_like(like))
        else:
            one = found[place]
            made.append((one if rescale == 1 else one * rescale).to(like.dtype))
    return made
