"""What rounds compute on the entries of a code that may matter, and never on all of [n_tokens, d_sae].

A code's *candidates* lie where h > theta - C_in: outside, the gate and its slope are exactly zero. They are found by
the one dense product there is; decoding them, dot products at them and the gradients of both are sums over entries,
and each is the other's derivative. Entries are ordered by feature and then by token. No atomics: the same bits in
every run.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from rsae_triton.ops.encode import centred, through_encoder
from rsae_triton.ops.tiles import wide

BLOCK = 2**20
"""Elements of h that exist at a time on the CPU: they are looked through while they are in the cache."""
GATHER = 2**22
"""Elements of rows that are gathered at a time where there is no sampled product."""


class Places(NamedTuple):
    """Where entries lie, ordered by feature and then by token.

    Attributes:
        tokens, features: [n_entries] int64. starts: [d_sae + 1], where each feature's entries begin.
        by_token: [n_entries], the entries in the order of tokens. token_starts: [n_tokens + 1], into by_token.
    """

    tokens: Tensor
    features: Tensor
    starts: Tensor
    by_token: Tensor
    token_starts: Tensor

    def where(self, kept: Tensor) -> Places:
        """The entries that are True in kept [n_entries]."""
        before, order = _running(kept), kept[self.by_token]
        by_token = before[self.by_token[order]]
        starts, token_starts = before[self.starts], _running(order)[self.token_starts]
        return Places(self.tokens[kept], self.features[kept], starts, by_token, token_starts)


def places(tokens: Tensor, features: Tensor, n_tokens: int, d_sae: int) -> Places:
    """Of entries that are ordered already."""
    by_token = tokens.argsort(stable=True)
    starts, token_starts = (
        _running(torch.bincount(one, minlength=size)) for one, size in ((features, d_sae), (tokens, n_tokens))
    )
    return Places(tokens, features, starts, by_token, token_starts)


def _running(counts: Tensor) -> Tensor:
    """0, and the running sums."""
    sums = torch.zeros(len(counts) + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=sums[1:])
    return sums


def candidates(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, low: Tensor, dtype: torch.dtype
) -> tuple[Places, Tensor]:
    """The pre-activations above low [d_sae] of x [n_tokens, d_in], and where they are; NaN is let through.

    Returns:
        Places, and h [n_entries] in at least float32, from a product in `dtype`; differentiable in all but low.
    """
    with torch.no_grad():
        x_c = centred(x, b_dec, dtype)
        tokens, features, h = _found(x_c, W_enc, b_enc, low, dtype)
        there = places(tokens, features, len(x), W_enc.shape[1])
    return there, _Product.apply(x, W_enc, b_enc, b_dec, h, there)


def candidates_of(h: Tensor, low: Tensor) -> tuple[Places, Tensor]:
    """As `candidates`, of pre-activations [n_tokens, d_sae] that there are."""
    features, tokens = (~(h.detach() <= low)).t().nonzero(as_tuple=True)
    return places(tokens, features, *h.shape), h[tokens, features]


def _found(x_c: Tensor, W_enc: Tensor, b_enc: Tensor, low: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    n, d_sae = len(x_c), W_enc.shape[1]
    step = max(BLOCK // max(n, 1), 1) if x_c.device.type == "cpu" else d_sae
    found = []
    for first in range(0, d_sae, step):
        part = slice(first, first + step)
        h = torch.addmm(b_enc[part].to(dtype).unsqueeze(1), W_enc[:, part].to(dtype).t(), x_c.t())
        flat = (~(h <= low[part].unsqueeze(1))).view(-1).nonzero().squeeze(1)
        found.append((flat % max(n, 1), flat // max(n, 1) + first, h.view(-1)[flat]))
    tokens, features, h = (torch.cat(one) for one in zip(*found, strict=True))
    return tokens, features, h.to(wide(dtype))


class _Product(torch.autograd.Function):
    """The gradient of x, W_enc, b_enc and b_dec from that of h at its places."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, h: Tensor, there: Places
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc, b_dec, *there)
        ctx.dtype = b_enc.dtype
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dh,), (x, W_enc, b_dec, *rest) = grads, ctx.saved_tensors
        there, needs = Places(*rest), ctx.needs_input_grad
        db = segment_sum(dh, there.starts)
        dx = dW = None
        if needs[0]:
            dx = _by_token(dh, there, W_enc.t().to(dh.dtype)).to(x.dtype)
        if needs[1]:
            dW = _by_feature(dh, there, centred(x, b_dec, dh.dtype)).t().to(W_enc.dtype)
        db_dec = -through_encoder(W_enc, db).to(W_enc.dtype) if needs[3] else None
        return dx, dW, db.to(ctx.dtype) if needs[2] else None, db_dec, None, None


def decode(values: Tensor, W_dec: Tensor, there: Places, kept: Tensor | None = None) -> Tensor:
    """sum over a token's entries of value * W_dec[feature], [n_tokens, d_in]; differentiable in values and W_dec.

    kept: [n_entries] bool, the entries whose values are not zero. The others are left out of the sum, and have a
    gradient all the same.
    """
    inner = there if kept is None else there.where(kept)
    return _Decode.apply(values, W_dec, there, inner, kept)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, there: Places, inner: Places, kept: Tensor | None) -> Tensor:
        own = values if kept is None else values[kept]
        ctx.save_for_backward(W_dec, own, *there, *inner)
        return _by_token(own, inner, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        W_dec, own, *rest = ctx.saved_tensors
        there, inner = Places(*rest[:5]), Places(*rest[5:])
        g, (of_values, of_W) = grads[0].contiguous(), ctx.needs_input_grad[:2]
        dvalues = _dots(g, W_dec, there) if of_values else None
        return dvalues, _by_feature(own, inner, g) if of_W else None, None, None, None


def dots(e: Tensor, W_dec: Tensor, there: Places) -> Tensor:
    """e[token] . W_dec[feature] at every entry, [n_entries]; differentiable in e [n_tokens, d_in] and W_dec."""
    return _Dots.apply(e, W_dec, there)


class _Dots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, e: Tensor, W_dec: Tensor, there: Places) -> Tensor:
        ctx.save_for_backward(e, W_dec, *there)
        return _dots(e, W_dec, there)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (e, W_dec, *rest) = grads, ctx.saved_tensors
        there, (of_e, of_W) = Places(*rest), ctx.needs_input_grad[:2]
        de = _by_token(g, there, W_dec) if of_e else None
        return de, _by_feature(g, there, e) if of_W else None, None


def at_features(rows: Tensor, there: Places) -> Tensor:
    """rows [d_sae, ...] at every entry's feature, [n_entries, ...]; differentiable."""
    return _Spread.apply(rows, there.features, None, there.starts)


def at_tokens(rows: Tensor, there: Places) -> Tensor:
    """rows [n_tokens] at every entry's token, [n_entries]; differentiable."""
    return _Spread.apply(rows, there.tokens, there.by_token, there.token_starts)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, order: Tensor | None, starts: Tensor) -> Tensor:
        ctx.save_for_backward(order, starts)
        return rows[index]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        order, starts = ctx.saved_tensors
        return segment_sum(grads[0] if order is None else grads[0][order], starts), None, None, None


def feature_sums(values: Tensor, there: Places) -> Tensor:
    """Sums of values [n_entries] over each feature's entries, [d_sae]; differentiable."""
    return _Sums.apply(values, there.features, there.starts)


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, features: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(features)
        return segment_sum(values, starts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0][ctx.saved_tensors[0]], None, None


def segment_sum(values: Tensor, starts: Tensor) -> Tensor:
    """Sums of values [n, ...] over runs that begin at starts [n_runs + 1], [n_runs, ...]."""
    if len(values) == 0:
        return values.new_zeros(len(starts) - 1, *values.shape[1:])
    return torch.segment_reduce(values.contiguous(), "sum", offsets=starts, axis=0, unsafe=True)


def _by_token(values: Tensor, there: Places, table: Tensor) -> Tensor:
    order = there.by_token
    return _bag(values[order], there.features[order], there.token_starts, table)


def _by_feature(values: Tensor, there: Places, table: Tensor) -> Tensor:
    return _bag(values, there.tokens, there.starts, table)


def _bag(values: Tensor, rows: Tensor, starts: Tensor, table: Tensor) -> Tensor:
    """For every run the sum of value * table[row], [n_runs, d_in]."""
    if len(values) == 0:
        return table.new_zeros(len(starts) - 1, table.shape[1])
    return embedding_bag(rows, table, starts, mode="sum", per_sample_weights=values, include_last_offset=True)


def _dots(e: Tensor, W_dec: Tensor, there: Places) -> Tensor:
    values = e.new_zeros(len(there.tokens))  # read, too, though multiplied by 0
    if len(values) == 0:
        return values
    if _sampled(e.device.type) and e.dtype in (torch.float32, torch.float64):
        shape = (len(W_dec), len(e))
        pattern = torch.sparse_csr_tensor(there.starts, there.tokens, values, size=shape, check_invariants=False)
        return torch.sparse.sampled_addmm(pattern, W_dec, e.t(), beta=0.0).values()
    step = max(GATHER // e.shape[1], 1)
    for first in range(0, len(values), step):
        part = slice(first, first + step)
        torch.sum(W_dec[there.features[part]] * e[there.tokens[part]], 1, out=values[part])
    return values


@functools.cache
def _sampled(device: str) -> bool:
    """Whether there is a product that computes the entries of a pattern alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sparse tensors are in beta, once in a process
        index = torch.zeros(1, dtype=torch.int64, device=device)
        torch.sparse_csr_tensor(torch.arange(2, device=device), index, index.float(), size=(1, 1))
    return device == "cuda" or (device == "cpu" and torch.backends.mkl.is_available())
