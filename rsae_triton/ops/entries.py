"""Entries: the few places of [n_tokens, d_sae] that matter, and differentiable functions of them.

A code is zero at almost every place, and so is every gradient with respect to it. `finding.find_entries` computes the
dense product in blocks of features and keeps what exceeds each feature's threshold. Everything after that (the code,
its reconstruction, dot products with the decoder, all gradients) works on the entries. The functions here are
differentiable once, and their gradients have the same bits in every run.

    entries = find_entries(x_c, W_enc, b_enc, low)           # h > low, or NaN
    h = encode_at(x_c, W_enc, b_enc, entries)                # entries.values, differentiable
    x_hat = decode_at(z, entries, W_dec)                     # [n_tokens, d_in]
    per_feature = sum_at(z, entries)                         # [d_sae]
    theta_at = each_at(theta, entries)                       # theta[feature]
    norms = lengths(W_dec)                                   # [d_sae]

If a matrix is used several times, call `W = collected(W_dec)` first: its gradient is then computed in one pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rsae_triton.ops import entry_loops as loops
from rsae_triton.ops.encode import through_encoder
from rsae_triton.ops.workspace import current


class Entries(NamedTuple):
    """Places in [n_tokens, d_sae], sorted by feature and then token.

    Attributes:
        tokens, features [n_entries]: int64. values [n_entries]: the pre-activation h, float32 or wider.
        offsets [d_sae + 1]: int64, where the entries of each feature begin; the last is n_entries.
        n_tokens: how many tokens there are.
    """

    tokens: Tensor
    features: Tensor
    values: Tensor
    offsets: Tensor
    n_tokens: int

    def select(self, keep: Tensor) -> Entries:
        """The entries where `keep` [n_entries] (bool) is true."""
        places = keep.nonzero().squeeze(1)
        features = self.features[places]
        offsets = loops.offsets_of(features, len(self.offsets) - 1)
        return Entries(self.tokens[places], features, self.values[places], offsets, self.n_tokens)


def encode_at(x: Tensor, W_enc: Tensor, b_enc: Tensor, entries: Entries, b_dec: Tensor | None = None) -> Tensor:
    """Returns h of the entries, which equals `entries.values` from `find_entries` (of x, or of x - b_dec if given) but
    is differentiable in all four. The gradient of b_dec is a matrix-vector product."""
    with torch.autocast(x.device.type, enabled=False):
        return _Encode.apply(x, W_enc, b_enc, b_dec, terms_of(W_enc), *entries)


def decode_at(values: Tensor, entries: Entries, W_dec: Tensor) -> Tensor:
    """Sums values * W_dec[feature] over each token's entries, [n_tokens, d_in]; differentiable in both."""
    with torch.autocast(values.device.type, enabled=False):
        return _Decode.apply(values, W_dec, terms_of(W_dec), entries)


def at_features(rows: Tensor, entries: Entries) -> Tensor:
    """Returns the row of each entry's feature, [n_entries, ...], from rows [d_sae, ...]; differentiable."""
    return _AtFeatures.apply(rows, entries.features, entries.offsets)


def sum_at(values: Tensor, entries: Entries) -> Tensor:
    """Sums each feature's values, [d_sae]; differentiable."""
    return _Sum.apply(values, entries.features, entries.offsets)


def each_at(per_feature: Tensor, entries: Entries) -> Tensor:
    """Returns per_feature[feature] for every entry, from per_feature [d_sae]; differentiable."""
    return _Each.apply(per_feature, entries.features, entries.offsets)


def lengths(W: Tensor) -> Tensor:
    """The norm of each row of W, [d_sae]; differentiable, with gradient 0 at all-zero rows."""
    return _Lengths.apply(W, terms_of(W))


def collected(W: Tensor, triton: bool = False) -> Tensor:
    """Returns W for use in the functions above: their contributions to its gradient are combined in one pass at the
    end."""
    if not (torch.is_grad_enabled() and W.requires_grad):
        return W
    terms = _Terms(triton)
    alias = _Collect.apply(W, terms)
    alias._rsae_terms = terms
    return alias


class _Terms:
    """The parts of a matrix's gradient: sums over entries of value * g[token] (`found`: values, g, entries), and
    multiples of its own rows (`scales`)."""

    def __init__(self, triton: bool = False) -> None:
        self.triton = triton
        self.found: list[tuple[Tensor, Tensor, Entries]] = []
        self.scales: list[Tensor] = []
        self.transposed = False

    def add(self, values: Tensor, g: Tensor, entries: Entries) -> None:
        self.found.append((values.contiguous(), g.contiguous(), entries))

    def made(self, W: Tensor, out: Tensor) -> Tensor:
        """Adds up all parts for W in `out`, both [d_sae, d_in]."""
        add = False
        groups: dict[int, list[tuple[Tensor, Tensor, Entries]]] = {}
        for one in self.found:
            groups.setdefault(one[2].tokens.data_ptr(), []).append(one)
        for group in groups.values():
            tokens, features, _, offsets, _ = group[0][2]
            pairs = [(values, g) for values, g, _ in group]
            loops.rows(pairs, tokens, offsets, out, add=add, by_kernel=features if self.triton else None)
            add = True
        out = out if add else out.zero_()
        if self.scales:
            out.addcmul_(W, torch.stack(self.scales).sum(0).unsqueeze(1))
        self.found, self.scales = [], []
        return out


def terms_of(W: Tensor) -> _Terms | None:
    """The parts that belong to a matrix from `collected`; None for any other."""
    return getattr(W, "_rsae_terms", None)


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, terms: _Terms) -> Tensor:
        ctx.terms, ctx.like = terms, W.detach()
        ctx.set_materialize_grads(False)
        return W.view_as(W)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        terms, like = ctx.terms, ctx.like
        made = None
        if terms.found or terms.scales:
            rows = like.t() if terms.transposed else like
            made = terms.made(rows, _gradient_memory(rows))
            made = made.t() if terms.transposed else made
        if made is None or grads[0] is None:
            return grads[0] if made is None else made.to(like.dtype), None
        return made.add_(grads[0]).to(like.dtype), None


def _gradient_memory(like: Tensor) -> Tensor:
    """Row-major memory of this shape, in the precision that sums need; that of the last step if available."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    made = current().gradient(like, dtype)
    return made if made.is_contiguous() else torch.empty(like.shape, dtype=dtype, device=like.device)


def matrix_gradient(
    pairs: list[tuple[Tensor, Tensor]], entries: Entries, like: Tensor, terms: _Terms | None
) -> Tensor | None:
    """Returns the sum of value * g[token] over pairs (values, g) and entries, in the row of each entry's feature; None
    if it is left for the end (`collected`)."""
    if terms is not None:
        for values, g in pairs:
            terms.add(values, g, entries)
        return None
    pairs = [(values.contiguous(), g.contiguous()) for values, g in pairs]
    return loops.rows(pairs, entries.tokens, entries.offsets, _gradient_memory(like), add=False).to(like.dtype)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, terms: _Terms | None, *entries: Any
    ) -> Tensor:
        tokens, features, values, offsets, _ = entries
        x_c = x if b_dec is None else x - b_dec
        ctx.save_for_backward(x_c, W_enc, tokens, features, offsets)
        ctx.terms, ctx.bias = terms, b_enc.dtype
        if terms is not None:
            terms.transposed = True
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x_c, W_enc, tokens, features, offsets = ctx.saved_tensors
        dh = grads[0].contiguous()
        dx = dW = db = db_dec = None
        if ctx.needs_input_grad[0]:
            dx = loops.decode(dh, tokens, features, len(x_c), W_enc.t()).to(x_c.dtype)
        if ctx.needs_input_grad[1]:
            made = matrix_gradient([(dh, x_c)], Entries(tokens, features, dh, offsets, len(x_c)), W_enc.t(), ctx.terms)
            dW = None if made is None else made.t()
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            db = loops.sums(dh, offsets)
            db_dec = -through_encoder(W_enc, db).to(x_c.dtype) if ctx.needs_input_grad[3] else None
        return dx, dW, None if db is None else db.to(ctx.bias), db_dec, *(None,) * 6


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W: Tensor, terms: _Terms | None, entries: Entries) -> Tensor:
        values = values.contiguous()
        ctx.save_for_backward(values, W, entries.tokens, entries.features, entries.offsets)
        ctx.terms = terms
        return loops.decode(values, entries.tokens, entries.features, entries.n_tokens, W)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        values, W, tokens, features, offsets = ctx.saved_tensors
        g = grads[0].contiguous()
        dvalues = dW = None
        if ctx.needs_input_grad[0]:
            dvalues = loops.dots(g, tokens, features, offsets, W).to(values.dtype)
        if ctx.needs_input_grad[1]:
            dW = matrix_gradient([(values, g)], Entries(tokens, features, values, offsets, len(g)), W, ctx.terms)
        return dvalues, dW, None, None


class _Each(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, per_feature: Tensor, features: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(offsets)
        return per_feature[features]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (offsets,) = ctx.saved_tensors
        return loops.sums(grads[0].contiguous(), offsets), None, None


class _Lengths(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, terms: _Terms | None) -> Tensor:
        found = torch.linalg.vector_norm(W, dim=1)
        ctx.save_for_backward(W, found)
        ctx.terms = terms
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        W, found = ctx.saved_tensors
        scale = torch.where(found > 0, grads[0] / found, 0)
        if ctx.terms is not None:
            ctx.terms.scales.append(scale)
            return None, None
        return W * scale.unsqueeze(1), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, features: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(features)
        return loops.sums(values, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (features,) = ctx.saved_tensors
        return grads[0][features], None, None


class _AtFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, features: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(offsets)
        return rows[features]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return loops.sums(grads[0].contiguous(), ctx.saved_tensors[0]), None, None
