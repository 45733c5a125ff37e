"""The sparse step of teachers and controls on a GPU: `support_triton` with other ways to find the code in h.

ReLU and JumpReLU codes are found like a Rational SAE's: a pass over h marks what is above a threshold. BatchTopK does
the same once its threshold is known. TopK ranks the features of each token: the library's top-k returns exactly k
entries for each, which are then sorted by feature. No shape depends on a value, so nothing waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rsae_triton.ops.autoencode import Autoencoded, Computed
from rsae_triton.ops.backends import kernels
from rsae_triton.ops.reference import GateSpec, GateTensors
from rsae_triton.ops.step import Step
from rsae_triton.ops.support_triton import Code, Slopes, finish, input_of, listed, marked, unit_of
from rsae_triton.ops.workspace import current

TIES = 8
"""BatchTopK keeps all values that equal the last one; there is room for n_tokens * k / TIES (and 1024) more."""


@dataclass(frozen=True)
class Kept:
    """How a teacher selects its code from h.

    Attributes:
        ranks: "" for everything above a threshold, "token" for the k largest of every token, "batch" for the n_tokens *
            k largest of all (those above 0). k: for these. relu: False also keeps negative values of a token.
        width: of the rectangle through which a threshold is trained, 0 for none. to_h: whether its slope is also passed
            to h.
        bounded: the weight of sum_f tanh(4 |z_f| ||W_dec_f||), averaged over tokens.
        aux_k, aux_weight: how many of the `dead` features [d_sae] (bool) of every token reconstruct the residual, and
            the weight of the error (TopK's auxiliary loss); none if `dead` is None.
    """

    ranks: str = ""
    k: int = 0
    relu: bool = True
    width: float = 0.0
    to_h: bool = False
    bounded: float = 0.0
    aux_k: int = 0
    aux_weight: float = 0.0
    dead: Tensor | None = None

    def room(self, n_tokens: int, most: int) -> int:
        """Returns the number of entries to make room for; most: that number if nothing else limits it."""
        if self.ranks == "token":
            return n_tokens * self.k
        return n_tokens * self.k * (TIES + 1) // TIES + 1024 if self.ranks == "batch" else most


def autoencode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    threshold: Tensor,
    kept: Kept,
    most: int,
    **loss: Any,
) -> tuple[Autoencoded, Tensor | None]:
    """Computes what `rational_autoencode` does, and for "batch" also returns the smallest value that was kept (NaN if
    the entries did not fit). If they did not fit, `entries` is infinite and the loss NaN.

    threshold: [d_sae]; zeros if something is ranked. most: the room for entries then. loss: the fields of `Step` from
    l1_weight on, except `wanted`.
    """
    none = threshold.new_empty(0)
    gate = GateTensors(none, none, none, none, none, threshold, none)
    differentiable = (x, W_enc, b_enc, W_dec, b_dec, *gate[:6])
    wanted = [torch.is_grad_enabled() and one.requires_grad for one in differentiable]
    step = Step(x, W_enc, b_enc, W_dec, b_dec, gate, GateSpec(0, 0), wanted=wanted, **loss)
    smallest: list[Tensor] = []
    results = Computed.apply(step, lambda own: run(own, kept, most, smallest.append), *differentiable)
    return Autoencoded(*results[:7]), smallest[0] if smallest else None


def run(step: Step, kept: Kept, most: int, smallest: Callable[[Tensor], Any]) -> tuple[Tensor, ...]:
    """Returns the fields of `Autoencoded`, then the gradients of total in the order of `step.likes`; see `autoencode`.
    smallest: called with the smallest value kept."""
    device, b_enc = kernels(), step.b_enc
    thresholds = step.gate.threshold.detach().float().contiguous()
    x_c = input_of(step)
    weights, room = current().cast(step.W_enc, step.dtype), kept.room(len(x_c), most)
    if kept.ranks == "token":
        h = torch.addmm(b_enc.to(step.dtype), x_c, weights)  # token by token, the layout that top-k reads
        if not kept.relu:
            thresholds = torch.full_like(thresholds, -torch.inf)
        code = _of_tokens(x_c, weights, h, kept.k, kept.relu)
        ranked = h if kept.dead is not None else None
    else:
        if kept.ranks == "batch":
            # The bias is added inside the product, so that the same numbers are ranked and compared.
            h = torch.addmm(b_enc.to(step.dtype).unsqueeze(1), weights.t(), x_c.t())
            floor = _smallest(h, len(x_c) * kept.k)
            above_zero = torch.where(floor > 0, torch.nextafter(floor, torch.zeros_like(floor)), floor)
            thresholds = above_zero.expand_as(thresholds).contiguous()
            marks = device.support_mark(h, thresholds, 0.0, None)
        else:
            h, marks = marked(weights.t(), x_c, thresholds, kept.width / 2, b_enc, room)
        ranked = h.t().clone() if kept.dead is not None else None  # a copy, because h's memory will hold the codes
        code = listed(x_c, weights, h, marks, room, lambda entries, h: device.threshold_forward(entries, thresholds, h))
        if kept.ranks == "batch":
            smallest(torch.where(code.short, torch.nan, floor))
    del h

    def slopes(dz: Tensor, dcount: float, dl1: float, norms: Tensor, unit: float) -> Slopes:
        made = device.threshold_backward(
            code.entries, thresholds, dz, dcount, dl1, norms, width=kept.width, to_h=kept.to_h,
            bounded=kept.bounded * unit,
        )  # fmt: skip
        if made.bounded is None:
            return Slopes(made.dh, made.dtheta)
        mean = kept.bounded / max(len(x_c), 1)
        return Slopes(made.dh, made.dtheta, made.bounded * mean, made.sizes, kept.bounded)

    def also(residual: Tensor) -> tuple[Tensor, Any]:
        assert ranked is not None
        assert kept.dead is not None
        return _auxiliary(step, kept, kept.dead, ranked, code, residual)

    outcome, entries = finish(step, code, slopes, None if ranked is None else also)
    return *outcome[:6], entries, *outcome[7:]


def _of_tokens(x_c: Tensor, weights: Tensor, h: Tensor, k: int, relu: bool) -> Code:
    """Lists the k largest of every token of h [n_tokens, d_sae]."""
    device = kernels()
    (n, d_sae), k = h.shape, min(k, h.shape[1])
    top = h.topk(k, dim=1, sorted=False)
    features, z = top.indices.flatten().to(torch.int32), top.values.flatten()
    codes = z.relu() if relu else z
    tokens = torch.empty_like(features)
    by_feature, order = features.sort(stable=True)  # stable, so that a feature's entries are sorted by token
    offsets = torch.searchsorted(by_feature, torch.arange(d_sae + 1, dtype=torch.int32, device=h.device))
    torch.floor_divide(order, k, out=tokens)
    entries = device.Entries(tokens, by_feature, z[order].float(), offsets)
    ends = torch.arange(0, n * k + 1, k, device=h.device)
    own = entries.values.relu() if relu else entries.values
    counts = pad((own != 0).cumsum(0), (1, 0))[offsets].diff()
    return Code(x_c, weights, entries, own, device.Rows(features, codes, ends), counts[None])


def _smallest(h: Tensor, count: int) -> Tensor:
    """Returns the smallest of the `count` largest values of relu(h), in float32."""
    if count == 0:
        return h.new_zeros((), dtype=torch.float32)
    return h.flatten().topk(count, sorted=False).values.min().clamp_min(0).float()


def _auxiliary(
    step: Step, kept: Kept, dead: Tensor, h: Tensor, main: Code, residual: Tensor
) -> tuple[Tensor, Any]:  # fmt: skip
    """Reconstructs the residual with the aux_k strongest dead features of every token. Returns the error and the sums
    of its gradients."""
    device, unit, mean = kernels(), unit_of(step), 1 / max(len(step.x), 1)
    code = _of_tokens(main.x_c, main.weights, h.masked_fill(~dead, -torch.inf), kept.aux_k, relu=True)
    W_d, scale = current().cast(step.W_dec, step.dtype), 1.0 if step.scale is None else step.scale
    left = device.support_decode(code.rows, W_d, None) * scale
    error = residual + left  # the residual is x_hat - x here
    g = (error * (2 * unit * kept.aux_weight) * scale).to(step.dtype)
    dz = device.entry_dots(g, W_d, code.entries)
    dh = torch.where(code.z > 0, dz, 0)
    sums = device.feature_sums(code.entries, code.z, dz, dh, torch.zeros_like(dh), g, main.x_c)
    return error.square().sum() * (mean * kept.aux_weight), sums
