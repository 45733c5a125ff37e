"""Under `sparse.py`: finding the codes that are not zero in plain PyTorch, and the differentiable sparse decoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from . import cpu, explicit, ops
from .reference import GateSpec, GateTensors, rational_gate
from .teachers.architectures import TopKSAE

if TYPE_CHECKING:
    from .base import SparseAutoencoder

CHUNK = 2**22
"""Elements of the dense code that exist at a time (16 MiB in float32)."""
TOKENS = 4096
"""Tokens that are multiplied with a chunk of W_enc's columns at a time."""


class Entries(NamedTuple):
    """The codes that are not zero, sorted by token and then by feature; each [n_entries]."""

    tokens: Tensor
    features: Tensor
    values: Tensor


def chunks(rows: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """Runs of rows with the number of their first one; one empty run of an empty tensor, for its dtype's sake."""
    for first in range(0, max(len(rows), 1), size):
        yield first, rows[first : first + size]


def entries_of_gate(x_c: Tensor, W_enc: Tensor, b_enc: Tensor, gate: GateTensors, spec: GateSpec) -> Iterator[Entries]:
    """Codes of x_c [n_tokens, d_in] for each run of tokens; dense are only [features, tokens] chunks of CHUNK.

    Of a gated code nothing is computed but h where h <= theta.
    """
    for n0, part in chunks(x_c, TOKENS):
        found = []
        step = max(CHUNK // max(len(part), 1), 1)
        for f0 in range(0, W_enc.shape[1], step):
            columns = slice(f0, f0 + step)
            own = _take(gate, columns)
            h = torch.addmm(b_enc[columns, None].to(x_c.dtype), W_enc[:, columns].t(), part.t())
            wide = h.to(torch.promote_types(h.dtype, torch.float32))
            if spec.form == "gated":
                flat = (~(wide <= own.threshold[:, None])).reshape(-1).nonzero().squeeze(1)  # NaN is let through
                each = _take(own, flat // len(part))
                values = rational_gate(wide.reshape(1, -1)[:, flat], each, spec)[0][0].to(h.dtype)
            else:
                forward = cpu.gate_forward if h.device.type == "cpu" else explicit.gate_forward
                z = forward(wide, own, spec)[0].to(h.dtype)
                flat = (z != 0).reshape(-1).nonzero().squeeze(1)
                values = z.reshape(-1)[flat]
            flat, values = flat[values != 0], values[values != 0]
            found.append(Entries(flat % len(part), flat // len(part) + f0, values))
        tokens, features, values = (torch.cat(one) for one in zip(*found, strict=True))
        tokens, order = tokens.sort(stable=True)
        yield Entries(tokens + n0, features[order], values[order])


def _take(gate: GateTensors, features: slice | Tensor) -> GateTensors:
    """The gate of some features. The threshold has one row for each; what is shared has a single one."""
    n_features = len(gate.threshold)
    return GateTensors(*(t if len(t) == 1 < n_features else t[features] for t in gate))


def entries_of_codes(sae: SparseAutoencoder, rows: Tensor, k: int | None) -> Iterator[Entries]:
    """Codes of rows [n_tokens, d_in] by any SAE, which makes them dense for CHUNK // d_sae tokens at a time."""
    for n0, part in chunks(rows, max(CHUNK // sae.d_sae, 1)):
        z = sae.hidden_pre(part).relu() if isinstance(sae, TopKSAE) else sae.encode(part)
        found = entries_of(z if k is None else first_largest(z, k))
        yield found._replace(tokens=found.tokens + n0)


def entries_of(z: Tensor) -> Entries:
    """What is not zero (NaN is not) in z [n_tokens, d_sae], looked for in the order that z has in memory."""
    if z.is_contiguous() or not z.t().is_contiguous():
        flat = (z != 0).reshape(-1).nonzero().squeeze(1)
        tokens, features = flat // z.shape[1], flat % z.shape[1]
    else:
        flat = (z.t() != 0).reshape(-1).nonzero().squeeze(1)
        tokens, order = (flat % len(z)).sort(stable=True)
        features = flat[order] // len(z)
    return Entries(tokens, features, z[tokens, features])


def first_largest(z: Tensor, k: int) -> Tensor:
    """z [n_tokens, d_sae] with zeros everywhere but at each token's k largest positive codes.

    Of equal codes those of the lowest index are kept; torch.topk leaves that open. NaN is kept.
    """
    z = z.clamp(min=0)
    least = z.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    keep = ~(z < least)  # true where either is NaN
    tied = (keep.sum(-1) > k) & (least.squeeze(-1) > 0)
    if bool(tied.any()):
        some, level = z[tied], least[tied]
        equal, above = some == level, some > level
        keep[tied] = above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    return torch.where(keep, z, 0)


def used(counts: Tensor, width: int) -> Tensor:
    """Which of `width` places are in use, [..., width] bool, from how many of each token are."""
    return torch.arange(width, device=counts.device) < counts.unsqueeze(-1)


def bag(values: Tensor, indices: Tensor, counts: Tensor, W_dec: Tensor) -> Tensor:
    """sum_j values[:, j] * W_dec[indices[:, j]] over the places in use, [n_tokens, d_in]."""
    dtype = torch.promote_types(values.dtype, W_dec.dtype)
    mask = used(counts, values.shape[1])
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(indices.dtype)
    return embedding_bag(
        indices[mask], W_dec.to(dtype), starts, mode="sum",
        per_sample_weights=values[mask].to(dtype), include_last_offset=True,
    )  # fmt: skip


class SparseDecode(torch.autograd.Function):
    """values, indices [n_tokens, width], counts [n_tokens], W_dec, b_dec, backend -> x_hat [n_tokens, d_in]."""

    @staticmethod
    @torch.compiler.disable
    def forward(ctx: Any, values: Tensor, indices: Tensor, counts: Tensor, *rest: Any) -> Tensor:
        W_dec, b_dec, backend = rest
        ctx.save_for_backward(values, indices, counts, W_dec)
        ctx.backend, ctx.bias_dtype = backend, b_dec.dtype
        if backend == "triton":
            return ops._kernels().sparse_decode(values, indices, counts, W_dec, b_dec)
        return bag(values, indices, counts, W_dec) + b_dec

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,), (values, indices, counts, W_dec) = grads, ctx.saved_tensors
        needs_values, _, _, needs_W, needs_b, _ = ctx.needs_input_grad
        wide = torch.promote_types(g.dtype, torch.float32)
        dvalues = dW = None
        if ctx.backend == "triton":
            kernels, code = ops._kernels(), (values, indices, counts, W_dec)
            dvalues = kernels.sparse_decode_dvalues(g, *code) if needs_values else None
            dW = kernels.sparse_decode_dweight(g, *code) if needs_W else None
        elif needs_values or needs_W:
            # In float32 at least: embedding_bag adds up a feature's terms in the dtype that it is given.
            leaves = [values.to(wide).detach().requires_grad_(needs_values), W_dec.to(wide).detach()]
            leaves[1].requires_grad_(needs_W)
            with torch.enable_grad():
                x_hat = bag(leaves[0], indices, counts, leaves[1])
            x_hat.backward(g.to(wide))
            dvalues = leaves[0].grad.to(values.dtype) if leaves[0].grad is not None else None
            dW = leaves[1].grad.to(W_dec.dtype) if leaves[1].grad is not None else None
        db_dec = g.sum(0, dtype=wide).to(ctx.bias_dtype) if needs_b else None
        return dvalues, None, None, dW, db_dec, None
