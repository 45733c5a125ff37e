"""The training loss of an SAE and its gradients, computed in pieces, so that memory holds one piece of [n_tokens,
d_sae].

The gradient of the loss is known as soon as a piece's reconstruction is (its upstream gradient is a single number). So
every piece is encoded, decoded and differentiated before the next begins, as in Liger's fused linear cross entropy.
Pieces of tokens cost the 10 n d_in d_sae FLOPs of the five matrix products. Pieces of features ("streamed") need the
whole reconstruction first, so they encode twice: 12 n d_in d_sae, with memory that does not depend on d_sae. If the
gate is zero outside its support, the sparse way (`support.py`) computes one of the five products: 2 n d_in d_sae.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from rsae_triton.common.checks import check_integer, check_number, check_tensor
from rsae_triton.common.errors import ConfigError, ShapeError
from rsae_triton.ops import backends, pieces, support, support_triton
from rsae_triton.ops.across import Across
from rsae_triton.ops.encode import GATE_SCHEMA, check_inputs, product_dtype, settings, unpack
from rsae_triton.ops.reference import GateSpec, GateTensors
from rsae_triton.ops.step import Step
from rsae_triton.ops.tiles import wide
from rsae_triton.ops.workspace import current

N_RESULTS, N_GRADIENTS = 7, 11
"""The number of fields of `Autoencoded`, and of gradients: x, W_enc, b_enc, W_dec, b_dec and the gate's first six
tensors."""
MEMORIES = ("dense", "sparse")


class Autoencoded(NamedTuple):
    """The loss of one batch and its parts.

    Attributes:
        total: mse + l1_weight * l1 + l0_weight * l0, a scalar; the only differentiable field.
        mse: mean over tokens of ||x - x_hat||^2. l1: mean over tokens of sum_f |z_f| ||W_dec_f||.
        l0: mean number of active features. counts: [d_sae], on how many tokens each feature is active.
        x_hat: [..., d_in] in x's dtype. entries: the number of places in the support; -1 for a dense step. After a
            sparse step on a GPU it is a tensor there.
    """

    total: Tensor
    mse: Tensor
    l1: Tensor
    l0: Tensor
    counts: Tensor
    x_hat: Tensor
    entries: Tensor


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
    memory: str = "dense",
    exact: bool = False,
    most_entries: int | None = None,
    apply_b_dec_to_input: bool = True,
    target: Tensor | None = None,
    residual_scale: Tensor | None = None,
    backend: str = "auto",
    across: Across | None = None,
) -> Autoencoded:
    """Computes the training loss of x and its gradients; `total.backward()` only scales gradients that exist already.

    The largest tensors besides weights, gradients and [n_tokens, d_in] are two or three [chunk_features, chunk_tokens].

    Args:
        x: [..., d_in]. W_enc: [d_in, d_sae]. b_enc: [d_sae]. W_dec: [d_sae, d_in]. b_dec: [d_in]. All of one dtype and
            device; under autocast the matrix products are in the autocast dtype. x may require a gradient.
        gate, spec: the gate (`RationalGate.tensors()` and `.spec()`).
        l1_weight, l0_weight: weights of the mean over tokens of sum_f |z_f| ||W_dec_f||, and of the number of active
            features. The latter has a gradient in the gated form only.
        chunk_tokens: tokens at a time; all of them when None.
        chunk_features: features at a time; all of them when None. Fewer than d_sae means encoding twice (12 instead of
            10 n d_in d_sae FLOPs).
        memory: "dense", in pieces as the chunks say, or "sparse": one product, and all else on the support of a gate
            that is gated, clamped and hard, with frozen coefficients. Losses and gradients are the same up to rounding.
        exact: make the product of a sparse step entirely in full precision. Otherwise a CPU with bfloat16 in hardware
            may find the support with that and recompute h on it; again the same up to rounding.
        most_entries: if the support is larger than this, a sparse step is computed densely; a quarter of [n_tokens,
            d_sae] when None. Not available with `across`, where all processes must do the same. On a GPU (backend
            "triton") the size is not waited for: memory has room for this number of entries
            (`support_triton.capacity_for` when None), and if there are more, `entries` says so and x_hat, the loss and
            its gradients are NaN.
        apply_b_dec_to_input: whether b_dec is subtracted from x before encoding.
        target: [..., d_in], what x_hat is compared with; x when None. residual_scale: [...] or [..., 1], multiplies
            each token's target - x_hat. Both are constants; an SAE that normalises its input needs them for an mse in
            the input's units.
        backend: see `rational_encode`; "eager" runs the written-out formulas in plain PyTorch.
        across: the other processes that hold features of this SAE. mse is then that of all of them; l1, l0 and counts
            are of the features here; gradients of b_dec and of shared coefficients must be summed by the caller.

    Raises:
        ShapeError: sizes that do not fit.
        ConfigError: settings that cannot be used; in the backward pass: a gradient for anything but `total`, a second
            backward pass, or a second derivative.
    """
    for name, needed in (("W_dec", W_dec), ("b_dec", b_dec)):
        check_tensor(name, needed)
    check_inputs(x, W_enc, b_enc, b_dec, W_dec, gate, spec)
    for name, weight in (("l1_weight", l1_weight), ("l0_weight", l0_weight)):
        check_number(name, weight, least=0)
    for name, chunk in (("chunk_tokens", chunk_tokens), ("chunk_features", chunk_features)):
        if chunk is not None:
            check_integer(name, chunk, 1, 2**63 - 1)
    if memory not in MEMORIES:
        raise ConfigError(f"memory is {memory!r}; choose one of {', '.join(MEMORIES)}")
    dtype = product_dtype(x)
    gate = GateTensors(*(one.to(wide(dtype)) for one in gate))
    rows = x.reshape(-1, x.shape[-1])
    differentiable = (rows, W_enc, b_enc, W_dec, b_dec, *gate[:6])
    wanted = [torch.is_grad_enabled() and one.requires_grad for one in differentiable]
    if memory == "sparse" and not support.has_support(spec, wanted):
        raise ConfigError(
            "memory='sparse' takes a gate that is zero outside a support: form='gated', domain='clamp', hard, and no "
            "gradients of a, b and centre (freeze alpha, beta and centre); use memory='dense'"
        )
    if most_entries is not None:
        check_integer("most_entries", most_entries, 0, 2**63 - 1)
    on_gpu = memory == "sparse" and backends.resolve_backend(backend, x.device, dtype).startswith("triton")
    if most_entries is None and on_gpu:
        most_entries = support_triton.capacity_for(len(rows) * W_enc.shape[1])
    elif most_entries is None and across is None:
        most_entries = max(rows.shape[0] * W_enc.shape[1] // 4, 1024)
    most = -1 if most_entries is None or (across is not None and not on_gpu) else most_entries
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
    loss = (l1_weight, l0_weight, apply_b_dec_to_input, target, residual_scale, dtype, wanted)
    way = Way(chunk_tokens or 0, chunk_features or 0, memory == "sparse", exact, most, backend)
    if across is None:
        results = _autoencode(rows, W_enc, b_enc, W_dec, b_dec, *gate, *settings(spec), *way, *loss)
    else:
        # Not through the operator, because a computation of several processes cannot be traced as one.
        step = Step(rows, W_enc, b_enc, W_dec, b_dec, gate, spec, *loss, across)
        results = Computed.apply(step, lambda own: run(own, way), *differentiable)
    total, mse, l1, l0, counts, x_hat, entries, *_ = results
    return Autoencoded(total, mse, l1, l0, counts, x_hat if x.dim() == 2 else x_hat.reshape(x.shape), entries)


class Way(NamedTuple):
    """How to compute a step: in chunks (0: all at once), or on its support, with at most this many entries (negative:
    any number)."""

    chunk_tokens: int
    chunk_features: int
    sparse: bool
    exact: bool
    most: int
    backend: str


def run(step: Step, way: Way) -> tuple[Tensor, ...]:
    """Computes what the operator returns: the N_RESULTS fields of `Autoencoded`, then the N_GRADIENTS gradients of
    total (empty tensors where not wanted)."""
    most = None if way.most < 0 else way.most
    triton = way.sparse and backends.resolve_backend(way.backend, step.x.device, step.dtype).startswith("triton")
    if triton and support_triton.can_run(step.spec, step.wanted):
        return support_triton.run(step, most)
    if way.sparse and (found := support.run(step, exact=way.exact, most=most)) is not None:
        return found
    results = pieces.run(step, way.chunk_tokens, way.chunk_features, way.backend)
    return *results[: N_RESULTS - 1], torch.tensor(-1), *results[N_RESULTS - 1 :]


@custom_op(
    "rsae::autoencode",
    mutates_args=(),
    schema=f"(Tensor x, Tensor W_enc, Tensor b_enc, Tensor W_dec, Tensor b_dec, {GATE_SCHEMA}, "
    "int chunk_tokens, int chunk_features, bool sparse, bool exact, int most, str backend, "
    "float l1_weight, float l0_weight, bool subtract, Tensor? target, Tensor? scale, ScalarType dtype, "
    "bool[] wanted) -> "
    f"({', '.join(['Tensor'] * (N_RESULTS + N_GRADIENTS))})",
)
def _autoencode(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, *rest: Any) -> Any:
    gate, spec, options = unpack(rest)
    n_way = len(Way._fields)
    with torch.autocast(x.device.type, enabled=False):
        return run(Step(x, W_enc, b_enc, W_dec, b_dec, gate, spec, *options[n_way:]), Way(*options[:n_way]))


@_autoencode.register_fake
def _(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, *rest: Any) -> Any:
    dtype, wanted = rest[-2:]
    exact = wide(dtype)
    scalars = [x.new_empty((), dtype=exact) for _ in range(4)]
    likes = (x, W_enc, b_enc, W_dec, b_dec, *rest[:6])
    gradients = [
        torch.empty_like(like) if needed else like.new_empty(0) for like, needed in zip(likes, wanted, strict=True)
    ]
    entries = torch.empty((), dtype=torch.int64)
    return *scalars, x.new_empty(W_enc.shape[1], dtype=exact), x.new_empty(x.shape), entries, *gradients


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.gradients = list(output[N_RESULTS:])
    ctx.wanted, ctx.whole = inputs[-1], current().whole
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[N_RESULTS - 1 :])


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
    made = gradients if ctx.whole else _scaled(gradients, total)
    scaled = [one if wanted else None for one, wanted in zip(made, ctx.wanted, strict=True)]
    return *scaled, *nothing


def _scaled(gradients: list[Tensor], by: Tensor) -> list[Tensor]:
    if type(by) is not Tensor:  # a tracer: it has no value to inspect, and nothing to overwrite
        return [one * by for one in gradients]
    if by.device.type == "cpu" and float(by) == 1:
        return gradients
    return [one.mul_(by) for one in gradients]


_autoencode.register_autograd(_derivative, setup_context=_save)


class Computed(torch.autograd.Function):
    """A step that is computed with its gradients, without the operator."""

    @staticmethod
    def forward(ctx: Any, step: Step, make: Callable[[Step], tuple[Tensor, ...]], *inputs: Tensor) -> Any:
        # The differentiable tensors come as `inputs`, in the order of step.likes.
        x, W_enc, b_enc, W_dec, b_dec, a, b, centre, input_scale, output_scale, threshold = inputs
        gate = GateTensors(a, b, centre, input_scale, output_scale, threshold, step.gate.activity_threshold)
        own = Step(x, W_enc, b_enc, W_dec, b_dec, gate, *step[6:])
        with torch.autocast(own.x.device.type, enabled=False):
            results = make(own)
        _save(ctx, (step.wanted,), results)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return None, None, *_derivative(ctx, *grads)[:N_GRADIENTS]


@register_flop_formula(torch.ops.rsae.autoencode)
def _flops(x: torch.Size, W_enc: torch.Size, *rest: Any, **_: Any) -> int:
    """For FlopCounterMode: counts the matrix products only, as that does everywhere."""
    (d_in, d_sae), wanted, way = W_enc, rest[-1], Way(*rest[-13:-7])
    if way.sparse:
        return 2 * x[0] * d_in * d_sae
    encodings = 2 if 0 < way.chunk_features < d_sae else 1
    backward = encodings + wanted[0] + wanted[1] + wanted[3] if any(wanted) else 0
    return 2 * x[0] * d_in * d_sae * (2 + backward)
