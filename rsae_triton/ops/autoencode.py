"""The whole loss of an SAE with its gradients, in pieces: no [n_tokens, d_sae] tensor exists but the piece at hand.

The gradient of the loss is known as soon as a piece's reconstruction is (its upstream gradient is one number), so
every piece is encoded, decoded and differentiated before the next begins, the way Liger's fused linear cross entropy
works. Pieces of tokens cost the 10 n d_in d_sae FLOPs of the five matrix products. Pieces of features ("streamed")
need the whole reconstruction first and encode a second time: 12, with memory that does not depend on d_sae.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from rsae_triton.common.checks import check_integer, check_number, check_tensor
from rsae_triton.common.errors import ConfigError, ShapeError
from rsae_triton.ops import backends
from rsae_triton.ops.across import Across
from rsae_triton.ops.backends import Codes
from rsae_triton.ops.encode import GATE_SCHEMA, centred, check_inputs, product_dtype, settings, through_encoder, unpack
from rsae_triton.ops.reference import GateSpec, GateTensors
from rsae_triton.ops.tiles import wide
from rsae_triton.ops.workspace import StepMemory, current

N_GRADIENTS = 11
"""x, W_enc, b_enc, W_dec, b_dec and the gate's first six tensors."""


class Autoencoded(NamedTuple):
    """The loss of one batch and its parts.

    Attributes:
        total: mse + l1_weight * l1 + l0_weight * l0, a scalar; the only one to differentiate (detach the others).
        mse: mean over tokens of ||x - x_hat||^2. l1: mean over tokens of sum_f |z_f| ||W_dec_f||.
        l0: mean number of active features. counts: [d_sae], on how many tokens each feature is active.
        x_hat: [..., d_in] in x's dtype.
    """

    total: Tensor
    mse: Tensor
    l1: Tensor
    l0: Tensor
    counts: Tensor
    x_hat: Tensor


def rational_autoencode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    gate: GateTensors,
    spec: GateSpec,
    *,
    l1_weight: float = 0.0,
    l0_weight: float = 0.0,
    chunk_tokens: int | None = None,
    chunk_features: int | None = None,
    apply_b_dec_to_input: bool = True,
    target: Tensor | None = None,
    residual_scale: Tensor | None = None,
    backend: str = "auto",
    across: Across | None = None,
) -> Autoencoded:
    """x -> loss, differentiated on the way: `total.backward()` only scales gradients that are there already.

    Largest memory beside weights, gradients and [n_tokens, d_in]: two or three [chunk_features, chunk_tokens] tensors.

    Args:
        x: [..., d_in]. W_enc: [d_in, d_sae]. b_enc: [d_sae]. W_dec: [d_sae, d_in]. b_dec: [d_in]. One dtype, one
            device; under autocast the matrix products are in the autocast dtype. x may require a gradient.
        gate, spec: the gate (`RationalGate.tensors()` and `.spec()`).
        l1_weight, l0_weight: of the mean over tokens of sum_f |z_f| ||W_dec_f||, and of the number of active
            features. The latter has a gradient in the gated form only.
        chunk_tokens: tokens at a time; all of them when None.
        chunk_features: features at a time; all of them when None. Less than d_sae encodes twice (12 instead of 10
            n d_in d_sae FLOPs).
        apply_b_dec_to_input: whether b_dec is subtracted from x before encoding.
        target: [..., d_in], what x_hat is compared with; x when None. residual_scale: [...] or [..., 1], what
            multiplies each token's target - x_hat. Both are constants; an SAE that normalises its input needs them
            for an mse in the input's units.
        backend: as in `rational_encode`; "eager" runs the written-out formulas in plain PyTorch.
        across: the other processes that hold features of this SAE. mse is then that of all of them, l1, l0 and counts
            are of the features here, and gradients of b_dec and of shared coefficients are to be added up.

    Raises:
        ShapeError: sizes that do not fit. ConfigError: settings that cannot be used; in backward: a gradient for
            anything but `total`, a second backward pass, or a second derivative.
    """
    for name, needed in (("W_dec", W_dec), ("b_dec", b_dec)):
        check_tensor(name, needed)
    check_inputs(x, W_enc, b_enc, b_dec, W_dec, gate, spec)
    for name, weight in (("l1_weight", l1_weight), ("l0_weight", l0_weight)):
        check_number(name, weight, least=0)
    for name, chunk in (("chunk_tokens", chunk_tokens), ("chunk_features", chunk_features)):
        if chunk is not None:
            check_integer(name, chunk, 1, 2**63 - 1)
    dtype = product_dtype(x)
    gate = GateTensors(*(one.to(wide(dtype)) for one in gate))
    rows = x.reshape(-1, x.shape[-1])
    differentiable = (rows, W_enc, b_enc, W_dec, b_dec, *gate[:6])
    wanted = [torch.is_grad_enabled() and one.requires_grad for one in differentiable]
    sizes = [0 if one is None else one for one in (chunk_tokens, chunk_features)]
    if target is not None:
        check_tensor("target", target, x.device)
        if target.shape != x.shape:
            raise ShapeError(f"target has shape {tuple(target.shape)}; that of x is wanted, {tuple(x.shape)}")
        target = target.detach().reshape(rows.shape)
    if residual_scale is not None:
        check_tensor("residual_scale", residual_scale, x.device)
        if residual_scale.numel() != len(rows):
            raise ShapeError(
                f"residual_scale has shape {tuple(residual_scale.shape)}; one number for each token is wanted"
            )
        residual_scale = residual_scale.detach().reshape(-1, 1).to(wide(dtype))
    options = (l1_weight, l0_weight, *sizes, apply_b_dec_to_input, target, residual_scale, backend, dtype, wanted)
    if across is None:
        results = _autoencode(rows, W_enc, b_enc, W_dec, b_dec, *gate, *settings(spec), *options)
    else:
        # Not through the operator: what runs on several processes at once cannot be traced as one.
        results = _Across.apply(across, gate, spec, options, *differentiable)
    total, mse, l1, l0, counts, x_hat, *_ = results
    return Autoencoded(total, mse, l1, l0, counts, x_hat if x.dim() == 2 else x_hat.reshape(x.shape))


def run(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    gate: GateTensors,
    spec: GateSpec,
    l1_weight: float,
    l0_weight: float,
    chunk_tokens: int,
    chunk_features: int,
    subtract: bool,
    target: Tensor | None,
    scale: Tensor | None,
    backend: str,
    dtype: torch.dtype,
    wanted: list[bool],
    across: Across | None = None,
) -> tuple[Tensor, ...]:
    """What the operator does: -> total, mse, l1, l0, counts, x_hat and the N_GRADIENTS gradients of total (of no
    elements where not wanted). x [n_tokens, d_in]; chunks of 0 mean all at once; dtype is that of the products."""
    n, d_sae, exact = len(x), W_enc.shape[1], wide(dtype)
    token_parts, feature_parts = _parts(n, chunk_tokens), _parts(d_sae, chunk_features)
    differentiate, whole = any(wanted), len(feature_parts) == 1
    kind, route = backends.choose(backend, x.device, dtype, x.shape[1], gate, spec, training=differentiate)
    forward, backward = route.forward == "fused", route.backward == "fused"
    # Gradients of the mean; in float16 those would vanish, and those of the sum overflow.
    unit = 1 / max(n, 1) if dtype != torch.float16 else 2.0 ** -math.ceil(math.log2(max(n, 1)) / 2)
    W_enc_p, W_dec_p = (W_enc.to(dtype), W_dec.to(dtype)) if whole else (W_enc, W_dec)
    norms = torch.linalg.vector_norm(W_dec, dim=1, dtype=exact)
    memory = current()
    found = _Gradients(x, W_enc, W_dec, b_dec, gate, wanted, len(token_parts) == 1, whole, memory)
    counts, l1, squares = (x.new_zeros(shape, dtype=exact) for shape in (d_sae, d_sae, ()))
    x_hat = torch.empty_like(x, memory_format=torch.contiguous_format)
    space = memory.space if kind == "cpu" else None
    # A direct gate sees h - threshold alone: a bias less to add spares the CPU a pass over h. Not in low precision,
    # where h rounds as it should with the bias in it.
    folded = kind == "cpu" and spec.form == "direct" and dtype == exact

    def encode(features: slice, x_c: Tensor, save_h: bool) -> tuple[Codes, Tensor, Tensor, GateTensors]:
        W_e, W_d, own = W_enc_p[:, features].to(dtype), W_dec_p[features].to(dtype), _rows(gate, features)
        b_e = b_enc[features].to(dtype)
        if folded:
            own = own._replace(threshold=own.threshold - b_e)
        bias = None if folded else b_e
        codes = backends.encode(kind, x_c, W_e, bias, own, spec, save_h=save_h, fused=forward, space=space)
        return codes, W_e, W_d, own

    for tokens in token_parts:
        part = x[tokens]
        x_c = centred(part, b_dec if subtract else None, dtype)
        out = part.new_empty(part.shape, dtype=dtype if whole else exact)
        for features in feature_parts:
            piece = encode(features, x_c, differentiate and whole)
            codes, _, W_d, _ = piece
            _add_product(out, codes.z.t(), W_d, fresh=features.start == 0)
            counts[features] += codes.counts
            l1[features] += codes.l1
        out = out.to(exact)
        if across is None or across.first:
            out.add_(b_dec)
        if across is not None:
            out = across.sum(out)
        x_hat[tokens] = out
        residual = out.sub_(part if target is None else target[tokens])
        if scale is not None:
            residual.mul_(scale[tokens])
        squares += residual.square().sum()
        if not differentiate:
            continue
        residual.mul_(2 * unit if scale is None else scale[tokens] * (2 * unit))
        g = residual.to(dtype)
        for features in feature_parts:
            codes, W_e, W_d, own = piece if whole else encode(features, x_c, True)
            assert codes.h is not None
            found.decoder(tokens, features, codes.z, g)
            dcounts = norms[features].new_full((len(codes.z),), l0_weight * unit) if l0_weight else None
            dl1 = norms[features] * (l1_weight * unit) if l1_weight else None
            grads = backends.decode_backward(
                kind, g, W_d, codes.h, dcounts, dl1, own, spec,
                coefficients=any(wanted[5:8]), fused=backward, out=codes.z,
            )  # fmt: skip
            found.encoder(tokens, features, x_c, W_e, grads)
        found.residual(tokens, residual, of_x=target is None, of_b_dec=across is None or across.first)

    mean = 1 / max(n, 1)
    mse, l1_mean, l0 = squares * mean, torch.dot(l1, norms) * mean, counts.sum() * mean
    total = mse + l1_weight * l1_mean + l0_weight * l0
    if l1_weight:
        found.norms(W_dec, torch.where(norms > 0, l1 / norms, 0) * (l1_weight * unit))
    if subtract:
        found.centre(W_enc)
    return total, mse, l1_mean, l0, counts, x_hat, *found.finish(mean / unit)


class _Gradients:
    """The gradients as they grow from piece to piece, each in the precision that its sum needs."""

    def __init__(
        self,
        x: Tensor,
        W_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        gate: GateTensors,
        wanted: list[bool],
        one_token_part: bool,
        one_feature_part: bool,
        recycled: StepMemory,
    ) -> None:
        self._likes, self._wanted = (x, W_enc, W_enc[0], W_dec, b_dec, *gate[:6]), wanted

        def memory(place: int, one_term: bool) -> Tensor:
            like = self._likes[place]
            dtype = like.dtype if one_term else wide(like.dtype)
            return recycled.gradient(like, dtype) if wanted[place] else like.new_empty(0, dtype=dtype)

        self.dx, self.dW_enc, self.dW_dec = (
            memory(0, one_feature_part),
            memory(1, one_token_part),
            memory(3, one_token_part),
        )
        self.db_enc, self.db_dec = (one.new_zeros(one.shape, dtype=wide(one.dtype)) for one in (W_enc[0], b_dec))
        # Shared coefficients sum over every feature and every piece.
        double = torch.float64 if x.device.type != "mps" else torch.float32
        self.gate = [one.new_zeros(one.shape, dtype=double) for one in gate[:6]]

    def decoder(self, tokens: slice, features: slice, z: Tensor, g: Tensor) -> None:
        if self._wanted[3]:
            _add_product(self.dW_dec[features], z, g, fresh=tokens.start == 0)

    def encoder(self, tokens: slice, features: slice, x_c: Tensor, W_enc: Tensor, grads: backends.Gradients) -> None:
        if self._wanted[1]:
            _add_product(self.dW_enc[:, features], x_c.t(), grads.dh.t(), fresh=tokens.start == 0)
        if self._wanted[0]:
            _add_product(self.dx[tokens], grads.dh.t(), W_enc.t(), fresh=features.start == 0)
        self.db_enc[features] += grads.b_enc
        for total, one in zip(self.gate, grads.gate, strict=False):
            (total if len(total) == len(one) else total[features]).add_(one)

    def residual(self, tokens: slice, g: Tensor, *, of_x: bool, of_b_dec: bool) -> None:
        """g: the gradient of x_hat; minus that of x, beside what goes through the encoder, if x is the target."""
        if of_b_dec:
            self.db_dec += g.sum(0)
        if self._wanted[0] and of_x:
            self.dx[tokens] -= g

    def norms(self, W_dec: Tensor, scale: Tensor) -> None:
        """scale [d_sae]: l1's gradient by the norms of the decoder's rows, over the norms."""
        if self._wanted[3]:
            self.dW_dec.addcmul_(W_dec, scale.unsqueeze(1).to(self.dW_dec.dtype))

    def centre(self, W_enc: Tensor) -> None:
        if self._wanted[4]:
            self.db_dec -= through_encoder(W_enc, self.db_enc)

    def finish(self, rescale: float) -> list[Tensor]:
        """Each in its parameter's dtype, of no elements where it is not wanted."""
        found = (self.dx, self.dW_enc, self.db_enc, self.dW_dec, self.db_dec, *self.gate)
        return [
            (one if rescale == 1 else one.mul_(rescale)).to(like.dtype) if wanted else like.new_empty(0)
            for one, like, wanted in zip(found, self._likes, self._wanted, strict=True)
        ]


def _parts(length: int, step: int) -> list[slice]:
    step = step or max(length, 1)
    return [slice(start, min(start + step, length)) for start in range(0, max(length, 1), step)]


def _rows(gate: GateTensors, features: slice) -> GateTensors:
    """The gate of some features; shared coefficients stay as they are."""
    parts = [one[features] if k >= 5 or len(one) > 1 else one for k, one in enumerate(gate)]
    return GateTensors(*parts)


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, fresh: bool) -> None:
    """total += a @ b, or total = a @ b where it is fresh memory; the sum is in total's dtype."""
    if total.dtype == a.dtype:
        if fresh:
            torch.mm(a, b, out=total)
        else:
            torch.addmm(total, a, b, out=total)
    elif fresh:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)


@custom_op(
    "rsae::autoencode",
    mutates_args=(),
    schema=f"(Tensor x, Tensor W_enc, Tensor b_enc, Tensor W_dec, Tensor b_dec, {GATE_SCHEMA}, "
    "float l1_weight, float l0_weight, int chunk_tokens, int chunk_features, bool subtract, Tensor? target, "
    f"Tensor? scale, str backend, ScalarType dtype, bool[] wanted) -> ({', '.join(['Tensor'] * (6 + N_GRADIENTS))})",
)
def _autoencode(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, *rest: Any) -> Any:
    gate, spec, options = unpack(rest)
    with torch.autocast(x.device.type, enabled=False):
        return run(x, W_enc, b_enc, W_dec, b_dec, gate, spec, *options)


@_autoencode.register_fake
def _(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, *rest: Any) -> Any:
    dtype, wanted = rest[-2:]
    exact = wide(dtype)
    scalars = [x.new_empty((), dtype=exact) for _ in range(4)]
    likes = (x, W_enc, b_enc, W_dec, b_dec, *rest[:6])
    gradients = [like.new_empty(like.shape if needed else 0) for like, needed in zip(likes, wanted, strict=True)]
    return *scalars, x.new_empty(W_enc.shape[1], dtype=exact), x.new_empty(x.shape), *gradients


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.gradients = list(output[6:])
    ctx.wanted = inputs[-1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[6:])


def _derivative(ctx: Any, total: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
    if any(one is not None for one in others[:5]):
        raise ConfigError(
            "a gradient arrived at mse, l1, l0, counts or x_hat of rational_autoencode; only `total` can be "
            "differentiated (its weights are arguments). Detach the others, or build the loss on rational_encode"
        )
    if torch.is_grad_enabled():
        raise ConfigError(
            "rational_autoencode is differentiable once, and a second derivative was asked for (create_graph=True); "
            "build the loss on rational_encode with backend='eager'"
        )
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:
        raise ConfigError(
            "rational_autoencode was differentiated twice; its gradients are handed over in the first backward pass. "
            "Compute it again for another one"
        )
    nothing = (None,) * (len(ctx.needs_input_grad) - N_GRADIENTS)
    if total is None:
        return (None,) * N_GRADIENTS + nothing
    scaled = [one if wanted else None for one, wanted in zip(_scaled(gradients, total), ctx.wanted, strict=True)]
    return *scaled, *nothing


def _scaled(gradients: list[Tensor], by: Tensor) -> list[Tensor]:
    if type(by) is not Tensor:  # a tracer: no value to look at, nothing to be written over
        return [one * by for one in gradients]
    if by.device.type == "cpu" and float(by) == 1:
        return gradients
    return [one.mul_(by) for one in gradients]


_autoencode.register_autograd(_derivative, setup_context=_save)


class _Across(torch.autograd.Function):
    """`run` on one of several processes."""

    @staticmethod
    def forward(
        ctx: Any, across: Across, gate: GateTensors, spec: GateSpec, options: tuple[Any, ...], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        x, W_enc, b_enc, W_dec, b_dec = inputs[:5]
        with torch.autocast(x.device.type, enabled=False):
            results = run(x, W_enc, b_enc, W_dec, b_dec, gate, spec, *[*options, across])
        _save(ctx, (options[-1],), results)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return None, None, None, None, *_derivative(ctx, *grads)[:N_GRADIENTS]


@register_flop_formula(torch.ops.rsae.autoencode)
def _flops(x: torch.Size, W_enc: torch.Size, *rest: Any, **_: Any) -> int:
    """FlopCounterMode's: matrix products alone, as it counts everything."""
    (d_in, d_sae), wanted, chunk_features = W_enc, rest[-1], rest[-7]
    encodings = 2 if chunk_features and chunk_features < d_sae else 1
    backward = encodings + wanted[0] + wanted[1] + wanted[3] if any(wanted) else 0
    return 2 * x[0] * d_in * d_sae * (2 + backward)
