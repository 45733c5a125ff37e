"""Computes `support.run` on a GPU: a library product without its bias, then Triton kernels on the support's entries.

The number of entries stays on the GPU. The lists have a fixed capacity, so nothing waits, no shape depends on a value,
and the step can be captured in a CUDA graph. If there are more entries than the capacity, the loss and its gradients
are NaN; the caller compares the returned size when it reads numbers anyway, and repeats the step densely.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rsae_triton.ops.backends import kernels
from rsae_triton.ops.encode import centred, through_encoder
from rsae_triton.ops.reference import GateSpec
from rsae_triton.ops.step import Step
from rsae_triton.ops.support import has_support
from rsae_triton.ops.tiles import wide
from rsae_triton.ops.workspace import Made, current

DENSITY = 0.0125
"""The fraction of [n_tokens, d_sae] that the lists have room for by default. Above it the dense step is predicted to be
faster (docs/kernels.md)."""


def can_run(spec: GateSpec, wanted: list[bool]) -> bool:
    """Whether these kernels compute everything in `wanted` (in the order of `autoencode`). They do not compute the
    gradients of x and of C_in, which are not needed with frozen coefficients and activations read from disk."""
    return has_support(spec, wanted) and not wanted[0] and not wanted[8]


def capacity_for(places: int) -> int:
    """The number of entries to make room for, given the number of places in [n_tokens, d_sae]. It depends on the shape
    alone, so that a run keeps its memory from step to step."""
    return max(1024, math.ceil(DENSITY * places / 1024) * 1024)


class Code(NamedTuple):
    """A batch's code, as the kernels list it.

    Attributes:
        entries: of the support, by feature (`kernels.Entries`). z: their codes, float32. rows: the active codes by
            token (`kernels.Rows`). counts: [d_sae], on how many tokens each feature is active.
        short: a bool tensor, whether entries did not fit and were left out.
    """

    entries: Any
    z: Tensor
    rows: Any
    counts: Tensor
    short: Tensor


Gradients = Callable[[Tensor, "Tensor | None", "Tensor | None", Tensor, float], "Slopes"]
"""Called with dL/dz of the entries, the gradients of each feature's count and of its sum of |z| (None for zero), the
norms of the decoder's rows, and `unit_of` the step, by which all of these are scaled."""


class Slopes(NamedTuple):
    """dh, dt [capacity] of the entries. A penalty other than l1 and l0 also has its value (a scalar: the mean over
    tokens, times its weight), and sizes [capacity] and a weight: |z| and l1_weight of the norms' gradient."""

    dh: Tensor
    dt: Tensor
    penalty: Tensor | None = None
    sizes: Tensor | None = None
    weight: float = 0.0


def listed(h: Tensor, marks: Any, room: int, gate: Callable[[Any, Tensor], Tensor]) -> Code:
    """Lists the code of h [d_sae, n_tokens] from its marks. gate(entries, h) returns the entries' codes and also writes
    them over h at their places."""
    device = kernels()
    entries = device.list_entries(h, marks, room)
    z = gate(entries, h)  # from here on h's memory holds the codes
    rows = device.list_rows(h, marks, room)
    return Code(entries, z, rows, marks.counts, entries.offsets[-1] > room)


def run(step: Step, capacity: int | None = None) -> tuple[Tensor, ...]:
    """Computes what `support.run` does: total, mse, l1, l0, counts, x_hat, the number of entries, and the gradients of
    total. The number is a tensor on the GPU; if it exceeds the capacity, none of the results may be used."""
    x, W_enc, b_enc, W_dec, b_dec, gate, spec = step[:7]
    device = kernels()
    room = capacity_for(len(x) * len(W_dec)) if capacity is None else capacity
    x_c = centred(x, b_dec if step.subtract else None, step.dtype)
    h = torch.mm(current().cast(W_enc, step.dtype).t(), x_c.t())
    marks = device.support_mark(h, gate.threshold, gate.input_scale, b_enc)
    flags: dict[str, Any] = {"p": spec.p, "q": spec.q, "identity": spec.amplitude == "identity"}
    code = listed(h, marks, room, lambda entries, h: device.entry_gate_forward(entries, gate, h, **flags))
    del h

    def slopes(dz: Tensor, dcounts: Tensor | None, dl1: Tensor | None, norms: Tensor, unit: float) -> Slopes:
        rational = spec.backward == "rational"
        made = device.entry_gate_backward(code.entries, dz, dcounts, dl1, gate, **flags, backward_rational=rational)
        return Slopes(*made)

    return finish(step, x_c, code, slopes)


def unit_of(step: Step) -> float:
    """Returns the factor that gradients are computed with, instead of 1 / n_tokens: in float16 gradients of the mean
    would vanish, and those of the sum overflow."""
    n = max(len(step.x), 1)
    return 1 / n if step.dtype != torch.float16 else 2.0 ** -math.ceil(math.log2(n) / 2)


def finish(
    step: Step, x_c: Tensor, code: Code, slopes: Gradients, also: Callable[[Tensor], tuple[Tensor, Any]] | None = None
) -> tuple[Tensor, ...]:
    """Returns what `run` does, from a code and the gradients of its entries.

    also: called with x_hat - target (times the residual's scale); returns one more term of the loss, and the sums of
    its gradients scaled by `unit_of` the step.
    """
    x, _, _, W_dec, b_dec, _, _, l1_weight, l0_weight, _, target, scale, dtype, _, across = step
    device = kernels()
    exact, mean, unit, d_sae = wide(dtype), 1 / max(len(x), 1), unit_of(step), len(W_dec)
    W_d, entries, memory = current().cast(W_dec, dtype), code.entries, current()
    # NaN if entries were left out, since the results would be silently wrong: x_hat, and so the loss and its gradients.
    bias = torch.where(code.short, torch.nan, b_dec if step.adds_b_dec else 0.0)
    bias = bias.expand(b_dec.shape).to(b_dec.dtype)
    x_hat = device.support_decode(code.rows, W_d, bias)
    if across is not None:
        x_hat = across.sum(x_hat)
    residual = x_hat - (x if target is None else target)
    if scale is not None:
        residual.mul_(scale)
    counts = code.counts.to(exact)
    mse, l0 = residual.square().sum() * mean, counts.sum() * mean
    norms = torch.linalg.vector_norm(W_dec, dim=1, dtype=exact)
    extra = None if also is None else also(residual)
    g = residual.mul_(2 * unit if scale is None else scale * (2 * unit))
    g_p = g.to(dtype)
    dz = device.entry_dots(g_p, W_d, entries)
    dcounts = norms.new_full((d_sae,), l0_weight * unit) if l0_weight else None
    dl1 = norms * (l1_weight * unit) if l1_weight else None
    made = slopes(dz, dcounts, dl1, norms, unit)
    sums = device.feature_sums(entries, code.z, dz, made.dh, made.dt, g_p, x_c, sizes=made.sizes)
    l1 = torch.dot(sums.l1, norms) * mean if made.sizes is None else torch.zeros_like(mse)  # others were added up
    total = mse + l1_weight * l1 + l0_weight * l0
    if made.penalty is not None:
        total = total + made.penalty
    if extra is not None:
        total = total + extra[0]
        for one, more in zip(sums[:4], extra[1][:4], strict=True):
            one.add_(more)
    weight = made.weight if made.sizes is not None else l1_weight
    if memory.whole and extra is None and unit == mean:
        memory.made = _squares(step, sums, norms, weight * unit)
    outcome = (total, mse, l1, l0, counts, x_hat.to(x.dtype), entries.offsets[-1])
    return *outcome, *_gradients(step, sums, g, norms, weight * unit, mean / unit)


def _squares(step: Step, sums: Any, norms: Tensor, l1_weight: float) -> Made:
    """Returns the squared norms of the gradients that `_gradients` makes of these sums, without reading them again."""
    nothing = norms.new_zeros(())
    encoder, decoder = (sums.squares[k].sum() if step.wanted[at] else nothing for k, at in ((1, 1), (0, 3)))
    if not step.wanted[3]:
        return Made(encoder, decoder, decoder, step.dtype)
    radial = torch.where(norms > 0, sums.along / norms, 0).square()
    penalty = sums.l1 * l1_weight  # what the penalty adds, which is along the rows: this many times their directions
    along = 2 * penalty * torch.where(norms > 0, sums.along / norms, 0) + penalty.square()
    return Made(encoder, (sums.squares[0] - radial).clamp_min(0).sum(), decoder + along.sum(), step.dtype)


def _gradients(step: Step, sums: Any, g: Tensor, norms: Tensor, l1_weight: float, rescale: float) -> list[Tensor]:
    """The gradients in the order of `step.likes`, each in its tensor's dtype; empty where not wanted."""
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
        elif place not in found:  # the output scale, which the gated form does not have
            made.append(torch.zeros_like(like))
        else:
            one = found[place]
            made.append((one if rescale == 1 else one * rescale).to(like.dtype))
    return made
