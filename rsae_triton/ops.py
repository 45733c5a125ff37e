"""The differentiable encoder over the backends, and the one place where a backend is chosen.

"triton"  fused kernels on a CUDA device (or in Triton's interpreter)
"cpu"     BLAS plus the fused pointwise gate of cpu.py
"eager"   reference.py: plain PyTorch, any device, any dtype
"auto"    triton on CUDA, cpu on the CPU, eager elsewhere
"""

from __future__ import annotations

import functools
import os
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpu, reference
from .errors import ConfigError, SourceError
from .reference import GateSpec, GateTensors

BACKENDS = ("auto", "triton", "cpu", "eager")
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _kernels() -> ModuleType:
    """The Triton kernels; imported late because Triton exists on Linux only."""
    try:
        from . import kernels
        from .kernels import encode_forward, rational_backward  # noqa: F401
    except ImportError as error:
        raise SourceError(
            f"backend='triton' cannot be used ({error}); install triton >= 3.3 (torch >= 2.7) or use backend='eager'"
        ) from error
    return kernels


@functools.cache
def _kernels_import() -> bool:
    """Whether the kernels can be had; says once why not, because eager PyTorch is many times slower on a GPU."""
    try:
        _kernels()
    except SourceError as error:
        warnings.warn(f"{error}; backend='auto' falls back to eager PyTorch", stacklevel=4)
        return False
    return True


def interpreting() -> bool:
    """Whether Triton's interpreter (TRITON_INTERPRET=1) runs the kernels, so that they accept CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Which backend runs for tensors of this device and dtype.

    Raises:
        ConfigError: an unknown name, or a backend that cannot work on this device or dtype.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend is {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        if device.type == "cuda" and dtype in _TRITON_DTYPES and _kernels_import():
            return "triton"
        return "cpu" if device.type == "cpu" else "eager"
    if backend == "triton":
        if device.type != "cuda" and not interpreting():
            raise ConfigError(
                f"backend='triton' needs tensors on a CUDA device, these are on {device}; use backend='auto', "
                "or set TRITON_INTERPRET=1 before Python starts to run the kernels slowly on the CPU"
            )
        if dtype not in _TRITON_DTYPES:
            raise ConfigError(f"backend='triton' computes in float32, bfloat16 or float16, not {dtype}")
    if backend == "cpu" and device.type != "cpu":
        raise ConfigError(f"backend='cpu' needs tensors on the CPU, these are on {device}; use backend='auto'")
    return backend


def rational_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    gate: GateTensors,
    spec: GateSpec,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """x -> code, through whichever backend fits.

    Args:
        x: [n_tokens, d_in]. W_enc: [d_in, d_sae]. b_enc: [d_sae]. All of one dtype and device.
        b_dec: [d_in], subtracted from x; None where the SAE does not.
        gate, spec: the gate (`RationalGate.tensors()` and `.spec()`).

    Returns:
        z [n_tokens, d_sae] in x's dtype, and counts [d_sae]: on how many tokens each feature is active. The
        counts are differentiable in the gated form (their slope is the rational's).
    """
    chosen = resolve_backend(backend, x.device, x.dtype)
    if chosen == "eager":
        return reference.encode(x, W_enc, b_enc, b_dec, gate, spec)
    return _RationalEncode.apply(x, W_enc, b_enc, b_dec, *gate, spec, chosen)


class _RationalEncode(torch.autograd.Function):
    """Saves x and the pre-activations h, and nothing else of size [n_tokens, d_sae]."""

    @staticmethod
    @torch.compiler.disable
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, *rest: Any) -> Any:
        gate, (spec, backend) = GateTensors(*rest[:7]), rest[7:]
        x_c = x if b_dec is None else x - b_dec
        if backend == "triton":
            z, h, counts, _ = _kernels().encode_forward(x_c, W_enc, b_enc, gate, **_flags(spec), save_h=x.dtype)
        else:
            h = torch.addmm(b_enc.unsqueeze(1), W_enc.t(), x_c.t())
            z, counts = cpu.gate_forward(_wide(h), gate, spec)
            z = z.to(x.dtype)
        ctx.save_for_backward(x, W_enc, b_dec, h, *gate)
        ctx.spec, ctx.backend = spec, backend
        ctx.set_materialize_grads(False)
        if spec.form == "direct":
            ctx.mark_non_differentiable(counts)
        return z.t(), counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor | None, dcounts: Tensor | None) -> Any:
        x, W_enc, b_dec, h, *tensors = ctx.saved_tensors
        gate, spec = GateTensors(*tensors), ctx.spec
        needs_x, needs_W, needs_b_enc, needs_b_dec, *needs_gate = ctx.needs_input_grad[:11]
        dz = torch.zeros_like(h) if dz is None else dz.t()
        dcounts = torch.zeros_like(gate.threshold) if dcounts is None else dcounts
        if ctx.backend == "triton":
            flags = {**_flags(spec), "backward_rational": spec.backward == "rational"}
            dh, sums = _kernels().rational_backward(h, dz, dcounts, None, gate, **flags, inplace=False)
            db_enc, folded = sums.b_enc, [*sums[:6], None]
        else:
            wide = _wide(h)
            trained = any(needs_gate[:3])
            dh, db_enc, per_feature = cpu.gate_backward(wide, dz.to(wide.dtype), dcounts, gate, spec, trained)
            dh = dh.to(h.dtype)
            folded = [_fold(one, like) for one, like in zip(per_feature, gate, strict=True)]
        x_c = x if b_dec is None else x - b_dec
        return (
            dh.t() @ W_enc.t() if needs_x else None,
            x_c.t() @ dh.t() if needs_W else None,
            db_enc.to(W_enc.dtype) if needs_b_enc else None,
            # A mat-vec: eager PyTorch forms the whole dx, a third GEMM, and sums it.
            -(W_enc.float() @ db_enc.float()).to(W_enc.dtype)
            if needs_b_dec and W_enc.dtype != torch.float64
            else -(W_enc @ db_enc)
            if needs_b_dec
            else None,
            *(one if needed else None for one, needed in zip(folded, needs_gate, strict=True)),
            None,
            None,
        )


def _flags(spec: GateSpec) -> dict[str, Any]:
    return {
        "p": spec.p,
        "q": spec.q,
        "gated": spec.form == "gated",
        "clamp": spec.domain == "clamp",
        "identity": spec.amplitude == "identity",
        "hard": spec.hard,
    }


def _wide(h: Tensor) -> Tensor:
    """h in the precision of the gate: float32 at least."""
    return h.to(torch.promote_types(h.dtype, torch.float32))


def _fold(per_feature: Tensor, like: Tensor) -> Tensor:
    """Per-feature gradients summed in float64 to the shape of the coefficients they belong to."""
    if per_feature.shape == like.shape:
        return per_feature.to(like.dtype)
    return per_feature.double().sum(0, keepdim=True).to(like.dtype)
