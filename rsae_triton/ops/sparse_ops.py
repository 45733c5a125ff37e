"""The basis of `sae/sparse.py`: nonzero codes in plain PyTorch, and the sparse decoder as a torch operator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn.functional import embedding_bag

from rsae_triton.common.errors import ConfigError, ShapeError
from rsae_triton.ops import backends
from rsae_triton.ops.finding import find_entries, find_largest
from rsae_triton.ops.reference import GateSpec, GateTensors, rational_gate
from rsae_triton.ops.tiles import wide
from rsae_triton.ops.workspace import Workspace

CHUNK = 2**22
"""How many elements of the dense code exist at a time (16 MiB in float32)."""
TOKENS = 4096
"""How many tokens are multiplied with a chunk of W_enc's columns at a time."""


class Entries(NamedTuple):
    """The nonzero codes, sorted by token and then by feature; each [n_entries]."""

    tokens: Tensor
    features: Tensor
    values: Tensor


def chunks(rows: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """Yields runs of rows with the number of their first row; for an empty tensor one empty run, because of its
    dtype."""
    for first in range(0, max(len(rows), 1), size):
        yield first, rows[first : first + size]


def entries_of_gate(
    x_c: Tensor, W_enc: Tensor, b_enc: Tensor, gate: GateTensors, spec: GateSpec, backend: str
) -> Iterator[Entries]:
    """Yields the codes of x_c [n_tokens, d_in] for each run of tokens; only [features, tokens] chunks of CHUNK are
    dense.

    For a gated code, only h is computed where h <= theta, and h is searched block by block (`find_entries`).
    """
    space = Workspace()
    for n0, part in chunks(x_c, TOKENS):
        if spec.form == "gated":
            opened = find_entries(part, W_enc, b_enc, gate.threshold, dtype=x_c.dtype, screened=True)
            assert opened is not None
            each = _take(gate, opened.features)
            values = rational_gate(opened.values[None], each, spec)[0][0].to(x_c.dtype)
            kept = (values != 0).nonzero().squeeze(1)
            tokens, order = opened.tokens[kept].sort(stable=True)
            kept = kept[order]
            yield Entries(tokens + n0, opened.features[kept], values[kept])
            continue
        found = []
        step = max(CHUNK // max(len(part), 1), 1)
        for f0 in range(0, W_enc.shape[1], step):
            columns = slice(f0, f0 + step)
            own = _take(gate, columns)
            h = space.take("h", (len(own.threshold), len(part)), x_c)
            torch.addmm(b_enc[columns, None], W_enc[:, columns].t(), part.t(), out=h)
            z = backends.gate_forward(backend, h, own, spec, h if backend == "cpu" else None)[0].reshape(-1)
            flat = (z != 0).nonzero().squeeze(1)
            values = z[flat]
            found.append(Entries(flat % len(part), flat // len(part) + f0, values))
        tokens, features, values = (torch.cat(one) for one in zip(*found, strict=True))
        tokens, order = tokens.sort(stable=True)
        yield Entries(tokens + n0, features[order], values[order])


def entries_of_largest(x_c: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, least: float) -> Iterator[Entries] | None:
    """Yields the k largest h above `least` of every token of x_c, for each run of tokens; None if one is NaN."""
    parts = []
    for n0, part in chunks(x_c, TOKENS):
        found = find_largest(part, W_enc, b_enc, k, least=least, dtype=x_c.dtype)
        if found is None:
            return None
        kept = (found.values != 0).nonzero().squeeze(1)
        tokens, order = found.tokens[kept].sort(stable=True)
        kept = kept[order]
        parts.append(Entries(tokens + n0, found.features[kept], found.values[kept].to(x_c.dtype)))
    return iter(parts)


def _take(gate: GateTensors, features: slice | Tensor) -> GateTensors:
    """The gate of some of the features. The threshold has a row for each feature; shared tensors have a single one."""
    n_features = len(gate.threshold)
    return GateTensors(*(t if len(t) == 1 < n_features else t[features] for t in gate))


def entries_of(z: Tensor) -> Entries:
    """The nonzero entries (NaN counts) of z [n_tokens, d_sae], searched in z's memory order."""
    if z.is_contiguous() or not z.t().is_contiguous():
        flat = (z != 0).reshape(-1).nonzero().squeeze(1)
        tokens, features = flat // z.shape[1], flat % z.shape[1]
    else:
        flat = (z.t() != 0).reshape(-1).nonzero().squeeze(1)
        tokens, order = (flat % len(z)).sort(stable=True)
        features = flat[order] // len(z)
    return Entries(tokens, features, z[tokens, features])


def first_largest(z: Tensor, k: int) -> Tensor:
    """Returns z [n_tokens, d_sae] with everything but each token's k largest codes set to zero.

    Among equal codes those with the lowest index are kept (torch.topk leaves that open). NaN is kept.
    """
    least = z.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    keep = ~(z < least)  # true if either is NaN
    tied = (keep.sum(-1) > k) & (least.squeeze(-1) != 0)
    if bool(tied.any()):
        some, level = z[tied], least[tied]
        equal, above = some == level, ~(some <= level)
        keep[tied] = above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    return torch.where(keep, z, 0)


def used(counts: Tensor, width: int) -> Tensor:
    """Marks the used ones of `width` places, [..., width] bool, given the number used by each token."""
    return torch.arange(width, device=counts.device) < counts.unsqueeze(-1)


def bag(values: Tensor, indices: Tensor, counts: Tensor, W_dec: Tensor) -> Tensor:
    """Returns sum_j values[:, j] * W_dec[indices[:, j]] over the used places, [n_tokens, d_in]."""
    dtype = torch.promote_types(values.dtype, W_dec.dtype)
    mask = used(counts, values.shape[1])
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(indices.dtype)
    return embedding_bag(
        indices[mask], W_dec.to(dtype), starts, mode="sum",
        per_sample_weights=values[mask].to(dtype), include_last_offset=True,
    )  # fmt: skip


def check_places(indices: Tensor, counts: Tensor, d_sae: int) -> None:
    """Raises ShapeError if a used index in [..., width] is not a feature. Only on the CPU; elsewhere the check would
    wait."""
    if indices.device.type != "cpu" or counts.numel() == 0:
        return
    least, most = int(counts.min()), int(counts.max())
    if least < 0 or most > indices.shape[-1]:
        raise ShapeError(f"counts run from {least} to {most}, but the rows are {indices.shape[-1]} wide")
    inside = indices[used(counts, indices.shape[-1])]
    if inside.numel() and not 0 <= int(inside.min()) <= int(inside.max()) < d_sae:
        raise ShapeError(f"indices run from {int(inside.min())} to {int(inside.max())}, but d_sae is {d_sae}")


def by_kernels(backend: str, values: Tensor, W_dec: Tensor) -> bool:
    """Whether the kernels decode this."""
    dtype = torch.promote_types(values.dtype, W_dec.dtype)
    return backends.resolve_backend(backend, W_dec.device, dtype).startswith("triton")


@custom_op("rsae::sparse_decode", mutates_args=())
def sparse_decode(
    values: Tensor, indices: Tensor, counts: Tensor, W_dec: Tensor, b_dec: Tensor, backend: str
) -> Tensor:
    """Decodes values, indices [n_tokens, width] with counts [n_tokens]; returns x_hat [n_tokens, d_in]."""
    check_places(indices, counts, len(W_dec))
    if by_kernels(backend, values, W_dec):
        return backends.kernels().sparse_decode(values, indices, counts, W_dec, b_dec)
    return bag(values, indices, counts, W_dec).add_(b_dec)


@sparse_decode.register_fake
def _(values: Tensor, indices: Tensor, counts: Tensor, W_dec: Tensor, b_dec: Tensor, backend: str) -> Tensor:
    return values.new_empty((len(values), W_dec.shape[1]), dtype=torch.promote_types(values.dtype, W_dec.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, indices, counts, W_dec, b_dec, ctx.backend = inputs
    ctx.save_for_backward(values, indices, counts, W_dec, b_dec)


def _derivative(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    needs = [bool(ctx.needs_input_grad[k]) for k in (0, 3, 4)]
    found = iter(_decode_backward(g, *ctx.saved_tensors, ctx.backend, needs))
    dvalues, dW, db = (next(found) if needed else None for needed in needs)
    return dvalues, None, None, dW, db, None


sparse_decode.register_autograd(_derivative, setup_context=_save)


@custom_op(
    "rsae::sparse_decode_backward",
    mutates_args=(),
    schema="(Tensor g, Tensor values, Tensor indices, Tensor counts, Tensor W_dec, Tensor b_dec, str backend, "
    "bool[] needs) -> Tensor[]",
)
def _decode_backward(
    g: Tensor, values: Tensor, indices: Tensor, counts: Tensor, W_dec: Tensor, b_dec: Tensor, backend: str, needs: Any
) -> list[Tensor]:
    """Returns the gradients of values, W_dec and b_dec, computing only those in `needs`."""
    with_kernels = by_kernels(backend, values, W_dec)
    code = (g, values, indices, counts, W_dec)
    found: list[Tensor] = []
    if needs[0]:
        found.append(backends.kernels().sparse_decode_dvalues(*code) if with_kernels else _dvalues(*code))
    if needs[1]:
        found.append(backends.kernels().sparse_decode_dweight(*code) if with_kernels else _dweight(*code))
    if needs[2]:
        found.append(g.sum(0, dtype=wide(g.dtype)).to(b_dec.dtype))
    return found


def _dvalues(g: Tensor, values: Tensor, indices: Tensor, counts: Tensor, W_dec: Tensor) -> Tensor:
    """Returns g . W_dec[index] at the used places, zero elsewhere."""
    out = torch.zeros_like(values)
    tokens, places = used(counts, values.shape[1]).nonzero(as_tuple=True)
    for first, some in chunks(tokens, max(CHUNK // W_dec.shape[1], 1)):
        at = some, places[first : first + len(some)]
        rows = W_dec[indices[at]].to(wide(W_dec.dtype))
        out[at] = rows.mul_(g[some]).sum(1).to(out.dtype)
    return out


def _dweight(g: Tensor, values: Tensor, indices: Tensor, counts: Tensor, W_dec: Tensor) -> Tensor:
    """Sums value * g over each feature's tokens, which is an embedding bag of rows of g."""
    dtype = torch.promote_types(values.dtype, g.dtype)
    tokens, places = used(counts, values.shape[1]).nonzero(as_tuple=True)
    features, order = indices[tokens, places].sort(stable=True)
    tokens, places = tokens[order], places[order]
    bounds = torch.searchsorted(features, torch.arange(len(W_dec) + 1, device=g.device, dtype=features.dtype))
    return embedding_bag(
        tokens, g.to(dtype), bounds, mode="sum",
        per_sample_weights=values[tokens, places].to(dtype), include_last_offset=True,
    ).to(W_dec.dtype)  # fmt: skip


@_decode_backward.register_fake
def _(g: Any, values: Tensor, indices: Any, counts: Any, W_dec: Tensor, b_dec: Tensor, *rest: Any) -> list[Tensor]:
    return [torch.empty_like(one) for one, needed in zip((values, W_dec, b_dec), rest[-1], strict=True) if needed]


def _refuse(ctx: Any, *grads: Any) -> NoReturn:
    raise ConfigError(
        "the sparse decoder is differentiable once, and a second derivative was asked for (create_graph=True); "
        "decode the dense code, code.to_dense(d_sae), which differentiates as often as one likes"
    )


_decode_backward.register_autograd(_refuse)
