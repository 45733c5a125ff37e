"""All backends behind one interface; the only place where a backend is chosen.

"triton"  kernels on a CUDA device (or in Triton's interpreter), the faster of two ways (routing.py) or, as
          "triton:split" and "triton:fused", the way that is named
"cpu"     BLAS plus the fused pointwise gate of cpu.py
"eager"   the formulas of explicit.py in plain PyTorch: any device, any dtype
"auto"    triton on CUDA, cpu on the CPU, eager elsewhere

Inside, every [d_sae, n_tokens] tensor is feature-major (the tokens of one feature are contiguous), contiguous and in
the dtype of the matrix product; the gate, its sums and their gradients are float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rsae_triton.common.errors import ConfigError, SourceError, first_line
from rsae_triton.common.files import write_text
from rsae_triton.ops import cpu, explicit, routing
from rsae_triton.ops.reference import GateSpec, GateTensors
from rsae_triton.ops.routing import Route
from rsae_triton.ops.tiles import wide
from rsae_triton.ops.workspace import Workspace

BACKENDS = ("auto", "triton", "triton:split", "triton:fused", "cpu", "eager")
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (8, 0)
"""The oldest compute capability that Triton 3 and its bfloat16 products support."""


def kernels() -> ModuleType:
    """The module of the Triton kernels, imported on first use because Triton exists on Linux only."""
    try:
        module = importlib.import_module("rsae_triton.kernels")
    except ImportError as error:
        raise SourceError(
            f"backend='triton' cannot be used ({error}); install triton >= 3.3 (torch >= 2.7) or use backend='eager'"
        ) from error
    module.autotune.keep = write_text
    return module


@functools.cache
def start_driver() -> None:
    """Starts the part of Triton that launches kernels; on the first start, it is built by a C compiler.

    Raises:
        SourceError: it cannot start: there is no C compiler, no Python headers (as in slim containers), or no libcuda.
    """
    if kernels().INTERPRETED:
        return
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:  # it may be a RuntimeError, CalledProcessError or AssertionError
        raise SourceError(
            f"Triton cannot start here ({first_line(error)}): it needs libcuda, and gcc or clang with Python's "
            "headers; install them (Debian, Ubuntu: apt install gcc python3-dev), or use backend='eager'"
        ) from error


@functools.cache
def _kernels_start() -> bool:
    """Whether the kernels can be launched. If not, warns once, because eager PyTorch is many times slower on a GPU."""
    try:
        start_driver()
    except SourceError as error:
        warnings.warn(f"{error}; backend='auto' falls back to eager PyTorch", stacklevel=4)
        return False
    return True


def triton_runs_on(device: torch.device) -> bool:
    """Whether the kernels can be launched on tensors of this device; gives no warning."""
    return device.type == "cuda" and unsupported(device) is None and _kernels_start()


def _supported(device: torch.device) -> bool:
    """Whether the kernels run on a CUDA device; warns once if it is one of AMD."""
    reason = unsupported(device)
    if reason is not None and torch.version.hip is not None:
        _say_once(f"the triton backend {reason}")
    return reason is None


@functools.cache
def _say_once(what: str) -> None:
    warnings.warn(what, stacklevel=5)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def unsupported(device: torch.device) -> str | None:
    """Returns why the kernels do not run on a CUDA device, or None. An AMD GPU also counts as a CUDA device; its
    capability (MI300: 9.4) would select the tiles of Hopper, which do not fit it."""
    if torch.version.hip is not None:
        return (
            f"has tiles for NVIDIA GPUs only, {device} is an AMD GPU (ROCm {torch.version.hip}); use backend='auto', "
            "which takes eager PyTorch there"
        )
    return too_old(device) if capability(device) < OLDEST else None


def too_old(device: torch.device) -> str:
    """The reason to give for a CUDA device that is older than `OLDEST`."""
    return (
        "needs compute capability {}.{} (Ampere: bfloat16 in hardware), {} has {}.{}; "
        "use backend='auto', which takes eager PyTorch there"
    ).format(*OLDEST, device, *capability(device))


def interpreting() -> bool:
    """Whether Triton's interpreter (TRITON_INTERPRET=1) runs the kernels, so that they accept CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Returns the backend for tensors of this device and dtype.

    Raises:
        ConfigError: an unknown name, or a backend that cannot work on this device or dtype.
        SourceError: Triton is requested by name and is missing or cannot start.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend is {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        if device.type == "cuda" and dtype in _TRITON_DTYPES and _supported(device) and _kernels_start():
            return "triton"
        return "cpu" if device.type == "cpu" else "eager"
    if backend.startswith("triton"):
        if device.type != "cuda" and not interpreting():
            raise ConfigError(
                f"backend={backend!r} needs tensors on a CUDA device, these are on {device}; use backend='auto', "
                "or set TRITON_INTERPRET=1 before Python starts to run the kernels slowly on the CPU"
            )
        if device.type == "cuda" and (reason := unsupported(device)) is not None:
            raise ConfigError(f"backend={backend!r} {reason}")
        if dtype not in _TRITON_DTYPES:
            raise ConfigError(f"backend={backend!r} computes in float32, bfloat16 or float16, not {dtype}")
        if device.type == "cuda":
            start_driver()
    if backend == "cpu" and device.type != "cpu":
        raise ConfigError(f"backend='cpu' needs tensors on the CPU, these are on {device}; use backend='auto'")
    return backend


def choose(
    backend: str, device: torch.device, dtype: torch.dtype, d_in: int, gate: GateTensors, spec: GateSpec, training: bool
) -> tuple[str, Route]:
    """Returns the backend for the functions below and the way it takes; raises as `resolve_backend` does."""
    kind, _, way = resolve_backend(backend, device, dtype).partition(":")
    if way or kind != "triton":
        return kind, Route(way or "split", way or "split", backend)
    name, shared = routing.device_name(device), len(gate.a) == 1
    return kind, routing.route(name, d_in, spec.p, spec.q, shared, dtype.itemsize, training=training)


class Codes(NamedTuple):
    """z [d_sae, n_tokens]; h of the same shape, or None if not requested; counts and l1 [d_sae]."""

    z: Tensor
    h: Tensor | None
    counts: Tensor
    l1: Tensor


class Gradients(NamedTuple):
    """dh [d_sae, n_tokens], its sum over tokens [d_sae], and the gradients of the gate, each in its tensor's own
    shape."""

    dh: Tensor
    b_enc: Tensor
    gate: GateTensors


def encode(
    backend: str,
    x_c: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    gate: GateTensors,
    spec: GateSpec,
    *,
    save_h: bool,
    fused: bool = False,
    space: Workspace | None = None,
) -> Codes:
    """Encodes x_c [n_tokens, d_in] with W_enc [d_in, d_sae]; returns `Codes`.

    b_enc: None if the thresholds already account for it. fused: apply the gate inside the matrix product, if the
    backend can (Triton). space: where h and z are kept, under these names.
    """
    if backend == "triton" and fused:
        save = x_c.dtype if save_h else None
        return Codes(*kernels().encode_forward(x_c, W_enc, b_enc, gate, **kernel_flags(spec), save_h=save))
    shape = (W_enc.shape[1], x_c.shape[0])
    h = x_c.new_empty(shape) if space is None else space.take("h", shape, x_c)
    if b_enc is None:
        torch.mm(W_enc.t(), x_c.t(), out=h)
    else:
        torch.addmm(b_enc.unsqueeze(1), W_enc.t(), x_c.t(), out=h)
    out = None
    if backend == "cpu" and (space is not None or not save_h):
        out = h if not save_h or space is None else space.take("z", shape, x_c)
    z, counts, l1 = gate_forward(backend, h, gate, spec, out)
    return Codes(z, h if save_h else None, counts, l1)


def gate_forward(
    backend: str, h: Tensor, gate: GateTensors, spec: GateSpec, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes z (in h's shape and dtype), counts and l1 [d_sae] from h [d_sae, n_tokens].

    out: memory for z in the CPU backend; may be h itself.
    """
    if backend == "triton":
        return kernels().rational_forward(h, gate, **kernel_flags(spec))
    if backend == "cpu":
        return cpu.gate_forward(h, gate, spec, out)
    z, counts, l1 = explicit.gate_forward(h.to(wide(h.dtype)), gate, spec)
    return z.to(h.dtype), counts, l1


def decode_backward(
    backend: str,
    g: Tensor,
    W_dec: Tensor,
    h: Tensor,
    dcounts: Tensor | None,
    dl1: Tensor | None,
    gate: GateTensors,
    spec: GateSpec,
    *,
    coefficients: bool = True,
    fused: bool = False,
    out: Tensor | None = None,
) -> Gradients:
    """`gate_backward` for dz = W_dec g^T, where g [n_tokens, d_in] is the gradient of z^T W_dec.

    fused: without storing dz, if the backend can (Triton). out: memory to use for dz and then dh.
    """
    if backend == "triton" and fused:
        flags = {**kernel_flags(spec), "backward_rational": spec.backward == "rational"}
        flags["coefficients"] = coefficients
        dh, _, sums = kernels().encode_backward(g, W_dec, h, dcounts, dl1, gate, **flags)
        return Gradients(dh, sums.b_enc, _in_order(sums, gate))
    dz = torch.mm(W_dec, g.t()) if out is None else torch.mm(W_dec, g.t(), out=out)
    return gate_backward(backend, h, dz, dcounts, dl1, gate, spec, coefficients=coefficients, inplace=True)


def gate_backward(
    backend: str,
    h: Tensor,
    dz: Tensor,
    dcounts: Tensor | None,
    dl1: Tensor | None,
    gate: GateTensors,
    spec: GateSpec,
    *,
    coefficients: bool = True,
    inplace: bool = False,
) -> Gradients:
    """The gradients of `gate_forward`; the incoming ones of counts and l1 may be None. Arguments: see
    `explicit.gate_backward`.

    inplace: dz may be overwritten (use the returned dh).
    """
    if backend == "triton":
        flags = {**kernel_flags(spec), "backward_rational": spec.backward == "rational"}
        flags["coefficients"] = coefficients
        dh, sums = kernels().rational_backward(h, dz, dcounts, dl1, gate, **flags, inplace=inplace)
        return Gradients(dh, sums.b_enc, _in_order(sums, gate))
    if backend == "cpu":
        dh, db_enc, grads = cpu.gate_backward(h, dz, dcounts, dl1, gate, spec, coefficients, inplace=inplace)
    else:
        exact = wide(h.dtype)
        dh, db_enc, grads = explicit.gate_backward(h.to(exact), dz.to(exact), dcounts, dl1, gate, spec, coefficients)
        dh = dh.to(h.dtype)
    return Gradients(dh, db_enc, GateTensors(*(_fold(one, like) for one, like in zip(grads, gate, strict=True))))


def _in_order(sums: Any, gate: GateTensors) -> GateTensors:
    """Takes the gate's gradients from the kernels' GateGrads, of which they are the first six."""
    in_order = [*sums[:6], torch.zeros_like(gate.activity_threshold)]
    return GateTensors(*in_order)


def kernel_flags(spec: GateSpec) -> dict[str, Any]:
    """The keyword arguments that a kernel is compiled for."""
    return {
        "p": spec.p,
        "q": spec.q,
        "gated": spec.form == "gated",
        "clamp": spec.domain == "clamp",
        "identity": spec.amplitude == "identity",
        "hard": spec.hard,
    }


def _fold(per_feature: Tensor, like: Tensor) -> Tensor:
    """Sums per-feature gradients in float64 to the shape of the coefficients they belong to."""
    if per_feature.shape == like.shape:
        return per_feature.to(like.dtype)
    return per_feature.double().sum(0, keepdim=True).to(like.dtype)
