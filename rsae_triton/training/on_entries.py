"""The loss of teachers and controls computed on the entries of their codes: one dense product instead of five.

The code and the gradients of a ReLU SAE are zero where h <= 0, those of a JumpReLU below the rectangle under its
threshold, and those of TopK and BatchTopK for all features that were not kept. Up to rounding the loss is that of
`recipes.losses`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from rsae_triton.ops.across import Across, sum_of
from rsae_triton.ops.backends import resolve_backend
from rsae_triton.ops.encode import product_dtype
from rsae_triton.ops.entries import Entries, collected, decode_at, each_at, encode_at, lengths, sum_at
from rsae_triton.ops.finding import find_entries, find_largest, find_most
from rsae_triton.ops.support import lowest
from rsae_triton.ops.teacher_triton import Kept, autoencode
from rsae_triton.sae.architectures import JumpReluSAE, ReluSAE, TopKSAE, opened
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.batch_topk import BatchTopKSAE
from rsae_triton.sae.rational import FusedRationalSAE

TANH_SLOPE = 4.0
AUXILIARY_SHARE = 1 / 32
PRE_ACT = 0.003
"""Weight of the loss that pulls dead features towards their thresholds, where they have no other gradient."""
PROBED = 64
"""How many tokens of a batch are used to estimate the size of its support."""


class Terms(NamedTuple):
    """The terms total, mse, l0 (scalars), counts [d_sae], and the number of entries. From the kernels that number is a
    tensor; it is infinite, and the loss NaN, if the entries did not fit."""

    total: Tensor
    mse: Tensor
    l0: Tensor
    counts: Tensor
    entries: int | Tensor


def reason_against(sae: SparseAutoencoder, *, soft: bool, aux_k: int, frozen: set[str]) -> str | None:
    """Returns why an SAE cannot be trained on its entries alone, or None if it can. frozen: names that are not
    trained."""
    if sae.W_dec.dtype not in (torch.float32, torch.float64):
        return f"weights of {sae.W_dec.dtype}; use sae.float()"
    if type(sae) in (ReluSAE, JumpReluSAE, TopKSAE, BatchTopKSAE):
        return None
    if not isinstance(sae, FusedRationalSAE) or sae.compares_features:
        return f"a {sae.architecture} SAE"
    if getattr(sae, "d_out", sae.d_in) != sae.d_in:
        return "a transcoder whose d_out is not d_in"
    if sae.backend == "eager":
        return "backend='eager', which computes everything"
    if soft or sae.gate.form != "gated" or sae.gate.domain != "clamp":
        return "a gate that is direct, free or soft, which is zero nowhere"
    if aux_k:
        return "a recipe with an auxiliary loss"
    trained = {name.removeprefix("gate.") for name, one in sae.named_parameters() if one.requires_grad} - frozen
    if trained & {"alpha", "beta", "centre"}:
        return "trained gate coefficients, which every place has a gradient for"
    return None


def by_triton(sae: SparseAutoencoder, frozen: set[str], aux_k: int = 0) -> bool:
    """Whether sparse steps of this SAE use `support_triton` or `teacher_triton`. frozen: names that are not trained.
    aux_k: of the recipe."""
    if sae.W_dec.device.type != "cuda":
        return False
    if isinstance(sae, FusedRationalSAE):
        trained = sae.gate.log_input_scale.requires_grad and "log_input_scale" not in frozen
        return not trained and resolve_backend(sae.backend, sae.W_dec.device, sae.W_dec.dtype).startswith("triton")
    ranks = isinstance(sae, TopKSAE | BatchTopKSAE)
    if not ranks and (aux_k or type(sae) not in (ReluSAE, JumpReluSAE)):  # dead features below thresholds need all of h
        return False
    return resolve_backend("auto", sae.W_dec.device, sae.W_dec.dtype).startswith("triton")


@torch.no_grad()
def probed_share(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """`support_share` as a tensor, without waiting for its value."""
    if isinstance(sae, TopKSAE | BatchTopKSAE):
        return torch.tensor(sae.k / sae.d_sae, dtype=torch.float64, device=x.device)
    h = torch.addmm(sae.b_enc, _probe(sae, sae.sides(x)[0]), sae.W_enc)
    return (~(h <= _low(sae))).double().mean()


def support_share(sae: SparseAutoencoder, x: Tensor) -> float:
    """Estimates the fraction of [n_tokens, d_sae] that the entries are, from some tokens of x."""
    if isinstance(sae, TopKSAE | BatchTopKSAE):
        return sae.k / sae.d_sae
    x_c = _probe(sae, sae.sides(x)[0])
    entries = find_entries(x_c, sae.W_enc, sae.b_enc, _low(sae))
    assert entries is not None
    return len(entries.tokens) / max(len(x_c) * sae.d_sae, 1)


def _probe(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """The input of the encoder's product for some tokens. Raises ShapeError if x does not fit this SAE."""
    x = sae._check_last(x[:PROBED], "x", "d_in", sae.d_in)
    return _centred(sae, sae.normalization(x).apply(x))


def losses_on_entries(
    sae: SparseAutoencoder,
    x: Tensor,
    *,
    sparsity: str,
    weight: float,
    aux_k: int = 0,
    dead: Tensor | None = None,
    most: int | None = None,
    exact: bool = False,
    across: Across | None = None,
    kernels: bool = False,
) -> Terms | None:
    """mse + weight * sparsity of a teacher or control, as in `recipes.losses`. Returns None if there are more entries
    than `most`, or NaN where a code is ranked. kernels: use Triton (`by_triton`), which never returns None."""
    if kernels:
        assert most is not None
        return _by_kernels(sae, x, sparsity, weight, aux_k, dead, most, across)
    affine = sae.normalization(x)
    x_c = _centred(sae, affine.apply(x))
    W_enc, W_dec = collected(sae.W_enc), collected(sae.W_dec)
    entries = _entries(sae, x_c, most, exact)
    if entries is None:
        return None
    h = encode_at(x_c, W_enc, sae.b_enc, entries)
    if isinstance(sae, JumpReluSAE):
        active = opened(h, each_at(sae.threshold.to(h.dtype), entries), sae.bandwidth, sae.slope_to_h)
        z = h * active
    else:
        z = h if isinstance(sae, TopKSAE) and not sae.relu else h.relu()
        active = (z != 0).to(h.dtype)
    part = decode_at(z, entries, W_dec)
    if across is None or across.first:
        part = part + sae.b_dec
    x_hat = affine.undo(sum_of(part, across))
    residual = x - x_hat
    mse = residual.square().sum(-1).mean()
    counts = sum_at(active, entries)
    l0, total = counts.sum() / len(x), mse
    if sparsity == "l1":
        total = total + weight * (sum_at(z.abs(), entries) * lengths(W_dec)).sum() / len(x)
    elif sparsity == "tanh":
        sizes = z.abs() * each_at(lengths(W_dec), entries)
        total = total + weight * torch.tanh(TANH_SLOPE * sizes).sum() / len(x)
    elif sparsity == "l0":
        total = total + weight * l0
    if aux_k and dead is not None and bool(dead.any()):
        left = _auxiliary(sae, x_c, W_enc, W_dec, dead, aux_k)
        if left is None:
            return None
        total = total + (residual.detach() - affine.scale * left).square().sum(-1).mean() * AUXILIARY_SHARE
        total = total + below_thresholds(sae, x, dead)
    return Terms(total, mse.detach(), l0.detach(), counts.detach(), len(entries.tokens))


def _by_kernels(
    sae: SparseAutoencoder, x: Tensor, sparsity: str, weight: float, aux_k: int, dead: Tensor | None, most: int,
    across: Across | None,
) -> Terms:  # fmt: skip
    threshold = sae.threshold if isinstance(sae, JumpReluSAE) else torch.zeros_like(sae.b_enc)
    kept = Kept(bounded=weight if sparsity == "tanh" else 0.0)
    if isinstance(sae, JumpReluSAE):
        kept = replace(kept, width=sae.bandwidth, to_h=sae.slope_to_h)
    elif isinstance(sae, TopKSAE | BatchTopKSAE):
        ranks = {"ranks": "token", "relu": sae.relu} if isinstance(sae, TopKSAE) else {"ranks": "batch"}
        kept = replace(kept, k=sae.k, **ranks)
        if aux_k and dead is not None and bool(dead.any()):
            kept = replace(kept, aux_k=aux_k, aux_weight=AUXILIARY_SHARE, dead=dead)
    affine = sae.normalization(x)
    target, scale = affine.target(x)
    found, smallest = autoencode(
        affine.apply(x), sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, threshold, kept, most,
        l1_weight=weight if sparsity == "l1" else 0.0, l0_weight=weight if sparsity == "l0" else 0.0,
        subtract=sae.apply_b_dec_to_input, target=target, scale=scale, dtype=product_dtype(x), across=across,
    )  # fmt: skip
    if smallest is not None and isinstance(sae, BatchTopKSAE):
        sae.remember_(smallest)
    return Terms(found.total, found.mse.detach(), found.l0.detach(), found.counts.detach(), found.entries)


def below_thresholds(sae: SparseAutoencoder, x: Tensor, dead: Tensor) -> Tensor | float:
    """The mean distance of a ReLU or JumpReLU SAE's dead features below their thresholds. It gives them a gradient
    where the auxiliary loss has none ("pre-act loss", https://transformer-circuits.pub/2025/january-update)."""
    if type(sae) not in (ReluSAE, JumpReluSAE):
        return 0.0
    names = dead.nonzero().squeeze(1)
    h = _centred(sae, sae.normalization(x).apply(x)) @ sae.W_enc[:, names] + sae.b_enc[names]
    threshold = sae.threshold[names] if isinstance(sae, JumpReluSAE) else 0.0
    return PRE_ACT * ((threshold - h).relu() * sae.W_dec[names].norm(dim=1)).sum(-1).mean()


def _entries(sae: SparseAutoencoder, x_c: Tensor, most: int | None, exact: bool) -> Entries | None:
    if isinstance(sae, TopKSAE):
        return find_largest(x_c, sae.W_enc, sae.b_enc, sae.k, least=0.0 if sae.relu else -math.inf)
    if isinstance(sae, BatchTopKSAE):
        found = find_most(x_c, sae.W_enc, sae.b_enc, len(x_c) * sae.k)
        if found is None:
            return None
        sae.remember_(found[1])
        return found[0]
    return find_entries(x_c, sae.W_enc, sae.b_enc, _low(sae), most=most, screened=not exact)


def _low(sae: SparseAutoencoder) -> Tensor:
    """The pre-activations below which code and gradients are zero, [d_sae]."""
    if isinstance(sae, FusedRationalSAE):
        return lowest(sae.gate.tensors()).detach()
    if isinstance(sae, JumpReluSAE):
        return sae.threshold.detach() - sae.bandwidth / 2
    return torch.zeros_like(sae.b_enc)


def _centred(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    return x - sae.b_dec if sae.apply_b_dec_to_input else x


def _auxiliary(
    sae: SparseAutoencoder, x_c: Tensor, W_enc: Tensor, W_dec: Tensor, dead: Tensor, k: int
) -> Tensor | None:
    """The reconstruction of the residual by the k strongest dead features of every token (arXiv:2406.04093, app.
    A.2)."""
    names = dead.nonzero().squeeze(1)
    rows = sae.W_enc.detach().t()[names]
    found = find_largest(x_c.detach(), rows.t(), sae.b_enc.detach()[names], k, least=0.0)
    if found is None:
        return None
    counts = torch.zeros(len(dead), dtype=torch.int64, device=dead.device)
    counts[names] = found.offsets.diff()
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    entries = Entries(found.tokens, names[found.features], found.values, offsets, found.n_tokens)
    return decode_at(encode_at(x_c, W_enc, sae.b_enc, entries), entries, W_dec)
