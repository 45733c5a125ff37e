"""The CPU backend: computes the pointwise gate without [n_tokens, d_sae] temporaries.

Two engines compute what `explicit.py` defines. *inductor* compiles it with torch.compile into one C++ loop (it needs a
compiler and seconds of warm-up); *tiled* (`tiles.py`) works through cache-sized tiles in place, on plain threads. The
choice depends on shapes alone, so that the same run always takes the same path; RSAE_CPU_ENGINE=tiled|inductor
overrides.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from rsae_triton.common.errors import ConfigError, first_line
from rsae_triton.ops import explicit, tiles
from rsae_triton.ops.reference import GateSpec, GateTensors
from rsae_triton.ops.tiles import wide

# From this size on, a call is taken to be one of many, for which compiling pays.
INDUCTOR_ELEMENTS = 2**20
# From this degree p + q on, Inductor splits a pass into two loops with temporaries of h's size. In blocks of this many
# elements per thread, these stay in the cache and in memory that has already been allocated.
MANY, BLOCK = 12, 2**19

_log = logging.getLogger(__name__)


# Codes that are not trained on are made once and not hundreds of times; from this size on, compiling pays for them too.
LOOKING_ELEMENTS = 2**25
_looking: ContextVar[bool] = ContextVar("looking", default=False)


@contextmanager
def looking(only: bool) -> Iterator[None]:
    """Within the context, `only` says that codes are inspected and not trained on."""
    before = _looking.set(only)
    try:
        yield
    finally:
        _looking.reset(before)


def engine_for(n_elements: int) -> str:
    """Returns "inductor" for training-size batches if there is a C++ compiler, else "tiled"."""
    forced = os.environ.get("RSAE_CPU_ENGINE")
    if forced not in (None, "", "tiled", "inductor"):
        raise ConfigError(f"RSAE_CPU_ENGINE is {forced!r}; set it to tiled or inductor, or unset it")
    if forced:
        return forced
    compiler = os.environ.get("CXX") or "g++"
    pays = n_elements >= (LOOKING_ELEMENTS if _looking.get() else INDUCTOR_ELEMENTS)
    return "inductor" if pays and shutil.which(compiler) and _Compiled.works else "tiled"


def gate_forward(
    h: Tensor, gate: GateTensors, spec: GateSpec, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `explicit.gate_forward`: z in h's dtype from h [d_sae, n_tokens]; counts and l1 [d_sae] in at least
    float32.

    out: memory for z, which may be h itself (new memory costs a page fault every 1024 numbers).
    """
    if engine_for(h.numel()) == "inductor":
        # The same memory is passed only once, because torch.compile refuses two inputs with the same storage.
        z = torch.empty_like(h, memory_format=torch.contiguous_format) if out is None else out
        found = []
        for rows in _blocks(h, spec):
            where = [] if z is h else [z[rows]]
            sums = _Compiled.call(_forward, (spec, "h" if z is h else "out"), h[rows], *where, *_rows(gate, rows))
            if sums is None:
                break
            found.append(sums)
        else:
            counts, l1 = _joined(found)
            return z, counts, l1
    return tiles.gate_forward(h, gate, spec, out)


def gate_backward(
    h: Tensor,
    dz: Tensor,
    dcounts: Tensor | None,
    dl1: Tensor | None,
    gate: GateTensors,
    spec: GateSpec,
    coefficients: bool = True,
    *,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, GateTensors]:
    """Computes `explicit.gate_backward`, with dh in h's dtype; inplace: dh overwrites dz."""
    if engine_for(h.numel()) == "inductor":
        given = [one for one in (dcounts, dl1) if one is not None]
        option = (spec, coefficients, dcounts is not None, dl1 is not None, inplace)
        dh = dz if inplace else torch.empty_like(h, memory_format=torch.contiguous_format)
        found = []
        for rows in _blocks(h, spec):
            where = [] if inplace else [dh[rows]]
            own = (*(one[rows] for one in given), *_rows(gate, rows))
            sums = _Compiled.call(_backward, option, h[rows], dz[rows], *where, *own)
            if sums is None:
                break
            found.append(sums)
        else:
            db_enc, *grads = _joined(found)
            return dh, db_enc, GateTensors(*grads)
    return tiles.gate_backward(h, dz, dcounts, dl1, gate, spec, coefficients, inplace)


def _forward(option: tuple[GateSpec, str], h: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    spec, target = option
    z, counts, l1 = explicit.gate_forward(h.to(wide(h.dtype)), GateTensors(*rest[-7:]), spec)
    (h if target == "h" else rest[0]).copy_(z)
    return counts, l1


def _backward(option: tuple[GateSpec, bool, bool, bool, bool], h: Tensor, dz: Tensor, *rest: Tensor) -> Any:
    spec, coefficients, counted, summed, inplace = option
    given, gate = list(rest[:-7]), GateTensors(*rest[-7:])
    out = dz if inplace else given.pop(0)
    dcounts = given.pop(0) if counted else None
    dl1 = given.pop(0) if summed else None
    exact = wide(h.dtype)
    dh, db_enc, grads = explicit.gate_backward(h.to(exact), dz.to(exact), dcounts, dl1, gate, spec, coefficients)
    out.copy_(dh)
    return db_enc, *grads


def _blocks(h: Tensor, spec: GateSpec) -> list[slice]:
    """Splits the features into blocks."""
    n_features, n_tokens = h.shape
    many = spec.p + spec.q >= MANY
    step = max(1, BLOCK * torch.get_num_threads() // max(1, n_tokens)) if many else n_features
    return [slice(start, start + step) for start in range(0, n_features, step)]


def _rows(gate: GateTensors, rows: slice) -> GateTensors:
    """The gate of some of the features; shared values stay shared."""
    return GateTensors(*(one[rows] if len(one) > 1 else one for one in gate))


def _joined(found: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return found[0] if len(found) == 1 else tuple(torch.cat(one) for one in zip(*found, strict=True))


class _Compiled:
    """Functions compiled by Inductor, one for each kind of gate; a failing compiler is reported once and not tried
    again."""

    works = True

    @classmethod
    def call(cls, function: Callable[..., Any], option: Any, *tensors: Tensor) -> Any:
        if not cls.works:
            return None
        try:
            with torch.no_grad():
                made = _compile(function, option, tensors[0].dtype, torch.get_num_threads())
                return made(*(one.detach() for one in tensors))
        except (torch._dynamo.exc.BackendCompilerFailed, torch._inductor.exc.InvalidCxxCompiler) as error:
            cls.works = False
            reason = first_line(error)
            warnings.warn(f"torch.compile cannot build the CPU gate ({reason}); using the tiled path", stacklevel=4)
            return None


@functools.lru_cache(maxsize=128)
def _compile(function: Callable[..., Any], option: Any, dtype: torch.dtype, threads: int) -> Callable[..., Any]:
    spec, which = option[0], function.__name__.strip("_")
    _log.warning(
        "compiling the %s pass of a %s (%d, %d) gate for the CPU (%s): 5 to 20 s; later runs read it from the disk",
        which,
        spec.form,
        spec.p,
        spec.q,
        str(dtype).removeprefix("torch."),
    )

    def flat(*tensors: Tensor) -> Any:
        return function(option, *tensors)

    # Dynamo counts recompilations per code object and gives up after 8, so every kind of gate gets its own.
    own = types.FunctionType(flat.__code__.replace(), globals(), closure=flat.__closure__)
    return torch.compile(own, dynamic=True, fullgraph=True, options=_options(threads))


def _options(threads: int) -> dict[str, Any]:
    """Options that compiled code depends on, by number.

    Inductor writes the vectors' width and the number of threads into the code, but finds code on the disk by neither.
    Code written for 512 bits and built for 256 leaves half of every result unwritten (with two kinds of processor that
    share one TORCHINDUCTOR_CACHE_DIR, or with ATEN_CPU_CAPABILITY); code written for one thread keeps to it. Horner's
    rule is compiled to fused multiply-adds if this Inductor has them: faster, and more accurate.
    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    fused = "cpp.enable_floating_point_contract_flag"
    options = {"cpp.simdlen": pick_vec_isa().bit_width(), "cpp.threads": threads}
    return {**options, fused: "fast"} if fused in torch._inductor.list_options() else options
