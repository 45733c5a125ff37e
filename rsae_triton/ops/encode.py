"""The differentiable encoder as a torch operator, `torch.ops.rsae.encode`, over the backends of backends.py.

The operators are opaque to torch.compile and have a fake kernel that knows the shapes, so that fullgraph, FakeTensor
and AOTAutograd work. Their derivative is written out, and has no derivative itself.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from rsae_triton.common.checks import check_tensor
from rsae_triton.common.errors import ConfigError, ShapeError
from rsae_triton.ops import backends, cpu, reference
from rsae_triton.ops.backends import BACKENDS, interpreting, resolve_backend
from rsae_triton.ops.reference import Encoded, GateSpec, GateTensors
from rsae_triton.ops.tiles import wide

__all__ = ["BACKENDS", "interpreting", "rational_encode", "resolve_backend"]

GATE_SCHEMA = (
    "Tensor a, Tensor b, Tensor centre, Tensor input_scale, Tensor output_scale, Tensor threshold, "
    "Tensor activity_threshold, int p, int q, str form, str domain, str amplitude, bool hard, str backward"
)
N_GATE = 14
"""The number of arguments in GATE_SCHEMA: seven tensors and seven settings."""


def rational_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    gate: GateTensors,
    spec: GateSpec,
    backend: str = "auto",
) -> Encoded:
    """Encodes x with the best backend; differentiable once (with backend="eager" any number of times).

    Under autocast the matrix products are in the autocast dtype, but not x - b_dec before them and the gate after them.

    Args:
        x: [..., d_in]. W_enc: [d_in, d_sae]. b_enc: [d_sae]. All of one dtype and device.
        b_dec: [d_in], subtracted from x; None if the SAE does not subtract it.
        gate, spec: the gate (`RationalGate.tensors()` and `.spec()`); evaluated in float32, float64 for float64 x.

    Returns:
        `Encoded`: z [..., d_sae] in the dtype of the matrix product; counts and l1 [d_sae], over all tokens.

    Raises:
        ShapeError: sizes that do not fit.
        ConfigError: dtypes or devices that differ, a backend that is unknown or cannot work, or a second derivative.
    """
    check_inputs(x, W_enc, b_enc, b_dec, None, gate, spec)
    dtype = product_dtype(x)
    gate = GateTensors(*(one.to(wide(dtype)) for one in gate))
    rows = x.reshape(-1, x.shape[-1])
    if backend == "eager" or reference.transformed():
        encoded = _reference_encode(rows, W_enc, b_enc, b_dec, gate, spec, dtype)
    else:
        differentiable = [x, W_enc, b_enc, *gate] if b_dec is None else [x, W_enc, b_enc, b_dec, *gate]
        save_h = torch.is_grad_enabled() and any(one.requires_grad for one in differentiable)
        z, counts, l1, _ = _encode(rows, W_enc, b_enc, b_dec, *gate, *settings(spec), backend, dtype, save_h)
        encoded = Encoded(z.t(), counts, l1)
    return encoded if x.dim() == 2 else encoded._replace(z=encoded.z.reshape(*x.shape[:-1], W_enc.shape[1]))


def _reference_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, gate: GateTensors, spec: GateSpec, dtype: torch.dtype
) -> Encoded:
    if dtype != x.dtype:
        x, W_enc, b_enc = ((x if b_dec is None else x - b_dec).to(dtype), W_enc.to(dtype), b_enc.to(dtype))
        b_dec = None
    return reference.encode(x, W_enc, b_enc, b_dec, gate, spec)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the matrix products: x's dtype, or that of autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.is_floating_point() else x.dtype


def settings(spec: GateSpec) -> tuple[int, int, str, str, str, bool, str]:
    """The fields of a `GateSpec` in the order of GATE_SCHEMA."""
    return spec.p, spec.q, spec.form, spec.domain, spec.amplitude, spec.hard, spec.backward


def check_inputs(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    W_dec: Tensor | None,
    gate: GateTensors,
    spec: GateSpec,
) -> None:
    """Raises ShapeError or ConfigError, naming the argument, if the tensors do not fit each other."""
    if not isinstance(gate, GateTensors) or not isinstance(spec, GateSpec):
        raise ConfigError(
            f"gate is a {type(gate).__name__} and spec a {type(spec).__name__}; give RationalGate.tensors() and .spec()"
        )
    for name, given in (("x", x), ("W_enc", W_enc), ("b_enc", b_enc)):
        check_tensor(name, given)
    for name, optional in (("b_dec", b_dec), ("W_dec", W_dec)):
        if optional is not None:
            check_tensor(name, optional)
    if W_enc.dim() != 2 or x.dim() == 0 or x.shape[-1] != W_enc.shape[0]:
        raise ShapeError(
            f"x has shape {tuple(x.shape)} and W_enc {tuple(W_enc.shape)}; [..., d_in] and [d_in, d_sae] are wanted"
        )
    d_in, d_sae = W_enc.shape
    sets = {1, d_sae}
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("b_enc", b_enc, (d_sae,)),
        ("b_dec", b_dec, (d_in,)),
        ("W_dec", W_dec, (d_sae, d_in)),
        ("threshold", gate.threshold, (d_sae,)),
        ("activity_threshold", gate.activity_threshold, (d_sae,)),
        ("a", gate.a, (gate.a.shape[0] if gate.a.shape[0] in sets else d_sae, spec.p + 1)),
        ("b", gate.b, (gate.b.shape[0] if gate.b.shape[0] in sets else d_sae, spec.q)),
    ]
    for name, one in (("centre", gate.centre), ("input_scale", gate.input_scale), ("output_scale", gate.output_scale)):
        expected.append((name, one, (1,) if tuple(one.shape) == (1,) else (d_sae,)))
    for name, tensor, shape in expected:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ShapeError(f"{name} has shape {tuple(tensor.shape)}; expected {shape} (d_in={d_in}, d_sae={d_sae})")
        if tensor is not None and tensor.device != x.device:
            raise ConfigError(f"{name} is on {tensor.device} and x on {x.device}; move them to one device")
    if W_enc.device != x.device:
        raise ConfigError(f"W_enc is on {W_enc.device} and x on {x.device}; move them to one device")
    for name, tensor in (("W_enc", W_enc), ("b_enc", b_enc), ("b_dec", b_dec), ("W_dec", W_dec)):
        if tensor is not None and tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ConfigError(f"x is {x.dtype} but {name} is {tensor.dtype}; convert one of them with .to(...)")


@custom_op(
    "rsae::encode",
    mutates_args=(),
    schema=f"(Tensor x, Tensor W_enc, Tensor b_enc, Tensor? b_dec, {GATE_SCHEMA}, str backend, ScalarType dtype, "
    "bool save_h) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """Returns z_fm [d_sae, n_tokens], counts and l1 [d_sae], and h_fm like z_fm (empty unless save_h)."""
    gate, spec, (backend, dtype, save_h) = unpack(rest)
    with torch.autocast(x.device.type, enabled=False):
        chosen, route = backends.choose(backend, x.device, dtype, W_enc.shape[0], gate, spec, training=save_h)
        weights, fused = (W_enc.to(dtype), b_enc.to(dtype)), route.forward == "fused"
        x_c = centred(x, b_dec, dtype)
        with cpu.looking(not save_h):
            z, h, counts, l1 = backends.encode(chosen, x_c, *weights, gate, spec, save_h=save_h, fused=fused)
        # The kernels' sums are two rows of one tensor, but outputs of an operator must not share memory.
        return z, counts, l1.clone(), z.new_empty(0) if h is None else h


@_encode.register_fake
def _(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    dtype, save_h = rest[-2:]
    shape = (W_enc.shape[1], x.shape[0])
    counts, l1 = (x.new_empty(shape[0], dtype=wide(dtype)) for _ in range(2))
    return x.new_empty(shape, dtype=dtype), counts, l1, x.new_empty(shape if save_h else 0, dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, W_enc, _, b_dec, *rest = inputs
    _, counts, _, h = output
    ctx.save_for_backward(x, W_enc, b_dec, h, *rest[:7])
    ctx.settings = rest[7:-1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(h, *([counts] if rest[9] == "direct" else []))


def _derivative(ctx: Any, dz: Tensor | None, dcounts: Tensor | None, dl1: Tensor | None, _: None) -> tuple[Any, ...]:
    needs = [bool(one) for one in ctx.needs_input_grad[:10]]
    nothing = (None,) * (len(ctx.needs_input_grad) - 10)
    if dz is None and dcounts is None and dl1 is None:
        return (None,) * 10 + nothing
    found = iter(_encode_backward(dz, dcounts, dl1, *ctx.saved_tensors, *ctx.settings, needs))
    return (*(next(found) if needed else None for needed in needs), *nothing)


_encode.register_autograd(_derivative, setup_context=_save)


@custom_op(
    "rsae::encode_backward",
    mutates_args=(),
    schema="(Tensor? dz, Tensor? dcounts, Tensor? dl1, Tensor x, Tensor W_enc, Tensor? b_dec, Tensor h, "
    f"{GATE_SCHEMA}, str backend, ScalarType dtype, bool[] needs) -> Tensor[]",
)
def _encode_backward(
    dz: Tensor | None,
    dcounts: Tensor | None,
    dl1: Tensor | None,
    x: Tensor,
    W_enc: Tensor,
    b_dec: Tensor | None,
    h: Tensor,
    *rest: Any,
) -> list[Tensor]:
    """Returns the gradients of x, W_enc, b_enc, b_dec and the gate's first six tensors, computing only those in
    `needs`."""
    gate, spec, (backend, dtype, needs) = unpack(rest)
    with torch.autocast(x.device.type, enabled=False):
        chosen, _ = backends.choose(backend, x.device, dtype, W_enc.shape[0], gate, spec, training=True)
        dz = torch.zeros_like(h) if dz is None else dz.to(dtype)
        grads = backends.gate_backward(chosen, h, dz, dcounts, dl1, gate, spec, coefficients=any(needs[4:7]))
        made = (
            lambda: grads.dh.t() @ W_enc.to(dtype).t(),
            lambda: product_like(W_enc, centred(x, b_dec, dtype).t(), grads.dh.t()),
            lambda: grads.b_enc,
            lambda: -through_encoder(W_enc, grads.b_enc),
            *((lambda k=k: grads.gate[k]) for k in range(6)),
        )
        likes = (x, W_enc, W_enc, W_enc, *gate[:6])
        return [make().to(like.dtype) for make, like, needed in zip(made, likes, needs, strict=True) if needed]


@_encode_backward.register_fake
def _(dz: Any, dcounts: Any, dl1: Any, x: Tensor, W_enc: Tensor, b_dec: Any, h: Any, *rest: Any) -> list[Tensor]:
    d_in, d_sae = W_enc.shape
    shapes = [x.shape, W_enc.shape, (d_sae,), (d_in,), *(one.shape for one in rest[:6])]
    likes = [x, W_enc, W_enc, W_enc, *rest[:6]]
    made = [like.new_empty(shape) for shape, like in zip(shapes, likes, strict=True)]
    made[1] = torch.empty_like(W_enc)
    return [one for one, needed in zip(made, rest[-1], strict=True) if needed]


def _refuse(ctx: Any, *grads: Any) -> NoReturn:
    raise ConfigError(
        "the rational encoder is differentiable once, and a second derivative was asked for (create_graph=True); "
        "use backend='eager', which differentiates as often as one likes"
    )


_encode_backward.register_autograd(_refuse)


def product_like(like: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Returns a @ b with the memory layout of `like` (row-major or column-major), so that as a gradient of `like` it
    need not be copied."""
    return a @ b if like.is_contiguous() or not like.t().is_contiguous() else (b.t() @ a.t()).t()


def unpack(rest: tuple[Any, ...]) -> tuple[GateTensors, GateSpec, tuple[Any, ...]]:
    """Splits the arguments of GATE_SCHEMA into a gate, its settings, and what follows them."""
    return GateTensors(*rest[:7]), GateSpec(*rest[7:N_GATE]), rest[N_GATE:]


def centred(x: Tensor, b_dec: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns x - b_dec, subtracted before rounding to the dtype of the matrix product."""
    return (x if b_dec is None else x - b_dec).to(dtype)


def through_encoder(W_enc: Tensor, db_enc: Tensor) -> Tensor:
    """Returns W_enc @ db_enc in the gradient's precision: minus the gradient of b_dec through the encoder.

    This is a mat-vec, whereas autograd would form the whole gradient of x - b_dec, a third GEMM, and sum it.
    """
    if W_enc.dtype == db_enc.dtype:
        return torch.mv(W_enc, db_enc)
    # The vector is split into two numbers of the weights' precision, instead of copying the weights to the vector's.
    high = db_enc.to(W_enc.dtype)
    both = torch.stack([high, (db_enc - high).to(W_enc.dtype)], dim=1)
    return (W_enc @ both).to(db_enc.dtype).sum(1)


@register_flop_formula(torch.ops.rsae.encode)
def _encode_flops(x: torch.Size, W_enc: torch.Size, *_: Any, **__: Any) -> int:
    """For FlopCounterMode: counts the matrix products only, as that does everywhere."""
    return 2 * x[0] * W_enc[0] * W_enc[1]


@register_flop_formula(torch.ops.rsae.encode_backward)
def _encode_backward_flops(
    dz: Any, dcounts: Any, dl1: Any, x: torch.Size, W_enc: torch.Size, *rest: Any, **_: Any
) -> int:
    needs = rest[-1]
    return 2 * x[0] * W_enc[0] * W_enc[1] * (needs[0] + needs[1])
