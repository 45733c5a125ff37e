"""The CPU backend: the pointwise gate without [n_tokens, d_sae] temporaries.

Two engines compute what `explicit.py` defines. *inductor* compiles it with torch.compile into one C++ loop (it needs
a compiler and seconds of warm-up); *tiled* works through cache-sized tiles in place, on plain threads. A rule
of shapes alone chooses, so that the same run always takes the same path; RSAE_CPU_ENGINE=tiled|inductor overrides.
"""

from __future__ import annotations

import functools
import os
import shutil
import types
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from . import explicit
from .errors import ConfigError
from .reference import GateSpec, GateTensors

# Below ATen's parallel grain (32768 elements): its threads would fight with ours, 650x slower on a busy machine.
TILE = 30720
# From here on a call is large enough to be one of many: compiling pays.
INDUCTOR_ELEMENTS = 2**20


def engine_for(n_elements: int, gate: GateTensors) -> str:
    """ "inductor" for training-size batches with shared coefficients where a C++ compiler is found, else "tiled"."""
    forced = os.environ.get("RSAE_CPU_ENGINE")
    if forced not in (None, "", "tiled", "inductor"):
        raise ConfigError(f"RSAE_CPU_ENGINE is {forced!r}; set it to tiled or inductor, or unset it")
    if forced:
        return forced
    compiler = os.environ.get("CXX") or "g++"
    pays = n_elements >= INDUCTOR_ELEMENTS and len(gate.a) == 1
    return "inductor" if pays and shutil.which(compiler) and _Compiled.works else "tiled"


def gate_forward(h: Tensor, gate: GateTensors, spec: GateSpec) -> tuple[Tensor, Tensor]:
    """As `explicit.gate_forward`: h [d_sae, n_tokens] contiguous -> z, counts [d_sae] float32; h is kept."""
    if engine_for(h.numel(), gate) == "inductor":
        compiled = _Compiled.call(explicit.gate_forward, spec, h, *gate)
        if compiled is not None:
            return compiled
    return _tiled_forward(h, gate, spec)


def gate_backward(
    h: Tensor, dz: Tensor, dcounts: Tensor, gate: GateTensors, spec: GateSpec, coefficients: bool
) -> tuple[Tensor, Tensor, GateTensors]:
    """As `explicit.gate_backward`."""
    if engine_for(h.numel(), gate) == "inductor":
        compiled = _Compiled.call(_inductor_backward, (spec, coefficients), h, dz, dcounts, *gate)
        if compiled is not None:
            return compiled
    return _tiled_backward(h, dz, dcounts, gate, spec, coefficients)


def _inductor_backward(
    h: Tensor, dz: Tensor, dcounts: Tensor, gate: GateTensors, option: tuple[GateSpec, bool]
) -> tuple[Tensor, Tensor, GateTensors]:
    return explicit.gate_backward(h, dz, dcounts, gate, *option)


class _Compiled:
    """Functions compiled by Inductor, one per kind of gate; a compiler that fails is reported once and not retried."""

    works = True

    @classmethod
    def call(cls, function: Callable[..., Any], option: Any, *tensors: Tensor) -> Any:
        if not cls.works:
            return None
        try:
            return _compile(function, option)(*(one.detach() for one in tensors))
        except torch._dynamo.exc.BackendCompilerFailed as error:
            cls.works = False
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"torch.compile cannot build the CPU gate ({reason}); using the tiled path", stacklevel=4)
            return None


@functools.lru_cache(maxsize=64)
def _compile(function: Callable[..., Any], option: Any) -> Callable[..., Any]:
    def flat(*tensors: Tensor) -> Any:
        split = len(tensors) - len(GateTensors._fields)
        return function(*tensors[:split], GateTensors(*tensors[split:]), option)

    # Dynamo counts recompilations per code object (8 and it gives up): every kind of gate gets its own.
    own = types.FunctionType(flat.__code__.replace(), globals(), closure=flat.__closure__)
    return torch.compile(own, dynamic=True, fullgraph=True)


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _run(work: Callable[[slice, slice], None], h: Tensor) -> None:
    """Calls work(rows, columns) for every tile; all tiles of a row belong to one thread and come in order, so
    that sums over tokens need no lock and are the same in every run."""
    n_features, n_tokens = h.shape
    if n_tokens == 0:
        return
    columns = _slices(n_tokens, TILE)
    blocks = _slices(n_features, max(1, TILE // n_tokens))
    threads = min(torch.get_num_threads(), len(blocks))

    def share(first: int) -> None:
        # Grad mode is a thread's own: without this every op here would record a graph.
        with torch.no_grad():
            for rows in blocks[first::threads]:
                for column in columns:
                    work(rows, column)

    if threads == 1:
        share(0)
        return

    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(share, first) for first in range(threads)]:
            done.result()


def _tile_gate(gate: GateTensors, rows: slice) -> GateTensors:
    """The tile's rows of every tensor, as columns that broadcast over tokens."""
    shared = len(gate.a) == 1
    parts = [one if shared and k < 5 else one[rows] for k, one in enumerate(gate)]
    return GateTensors(*(one.unsqueeze(-1) for one in parts))


def _position(h: Tensor, gate: GateTensors, spec: GateSpec) -> tuple[Tensor, Tensor]:
    t = torch.sub(h, gate.threshold).div_(gate.input_scale)
    s = t.clamp(-1, 1) if spec.domain == "clamp" else t.clone()
    return t, s.sub_(gate.centre)


def _horner_(s: Tensor, coefficients: list[Tensor], slope: bool) -> tuple[Tensor, Tensor | None]:
    """A polynomial at s and, if asked, its derivative, each in one buffer; coefficients as columns, lowest first."""
    value = torch.empty_like(s).copy_(coefficients[-1])
    derivative = torch.zeros_like(s) if slope else None
    for one in reversed(coefficients[:-1]):
        if derivative is not None:
            torch.addcmul(value, derivative, s, out=derivative)
        torch.addcmul(one, value, s, out=value)
    return value, derivative


def _coefficients(gate: GateTensors) -> tuple[list[Tensor], list[Tensor]]:
    """Columns of P and of B, whose constant term is zero."""
    a = list(gate.a.unbind(1))
    return a, [torch.zeros_like(a[0]), *gate.b.unbind(1)]


def _tiled_forward(h: Tensor, gate: GateTensors, spec: GateSpec) -> tuple[Tensor, Tensor]:
    z = torch.empty_like(h)
    counts = h.new_zeros(len(h))

    def work(rows: slice, columns: slice) -> None:
        part, out, own = h[rows, columns], z[rows, columns], _tile_gate(gate, rows)
        if spec.form == "gated":
            active = part > own.threshold
        if spec.amplitude == "identity":
            torch.mul(part, active, out=out)
        else:
            t, s = _position(part, own, spec)
            a, b = _coefficients(own)
            r, _ = _horner_(s, a, slope=False)
            if spec.q:
                B, _ = _horner_(s, b, slope=False)
                r.div_(B.abs_().add_(1))
            if spec.form == "gated":
                torch.mul(part, r, out=out)
            else:
                if spec.domain == "clamp":
                    r.add_(t.sub_(1).clamp_(min=0))
                torch.mul(r, own.output_scale, out=out)
                active = out.abs() > own.activity_threshold
            if spec.hard:
                out.mul_(active)
        counts[rows] += active.sum(1)

    _run(work, h)
    return z, counts


def _tiled_backward(
    h: Tensor, dz: Tensor, dcounts: Tensor, gate: GateTensors, spec: GateSpec, coefficients: bool
) -> tuple[Tensor, Tensor, GateTensors]:
    dh = torch.empty_like(h)
    n_features = len(h)
    db_enc = h.new_zeros(n_features)
    sums = GateTensors(
        h.new_zeros(n_features, spec.p + 1),
        h.new_zeros(n_features, spec.q),
        *(h.new_zeros(n_features) for _ in range(5)),
    )
    masked = spec.hard and spec.backward == "soft"

    def work(rows: slice, columns: slice) -> None:
        part, grad, out = h[rows, columns], dz[rows, columns], dh[rows, columns]
        own = _tile_gate(gate, rows)
        t, s = _position(part, own, spec)
        a, b = _coefficients(own)
        r, slope = _horner_(s, a, slope=True)
        assert slope is not None
        Q = sign = None
        if spec.q:
            B, dB = _horner_(s, b, slope=True)
            assert dB is not None
            sign = B.sign()
            Q = B.abs_().add_(1)
            r.div_(Q)
            slope.sub_(dB.mul_(sign).mul_(r)).div_(Q)
        inside = t.abs().le_(1) if spec.domain == "clamp" else None
        if spec.form == "direct":
            tail = (t - 1).clamp_(min=0) if spec.domain == "clamp" else torch.zeros_like(t)
            value = tail.add_(r)
            if masked:
                active = (own.output_scale * value).abs_() > own.activity_threshold
                grad = grad * active
            sums.output_scale[rows] += torch.mul(value, grad).sum(1)
            dr = grad * own.output_scale
            dt = slope * dr
            if inside is not None:
                dt.mul_(inside).addcmul_(dr, (t > 1).to(dr.dtype))
            torch.div(dt, own.input_scale, out=out)
        else:
            opened = part > own.threshold
            dr = torch.zeros_like(part) if masked and spec.amplitude == "identity" else grad * part
            if masked:
                dr.mul_(opened)
            dr.add_(dcounts[rows].unsqueeze(-1))
            dt = slope * dr
            if inside is not None:
                dt.mul_(inside)
            amplitude = grad.clone() if spec.amplitude == "identity" else grad * r
            if spec.hard:
                amplitude.mul_(opened)
            torch.add(amplitude, dt / own.input_scale, out=out)
        db_enc[rows] += out.sum(1)
        sums.threshold[rows] -= dt.sum(1).div_(own.input_scale.squeeze(-1))
        sums.input_scale[rows] -= dt.mul_(t).sum(1).div_(own.input_scale.squeeze(-1))
        if not coefficients:
            return
        sums.centre[rows] -= torch.mul(slope, dr).sum(1)
        w = dr.div_(Q) if Q is not None else dr
        v = r.mul_(w).mul_(sign) if sign is not None else None
        for i in range(spec.p + 1):
            if i:
                w.mul_(s)
            sums.a[rows, i] += w.sum(1)
        for j in range(spec.q):
            assert v is not None
            sums.b[rows, j] -= v.mul_(s).sum(1)

    _run(work, h)
    return dh, db_enc, sums
