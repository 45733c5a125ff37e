"""Sparse codes as rows of values and feature indices, encoded and decoded without a dense [n_tokens, d_sae] code.

A token has some 20 to 200 active features out of tens of thousands, so a dense decoder mostly multiplies zeros. On a
GPU the kernels of `kernels/sparse_*.py` write and read rows only. Elsewhere `sparse_ops.py` computes the code in
chunks, and `torch.nn.functional.embedding_bag` decodes it. Encoding is for inference; decoding is differentiable.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rsae_triton.common.checks import check_data, check_integer, check_room, check_tensor
from rsae_triton.common.errors import ConfigError, NumericsError, ShapeError
from rsae_triton.ops import backends, sparse_ops
from rsae_triton.ops import encode as ops
from rsae_triton.ops.reference import GateSpec, GateTensors, refuse_transforms
from rsae_triton.ops.sparse_ops import (
    Entries,
    check_places,
    chunks,
    entries_of,
    entries_of_gate,
    entries_of_largest,
    first_largest,
    sparse_decode,
    used,
)
from rsae_triton.ops.tiles import wide
from rsae_triton.sae import rounds
from rsae_triton.sae.architectures import JumpReluSAE, ReluSAE, TopKSAE
from rsae_triton.sae.base import check_sae
from rsae_triton.sae.batch_topk import BatchTopKSAE
from rsae_triton.sae.gate import RationalGate

if TYPE_CHECKING:
    from rsae_triton.sae.base import SparseAutoencoder

CAPACITY = 128
"""Initial number of places per token in the kernels, if no capacity is given."""


class SparseCode(NamedTuple):
    """The nonzero features of each token, in ascending order.

    Attributes:
        values [..., width]: zeros after the last used place.
        indices [..., width]: int64; zeros after the last used place.
        counts [...]: int64, the number of used places of each token.
    """

    values: Tensor
    indices: Tensor
    counts: Tensor

    def to_dense(self, d_sae: int) -> Tensor:
        """Returns the dense code [..., d_sae]; differentiable in the values.

        Raises:
            ShapeError: the parts do not fit each other, or an index is not below d_sae.
        """
        _check_code(self)
        check_integer("d_sae", d_sae, 1)
        check_room(f"a dense code of d_sae={d_sae}", (self.counts.numel(), d_sae), self.values.dtype)
        check_places(self.indices, self.counts, d_sae)
        values = torch.where(used(self.counts, self.values.shape[-1]), self.values, 0)
        # Added, not written, because all unused places point at feature 0.
        return values.new_zeros(*values.shape[:-1], d_sae).scatter_add(-1, self.indices.long(), values)

    @classmethod
    def from_dense(cls, feature_acts: Tensor, capacity: int | None = None) -> SparseCode:
        """Collects the nonzero entries of feature_acts [..., d_sae] (NaN counts as nonzero); capacity: see
        `encode_sparse`."""
        check_data("feature_acts", feature_acts)
        if feature_acts.dim() == 0:
            raise ShapeError("feature_acts is a scalar; give codes of shape [..., d_sae]")
        _check_count("capacity", capacity)
        rows = feature_acts.detach().reshape(-1, feature_acts.shape[-1])
        return _shaped(_rows([entries_of(rows)], len(rows), capacity), feature_acts.shape[:-1])


def encode_sparse(
    sae: SparseAutoencoder, x: Tensor, capacity: int | None = None, *, k: int | None = None
) -> SparseCode:
    """Encodes x as rows: the nonzero entries of `sae.encode(x)`, up to rounding, without making the dense code.

    A `TopKSAE` is encoded with its own k. The kernels rank codes in float32, before these are rounded to the SAE's
    dtype. No gradient is recorded.

    Args:
        sae: a `FusedRationalSAE` or a teacher.
        x: activations [..., d_in].
        capacity: width of the rows. Nothing is dropped: if a token has more active features, all rows become as wide as
            the fullest token needs (on a GPU x is then encoded twice). None: always that width.
        k: keep only the k largest positive codes of a token; among equal ones, those with the lowest index.

    Raises:
        ShapeError, ConfigError: x, its dtype, capacity or k cannot be used.
        NumericsError: a code is NaN.
    """
    # if dynamo is not loaded nothing is compiled, and importing it just to say so takes seconds
    if "torch._dynamo" in sys.modules:
        return torch.compiler.disable(_encode_sparse)(sae, x, capacity, k)
    return _encode_sparse(sae, x, capacity, k)


@torch.no_grad()
def _encode_sparse(sae: SparseAutoencoder, x: Tensor, capacity: int | None, k: int | None) -> SparseCode:
    check_sae("sae", sae)
    refuse_transforms("encode_sparse")
    if sae.architecture == "rational_topk":
        raise ConfigError("sparse encoding takes thresholds per feature; use upgrade(..., thresholds='feature')")
    x = sae._check_last(x, "x", "d_in", sae.d_in)
    _check_count("capacity", capacity)
    _check_count("k", k)
    if isinstance(sae, TopKSAE):
        k = min(sae.k, k or sae.k)
    k = None if k is None else min(k, sae.d_sae)
    rows = x.reshape(-1, sae.d_in)
    if getattr(sae, "refinement", None) is not None:
        return _shaped(_rows(_without_nan(_entries_of_rounds(sae, rows, k)), len(rows), capacity), x.shape[:-1])
    known, dtype = _gate_of(sae), ops.product_dtype(x)
    backend = backends.resolve_backend(_backend_of(sae), x.device, dtype).partition(":")[0]
    b_dec = sae.b_dec if sae.apply_b_dec_to_input else None
    if known is not None:
        ops.check_inputs(x, sae.W_enc, sae.b_enc, b_dec, None, *known)
    # Without kernels, the k largest are ranked among all codes, unless codes are equal to h.
    if known is None or (k is not None and backend != "triton"):
        parts = _entries_of_topk(sae, rows, k) if isinstance(sae, TopKSAE) else None
        parts = _entries_of_codes(sae, rows, k) if parts is None else parts
        return _shaped(_rows(_without_nan(parts), len(rows), capacity), x.shape[:-1])
    gate, spec = known
    x_c = ops.centred(sae.normalization(rows).apply(rows), b_dec, dtype)
    weights = (x_c, sae.W_enc.to(dtype), sae.b_enc.to(dtype), GateTensors(*(t.to(wide(dtype)) for t in gate)), spec)
    with torch.autocast(x.device.type, enabled=False):
        if backend == "triton":
            code = _by_kernels(*weights, capacity, k)
        else:
            code = _rows(_without_nan(entries_of_gate(*weights, backend)), len(rows), capacity)
    return _shaped(code, x.shape[:-1])


def decode_sparse(sae: SparseAutoencoder, code: SparseCode, x: Tensor | None = None) -> Tensor:
    """Decodes rows to reconstructions [..., d_in], as `sae.decode` does with the dense code; differentiable once.

    The gradient of W_dec is dense, [d_sae, d_in]. Gradients are bit-equal in every run.

    Args:
        x: the activations that the code was made from, for an SAE that normalises every token (see `sae.decode`).

    Raises:
        ShapeError: the parts of the code do not fit each other, or (on the CPU) an index is not below d_sae. On a GPU,
            where a check would have to wait, such an index makes its token's reconstruction NaN.
        ConfigError: x is needed and missing, or a second derivative.
    """
    check_sae("sae", sae)
    refuse_transforms("decode_sparse")
    _check_code(code)
    check_tensor("code.values", code.values, sae.W_dec.device)
    n_tokens, width = code.counts.numel(), code.values.shape[-1]
    x_hat = sparse_decode(
        code.values.reshape(n_tokens, width), code.indices.reshape(n_tokens, width), code.counts.reshape(n_tokens),
        sae.W_dec, sae.b_dec, _backend_of(sae),
    )  # fmt: skip
    return sae.denormalize(x_hat.reshape(*code.values.shape[:-1], sae.W_dec.shape[1]), x)


def _entries_of_rounds(sae: Any, rows: Tensor, k: int | None) -> Iterator[Entries]:
    """Yields the nonzero entries of the code of an encoder with several rounds, for a few thousand tokens at a time."""
    for first, part in chunks(rows, rounds.TOKENS):
        code = rounds.entries(sae, sae.normalization(part).apply(part))
        active = (code.values != 0).nonzero().squeeze(1)
        tokens, order = code.there.tokens[active].sort(stable=True)
        features, values = code.there.features[active[order]], code.values[active[order]]
        if k is not None:
            kept = _largest(tokens, values, len(part), k)
            tokens, features, values = tokens[kept], features[kept], values[kept]
        yield Entries(tokens + first, features, values.to(ops.product_dtype(rows)))


def _largest(tokens: Tensor, values: Tensor, n_tokens: int, k: int) -> Tensor:
    """Marks the entries, sorted by token and feature, that are among their token's k largest; of equal ones the
    first."""
    order = values.argsort(descending=True, stable=True)
    order = order[tokens[order].argsort(stable=True)]
    counts = torch.bincount(tokens, minlength=n_tokens)
    rank = torch.arange(len(tokens), device=tokens.device) - (counts.cumsum(0) - counts)[tokens]
    return order[rank < k].sort().values


def _backend_of(sae: SparseAutoencoder) -> str:
    return getattr(sae, "backend", "auto")


def _gate_of(sae: SparseAutoencoder) -> tuple[GateTensors, GateSpec] | None:
    """The SAE's nonlinearity as a gate; None if it is not one (a TopK with negative codes, an SAE of another
    package)."""
    gate = getattr(sae, "gate", None)
    if isinstance(gate, RationalGate):
        return gate.tensors(), gate.spec()
    batch = sae if isinstance(sae, BatchTopKSAE) and not sae.training else None
    if batch is None and (type(sae) not in (ReluSAE, JumpReluSAE, TopKSAE) or not getattr(sae, "relu", True)):
        return None
    # h where h > theta is a gated form whose rational is the constant 1.
    zeros = torch.zeros_like(sae.b_enc, dtype=wide(sae.b_enc.dtype))
    threshold = sae.threshold.to(zeros.dtype) if isinstance(sae, JumpReluSAE) else zeros
    if batch is not None:
        threshold = zeros + batch.topk_threshold.to(zeros.dtype)
    one, zero = zeros.new_ones(1), zeros.new_zeros(1)
    neutral = GateTensors(one[None], zeros.new_empty(1, 0), zero, one, one, threshold, zeros)
    return neutral, GateSpec(0, 0, "gated", amplitude="identity")


def _by_kernels(
    x_c: Tensor, W_enc: Tensor, b_enc: Tensor, gate: GateTensors, spec: GateSpec, capacity: int | None, k: int | None
) -> SparseCode:
    d_sae = W_enc.shape[1]
    flags = {name: value for name, value in backends.kernel_flags(spec).items() if name != "hard"}
    places = min(capacity or CAPACITY if k is None else 2 * k + 32, d_sae)
    while True:
        found = backends.kernels().sparse_encode(x_c, W_enc, b_enc, gate, **flags, capacity=places, k=k)
        most, bad = 0, False
        if len(x_c) > 0:
            most, bad = torch.stack([found.counts.max(), found.values.isnan().any()]).tolist()
        if bad:
            raise _nan_error(found.values.isnan().any(1).nonzero())
        if most <= (k or places):
            break
        places = most
    width = max(most, capacity or 1)
    check_room(f"a code of capacity={capacity}", (len(x_c), width), torch.int64)
    values, indices = (pad(t[:, :width], (0, max(width - t.shape[1], 0))).contiguous() for t in found[:2])
    return SparseCode(values, indices, found.counts.long())


def _rows(parts: Iterator[Entries] | list[Entries], n_tokens: int, capacity: int | None) -> SparseCode:
    tokens, features, entries = (torch.cat(one) for one in zip(*parts, strict=True))
    counts = torch.bincount(tokens, minlength=n_tokens)
    width = max(int(counts.max()) if n_tokens else 0, capacity or 1)
    check_room(f"a code of capacity={capacity}", (n_tokens, width), torch.int64)
    places = torch.arange(len(tokens), device=tokens.device) - (counts.cumsum(0) - counts)[tokens]
    values, indices = entries.new_zeros(n_tokens, width), features.new_zeros(n_tokens, width)
    values[tokens, places], indices[tokens, places] = entries, features
    return SparseCode(values, indices, counts)


def _shaped(code: SparseCode, leading: torch.Size) -> SparseCode:
    return SparseCode(*(t.reshape(leading + t.shape[1:]) for t in code))


def _without_nan(parts: Iterator[Entries]) -> Iterator[Entries]:
    for part in parts:
        bad = part.values.isnan()
        if bool(bad.any()):
            raise _nan_error(part.tokens[bad].unique())
        yield part


def _nan_error(tokens: Tensor) -> NumericsError:
    return NumericsError(
        f"the code of token {int(tokens[0])} (and of {len(tokens) - 1} others or more) holds NaN; look for NaN or "
        "infinity in x there and in the SAE's weights"
    )


def _check_count(name: str, count: int | None) -> None:
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise ConfigError(f"{name} is {count!r}; give a positive integer, or None")


def _check_code(code: SparseCode) -> None:
    if not isinstance(code, SparseCode) or not all(isinstance(one, Tensor) for one in code):
        raise ShapeError(f"code is a {type(code).__name__}; give the SparseCode that encode_sparse returns")
    values, indices, counts = code
    if not values.device == indices.device == counts.device:
        raise ConfigError(
            f"values are on {values.device}, indices on {indices.device}, counts on {counts.device}; move them to one"
        )
    if values.dim() == 0 or indices.shape != values.shape or counts.shape != values.shape[:-1]:
        raise ShapeError(
            f"values {tuple(values.shape)}, indices {tuple(indices.shape)} and counts {tuple(counts.shape)} do not "
            "fit: [..., width], [..., width] and [...] are wanted"
        )
    if not values.is_floating_point() or {indices.dtype, counts.dtype} - {torch.int32, torch.int64}:
        raise ShapeError(
            f"values are {values.dtype}, indices {indices.dtype} and counts {counts.dtype}; give floats and int32 or "
            "int64"
        )


def _entries_of_topk(sae: TopKSAE, rows: Tensor, k: int | None) -> Iterator[Entries] | None:
    """Yields the entries of a TopK SAE, which are its largest h; None if one is NaN, or if it is not on the CPU."""
    if type(sae) is not TopKSAE or rows.device.type != "cpu" or k is None:
        return None
    dtype = ops.product_dtype(rows)
    x_c = ops.centred(sae.normalization(rows).apply(rows), sae.b_dec if sae.apply_b_dec_to_input else None, dtype)
    return entries_of_largest(x_c, sae.W_enc.to(dtype), sae.b_enc.to(dtype), k, 0.0 if sae.relu else -math.inf)


def _entries_of_codes(sae: SparseAutoencoder, rows: Tensor, k: int | None) -> Iterator[Entries]:
    """Yields the codes of rows [n_tokens, d_in] by any SAE, from dense codes of CHUNK // d_sae tokens at a time."""
    for n0, part in chunks(rows, max(sparse_ops.CHUNK // sae.d_sae, 1)):
        if isinstance(sae, TopKSAE):
            h = sae.hidden_pre(part)
            z = h.relu() if sae.relu else h
        else:
            z = sae.encode(part) if k is None else sae.encode(part).relu()
        found = entries_of(z if k is None else first_largest(z, k))
        yield found._replace(tokens=found.tokens + n0)
