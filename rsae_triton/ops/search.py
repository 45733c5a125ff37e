"""A round's search on entries, and the dot products of the residual with the decoder: forward, and the derivative.

    e = r - z W,   c = e W^T,   g = weight * c   where the gate is open,   m = g W
    alpha = <m, e> / (epsilon + ||m||^2),   y = z + alpha g,   after = e - alpha m,   raw = after W^T  at every entry

For float32 on a CPU with a compiler, the loops of `search.cpp` compute this token by token; otherwise PyTorch's
operations do.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rsae_triton.ops import entry_loops as loops
from rsae_triton.ops import native
from rsae_triton.ops.across import Across
from rsae_triton.ops.backends import kernels
from rsae_triton.ops.entries import Entries, matrix_gradient, terms_of
from rsae_triton.ops.native import address, integer

LEAST = 16
"""Number of tokens from which another thread pays."""


class Place(NamedTuple):
    """Entries, and their order by token.

    Attributes:
        order: [n_entries], the entries sorted by token, then feature. starts: [n_tokens + 1], the start of each token's
            entries.
        triton: whether the kernels do the work if they can: on float32 entries, with all features in one process.
    """

    there: Entries
    order: Tensor
    starts: Tensor
    triton: bool = False


def by_token(entries: Entries, triton: bool = False) -> Place:
    """Sorts entries by token."""
    tokens, n = entries.tokens, entries.n_tokens
    if tokens.device.type == "cpu" and native.library() is not None:
        order, starts = torch.empty_like(tokens), tokens.new_zeros(n + 1)
        native.library().by_token(  # type: ignore[union-attr]
            address(tokens), integer(len(tokens)), integer(n), address(order), address(starts)
        )
        return Place(entries, order, starts, triton)
    ordered, order = tokens.sort(stable=True)
    return Place(entries, order, loops.offsets_of(ordered, n), triton)


def search(
    z: Tensor, weight: Tensor, opened: Tensor, r: Tensor, W: Tensor, epsilon: Tensor, place: Place, *,
    correct: bool, across: Across | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Moves the open amplitudes along their gradient by the best step.

    Args:
        z, weight: [n_entries]; z is zero where `opened` [n_entries] (bool) is false. r: [n_tokens, d_in].
        W: [d_sae, d_in]. epsilon: a scalar. correct: whether `raw` is wanted.
        across: the processes that hold other features.

    Returns:
        y [n_entries], after [n_tokens, d_in], raw [n_entries] (empty unless `correct`); differentiable once in z,
        weight, r, W and epsilon. Which entries are open counts as constant.
    """
    with torch.autocast(z.device.type, enabled=False):
        return _Search.apply(z, weight, r, W, epsilon, opened, place, terms_of(W), correct, across)


class _Search(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, weight: Tensor, r: Tensor, W: Tensor, epsilon: Tensor, opened: Tensor, place: Place,
        terms: Any, correct: bool, across: Across | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        z, weight, r = z.contiguous(), weight.contiguous(), r.contiguous()
        forward, ctx.back = _way(place, z, weight, r, W, across)
        ctx.found = forward(z, weight, r, W, epsilon, opened, place, correct, across)
        ctx.save_for_backward(z, weight, W, epsilon, opened)
        ctx.place, ctx.terms, ctx.correct, ctx.across = place, terms, correct, across
        ctx.set_materialize_grads(False)
        y, after, raw = ctx.found.y, ctx.found.after, ctx.found.raw
        ctx.found = ctx.found._replace(y=None, raw=None, after=after.detach())
        return y, after, raw

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        z, weight, W, epsilon, opened = ctx.saved_tensors
        dy, dafter, draw = (None if one is None else one.contiguous() for one in grads)
        found, place = ctx.found, ctx.place
        dy = torch.zeros_like(z) if dy is None else dy
        draw = draw if ctx.correct else None
        back = ctx.back(z, weight, W, epsilon, opened, place, found, dy, dafter, draw, ctx.across)
        dW = None
        if ctx.needs_input_grad[3]:
            pairs = [(-z, back.de), (back.dc, found.e), (weight * found.c, back.dm)]
            pairs += [] if draw is None else [(draw, found.after)]
            dW = matrix_gradient(pairs, place.there, W, ctx.terms)
        depsilon = back.depsilon.sum().to(epsilon.dtype) if ctx.needs_input_grad[4] else None
        return back.dz, back.dweight, back.de, dW, depsilon, *(None,) * 5


class Found(NamedTuple):
    """The results of a search: y, c (zero where not open), raw [n_entries]; e, m, after [n_tokens, d_in]; alpha
    [n_tokens]."""

    y: Any
    c: Tensor
    e: Tensor
    m: Tensor
    after: Tensor
    alpha: Tensor
    raw: Any


class Back(NamedTuple):
    """Gradients of a search: dz, dweight, dc [n_entries]; de (also that of r), dm [n_tokens, d_in]; depsilon
    [n_tokens]."""

    dz: Tensor
    dweight: Tensor
    dc: Tensor
    de: Tensor
    dm: Tensor
    depsilon: Tensor


def _way(place: Place, z: Tensor, weight: Tensor, r: Tensor, W: Tensor, across: Across | None) -> tuple[Any, Any]:
    """Returns how this search and its derivative are computed."""
    if across is None and place.triton and z.dtype == weight.dtype == torch.float32:
        if W.shape[1] <= kernels().SEARCH_COLUMNS:
            return _by_kernel, _by_kernel_back
    elif across is None and native.usable(z, weight, r, W):
        return _compiled, _compiled_back
    return _plain, _plain_back


def _plain(
    z: Tensor, weight: Tensor, r: Tensor, W: Tensor, epsilon: Tensor, opened: Tensor, place: Place, correct: bool,
    across: Across | None,
) -> Found:  # fmt: skip
    there, inner, at = place.there, place.there.select(opened), opened.nonzero().squeeze(1)
    e = r - _summed(_decoded(z[at], inner, W), across)
    dots = _dots(e, inner, W)
    g = weight[at] * dots
    m = _summed(_decoded(g, inner, W), across)
    alpha = (m * e).sum(1) / (epsilon + m.square().sum(1))
    y = z.index_add(0, at, alpha[inner.tokens] * g)
    after = e - alpha.unsqueeze(1) * m
    raw = _dots(after, there, W) if correct else z.new_empty(0)
    return Found(y, torch.zeros_like(z).index_copy_(0, at, dots), e, m, after, alpha, raw)


def _plain_back(
    z: Tensor, weight: Tensor, W: Tensor, epsilon: Tensor, opened: Tensor, place: Place, found: Found, dy: Tensor,
    dafter: Tensor | None, draw: Tensor | None, across: Across | None,
) -> Back:  # fmt: skip
    there, inner, at = place.there, place.there.select(opened), opened.nonzero().squeeze(1)
    _, c, e, m, _, alpha, _ = found
    de = torch.zeros_like(e) if dafter is None else dafter
    if draw is not None:
        de = de + _summed(_decoded(draw, there, W), across)
    own = dy * weight * c
    # Sums of runs instead of index_add, whose atomics would add in a different order every time.
    dalpha = _summed(loops.sums(own[place.order], place.starts), across) - (de * m).sum(1)
    dtop = dalpha / (epsilon + m.square().sum(1))
    dbelow = -alpha * dtop
    dm = dtop.unsqueeze(1) * e + (2 * dbelow).unsqueeze(1) * m - alpha.unsqueeze(1) * de
    de = de + dtop.unsqueeze(1) * m
    dg = alpha[inner.tokens] * dy[at] + _dots(dm, inner, W)
    dc = dg * weight[at]
    de = de + _summed(_decoded(dc, inner, W), across)
    dz = dy - _dots(de, there, W)
    dweight, dc = (torch.zeros_like(z).index_copy_(0, at, one) for one in (dg * c[at], dc))
    return Back(dz, dweight, dc, de, dm, dbelow)


def _decoded(values: Tensor, at: Entries, W: Tensor) -> Tensor:
    return loops.decode(values.contiguous(), at.tokens, at.features, at.n_tokens, W)


def _dots(rows: Tensor, at: Entries, W: Tensor) -> Tensor:
    return loops.dots(rows.contiguous(), at.tokens, at.features, at.offsets, W)


def _summed(part: Tensor, across: Across | None) -> Tensor:
    return part if across is None else across.sum(part)


def _compiled(
    z: Tensor, weight: Tensor, r: Tensor, W: Tensor, epsilon: Tensor, opened: Tensor, place: Place, correct: bool,
    across: Across | None,
) -> Found:  # fmt: skip
    c, y, alpha = torch.empty_like(z), torch.empty_like(z), r.new_empty(len(r))
    e, m, after = (torch.empty_like(r) for _ in range(3))
    raw = torch.empty_like(z) if correct else z.new_empty(0)
    native.split(len(r), lambda start, stop: native.library().search(  # type: ignore[union-attr]
        address(r), address(W), integer(W.shape[1]), address(place.starts), address(place.order),
        address(place.there.features), address(z), address(opened), address(weight),
        ctypes.c_float(float(epsilon.detach())), address(y), address(c), address(e), address(m), address(after),
        address(alpha), address(raw) if correct else None, integer(start), integer(stop),
    ), LEAST)  # fmt: skip
    return Found(y, c, e, m, after, alpha, raw)


def _compiled_back(
    z: Tensor, weight: Tensor, W: Tensor, epsilon: Tensor, opened: Tensor, place: Place, found: Found, dy: Tensor,
    dafter: Tensor | None, draw: Tensor | None, across: Across | None,
) -> Back:  # fmt: skip
    dz, dweight, dc = (torch.empty_like(z) for _ in range(3))
    de, dm, depsilon = torch.empty_like(found.e), torch.empty_like(found.e), found.alpha.new_empty(len(found.e))
    native.split(len(de), lambda start, stop: native.library().search_back(  # type: ignore[union-attr]
        address(W), integer(W.shape[1]), address(place.starts), address(place.order), address(place.there.features),
        address(opened), address(weight), address(found.c), address(found.e), address(found.m), address(found.alpha),
        ctypes.c_float(float(epsilon.detach())), address(dy), None if dafter is None else address(dafter),
        None if draw is None else address(draw), address(dz), address(dweight), address(dc), address(de), address(dm),
        address(depsilon), integer(start), integer(stop),
    ), LEAST)  # fmt: skip
    return Back(dz, dweight, dc, de, dm, depsilon)


def _by_kernel(
    z: Tensor, weight: Tensor, r: Tensor, W: Tensor, epsilon: Tensor, opened: Tensor, place: Place, correct: bool,
    across: Across | None,
) -> Found:  # fmt: skip
    found = kernels().round_search(
        z, weight, r, W, epsilon, opened, place.there.features, place.order, place.starts, correct=correct
    )
    return Found(**found._asdict())


def _by_kernel_back(
    z: Tensor, weight: Tensor, W: Tensor, epsilon: Tensor, opened: Tensor, place: Place, found: Found, dy: Tensor,
    dafter: Tensor | None, draw: Tensor | None, across: Across | None,
) -> Back:  # fmt: skip
    made = kernels().round_search_back(
        found, weight, W, epsilon, opened, place.there.features, place.order, place.starts, dy, dafter, draw
    )
    return Back(**made._asdict())
