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
from rsae_triton.ops.reference import GateSpec
from rsae_triton.ops.step import Step
from rsae_triton.ops.support import has_support
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
        x_c: [n_tokens, d_in], and weights: W_enc, both in the dtype of the products.
        entries: of the support, by feature (`kernels.Entries`). z: their codes, float32. rows: the active codes by
            token (`kernels.Rows`). counts: [n_splits, d_sae], on how many tokens of each run a feature is active.
    """

    x_c: Tensor
    weights: Tensor
    entries: Any
    z: Tensor
    rows: Any
    counts: Tensor

    @property
    def short(self) -> Tensor:
        """A bool tensor: whether entries did not fit and were left out."""
        return self.entries.offsets[-1] > len(self.z)


Gradients = Callable[[Tensor, float, float, Tensor, float], "Slopes"]
"""Called with dL/dz of the entries, the gradients of every count and of every sum of |z| times its feature's norm, the
norms of the decoder's rows, and `unit_of` the step, by which all of these are scaled."""


class Slopes(NamedTuple):
    """dh, dtheta [capacity] of the entries. A penalty other than l1 and l0 also has its value (a scalar: the mean over
    tokens, times its weight), and sizes [capacity] and a weight: |z| and l1_weight of the norms' gradient."""

    dh: Tensor
    dtheta: Tensor
    penalty: Tensor | None = None
    sizes: Tensor | None = None
    weight: float = 0.0


def listed(
    x_c: Tensor, weights: Tensor, h: Tensor, marks: Any, room: int, gate: Callable[[Any, Tensor], Tensor]
) -> Code:
    """Lists the code of h [d_sae, n_tokens] from its marks. gate(entries, h) returns the entries' codes and also writes
    them over h at their places."""
    device = kernels()
    entries = device.list_entries(h, marks, room)
    z = gate(entries, h)  # from here on h's memory holds the codes
    rows = device.list_rows(h, marks, room)
    return Code(x_c, weights, entries, z, rows, marks.partial[:, 1])


def marked(
    rows: Tensor, x_c: Tensor, threshold: Tensor, width: Tensor | float, b_enc: Tensor, room: int
) -> tuple[Tensor, Any]:
    """Makes the product of rows, W_enc^T [d_sae, d_in], and x_c [n_tokens, d_in]: h [d_sae, n_tokens], without b_enc;
    and marks its support, where h exceeds threshold - width ([1], [d_sae] or a number).

    If the step's memory has a screen, h holds anything where it is not marked. If there are more candidates than
    `room`, so many are marked as well.
    """
    device, screen = kernels(), current().screen
    if screen is None:
        h = torch.mm(rows, x_c.t())
        return h, device.support_mark(h, threshold, width, b_enc)
    h, margin = screen.product(rows, x_c)
    found = device.support_mark(h, threshold, width, b_enc, margin=margin)
    screen.check(found.support, rows, x_c, threshold, b_enc)
    candidates = device.list_entries(h, found, room)
    h = h if h.dtype == x_c.dtype else torch.empty_like(h, dtype=x_c.dtype)
    device.entry_dots(x_c, rows, candidates, into=h)
    # The h of candidates that were left out is unknown: then all of them count as support, for which there is no room.
    width = torch.where(candidates.offsets[-1] > room, torch.inf, width).reshape(-1)
    return h, device.support_mark(h, threshold, width, b_enc, among=found.support)


def run(step: Step, capacity: int | None = None) -> tuple[Tensor, ...]:
    """Computes what `support.run` does: total, mse, l1, l0, counts, x_hat, the number of entries, and the gradients of
    total. The number is a tensor on the GPU; if it exceeds the capacity, none of the results may be used."""
    x, W_enc, b_enc, W_dec, _, gate, spec = step[:7]
    device = kernels()
    room = capacity_for(len(x) * len(W_dec)) if capacity is None else capacity
    x_c = input_of(step)
    weights = current().cast(W_enc, step.dtype)
    h, marks = marked(weights.t(), x_c, gate.threshold, gate.input_scale, b_enc, room)
    flags: dict[str, Any] = {"p": spec.p, "q": spec.q, "identity": spec.amplitude == "identity"}
    code = listed(x_c, weights, h, marks, room, lambda entries, h: device.entry_gate_forward(entries, gate, h, **flags))
    del h

    def slopes(dz: Tensor, dcount: float, dl1: float, norms: Tensor, unit: float) -> Slopes:
        rational = spec.backward == "rational"
        return Slopes(*device.entry_gate_backward(
            code.entries, dz, dcount, dl1, norms, gate, **flags, backward_rational=rational
        ))  # fmt: skip

    return finish(step, code, slopes)[0]


def input_of(step: Step) -> Tensor:
    """Returns x - b_dec (or x) in the dtype of the products, in one pass."""
    if not step.subtract:
        return step.x.to(step.dtype)
    return torch.sub(step.x, step.b_dec, out=step.x.new_empty(step.x.shape, dtype=step.dtype))


def unit_of(step: Step) -> float:
    """Returns the factor that gradients are computed with, instead of 1 / n_tokens: in float16 gradients of the mean
    would vanish, and those of the sum overflow."""
    n = max(len(step.x), 1)
    return 1 / n if step.dtype != torch.float16 else 2.0 ** -math.ceil(math.log2(n) / 2)


def finish(
    step: Step, code: Code, slopes: Gradients, also: Callable[[Tensor], tuple[Tensor, Any]] | None = None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Returns what `run` does, from a code and the gradients of its entries, and the number of entries once more:
    infinite if they did not fit.

    also: called with x_hat - target (times the residual's scale); returns one more term of the loss, and the sums of
    its gradients scaled by `unit_of` the step.
    """
    x, _, _, W_dec, b_dec, _, _, l1_weight, l0_weight, _, target, scale, dtype, wanted, across = step
    device, memory, entries = kernels(), current(), code.entries
    mean, unit = 1 / max(len(x), 1), unit_of(step)
    W_d, norms = memory.cast(W_dec, dtype), memory.norms(W_dec)
    # NaN if entries were left out, since the results would be silently wrong: x_hat, and so the loss and its gradients.
    given: Any = (code.rows, W_d, b_dec if step.adds_b_dec else None, entries)
    against = (x if target is None else target, scale, 2 * unit, dtype)
    if across is None:
        left = device.support_residual(*given, *against, error=also is not None)
    else:
        x_hat = across.sum(device.support_decode(*given))
        left = device.support_residual(None, W_d, None, None, *against, x_hat=x_hat, error=also is not None)
    dz = device.entry_dots(left.g, W_d, entries)
    made = slopes(dz, l0_weight * unit, l1_weight * unit, norms, unit)
    weight = (l1_weight if made.sizes is None else made.weight) * unit
    sums = device.feature_sums(
        entries, code.z, dz, made.dh, made.dtheta, left.g, code.x_c, sizes=made.sizes,
        penalty=weight, W_dec=W_dec, norms=norms,
    )  # fmt: skip
    extra = None if also is None else also(left.error)
    if extra is not None:
        for one, more in zip(sums[:4], extra[1][:4], strict=True):
            one.add_(more)
    found = device.support_totals(
        entries, left, sums, code.counts, norms, code.weights if step.subtract and wanted[4] else None, b_dec,
        own=step.adds_b_dec, mean=mean, l1_weight=l1_weight, l0_weight=l0_weight, penalty=weight, rescale=mean / unit,
    )  # fmt: skip
    total, l1 = found.total, found.l1
    if made.penalty is not None:  # the sums that `l1` is made of are not of |z| then
        total, l1 = total + made.penalty, torch.zeros_like(l1)
    if extra is not None:
        total = total + extra[0]
    if memory.whole and extra is None and unit == mean:
        own = Made(found.encoder, found.without_radial, found.decoder, dtype)
        own = own if wanted[1] else own._replace(encoder=torch.zeros_like(total))
        if not wanted[3]:
            own = own._replace(without_radial=torch.zeros_like(total), decoder=torch.zeros_like(total))
        memory.made = own
    gradients = {1: sums.encoder.t(), 2: sums.dh, 3: sums.decoder, 10: sums.dtheta}
    outcome = (total, found.mse, l1, found.l0, found.counts, left.x_hat.to(x.dtype), entries.offsets[-1])
    return (*outcome, *_gradients(step, gradients, found.db_dec, mean / unit)), found.entries


def _gradients(step: Step, found: dict[int, Tensor], db_dec: Tensor, rescale: float) -> list[Tensor]:
    """The gradients in the order of `step.likes`, each in its tensor's dtype; empty where not wanted."""
    made = []
    for place, (like, want) in enumerate(zip(step.likes, step.wanted, strict=True)):
        if not want:
            made.append(like.new_empty(0))
        elif place == 4:
            made.append(db_dec)
        elif place not in found:  # the output scale, which the gated form does not have
            made.append(torch.zeros_like(like))
        else:
            one = found[place]
            made.append((one if rescale == 1 else one * rescale).to(like.dtype))
    return made
