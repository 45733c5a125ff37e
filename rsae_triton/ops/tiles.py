"""Computes the gate and its derivative on cache-sized tiles, in place: the CPU engine that needs no compiler.

A tile stays in the second-level cache during some 20 (forward) to 100 (backward) ATen kernels of 5 microseconds each.
It is fast because of tiles just below ATen's parallel grain, on plain threads; one `addcmul(out=)` per step of Horner's
rule; scratch that is reused; no boolean tensors (a comparison that writes floats, and what reads it, is five times
faster); and few calls that are not arithmetic, because a call costs as much as 10 000 additions.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from rsae_triton.ops.reference import GateSpec, GateTensors

# Below ATen's parallel grain (32768 elements); otherwise its threads would compete with ours, 650 times slower on a
# busy machine.
TILE = 30720


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision of the gate and its sums for pre-activations of this dtype: at least float32."""
    return torch.promote_types(dtype, torch.float32)


class _Tile:
    """The data for the work on a tile: its place, scratch memory by name, the gate's columns and the rows of the sums.

    Attributes:
        at: (rows, columns) in [d_sae, n_tokens]. sums: one [rows] view per sum.
        a, b (lowest first, b with its zero constant): columns of coefficients, [rows, 1] or [1, 1].
        centre, inverse_scale, output_scale, threshold, activity, dcounts, dl1: columns of the same kind.
    """

    at: tuple[slice, slice]
    sums: tuple[Tensor, ...]

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self._shape, self._dtype = shape, dtype
        self._buffers: dict[str, Tensor] = {}

    def scratch(self, name: str) -> Tensor:
        if name not in self._buffers:
            self._buffers[name] = torch.empty(self._shape, dtype=self._dtype)
        return self._buffers[name]

    def load(self, columns: tuple[Tensor, ...], spec: GateSpec) -> None:
        self.a, self.b = columns[: spec.p + 1], columns[spec.p + 1 : spec.p + spec.q + 2]
        (
            self.centre,
            self.inverse_scale,
            self.output_scale,
            self.threshold,
            self.activity,
            self.dcounts,
            self.dl1,
        ) = columns[spec.p + spec.q + 2 :]


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _run(
    work: Callable[[_Tile], None],
    h: Tensor,
    gate: GateTensors,
    spec: GateSpec,
    n_sums: int,
    dcounts: Tensor | None = None,
    dl1: Tensor | None = None,
) -> list[Tensor]:
    """Calls work(tile) for every tile of h; returns the n_sums sums [d_sae] that it adds to.

    All tiles of a row belong to one thread and come in order, so that sums over tokens need no lock and are the same in
    every run.
    """
    n_features, n_tokens = h.shape
    dtype = wide(h.dtype)
    sums = torch.zeros(n_sums, n_features, dtype=dtype)
    if h.numel() == 0:
        return [one.clone() for one in sums]
    # All per-feature numbers in one matrix, so that a tile gets its rows in one call.
    zero = torch.zeros(1, dtype=dtype)
    parts = [*gate.a.unbind(1), zero, *gate.b.unbind(1), gate.centre, gate.input_scale.reciprocal(), gate.output_scale]
    parts += [gate.threshold, gate.activity_threshold, *(zero if one is None else one for one in (dcounts, dl1))]
    shared = [k for k, one in enumerate(parts) if len(one) == 1]
    own = [k for k, one in enumerate(parts) if len(one) > 1]
    fixed = [parts[k].to(dtype).view(1, 1) for k in shared]
    table = torch.stack([parts[k].to(dtype) for k in own]) if own else sums[:0]
    order = {k: place for place, k in enumerate([*shared, *own])}

    columns = _slices(n_tokens, TILE)
    blocks = _slices(n_features, max(1, TILE // n_tokens))
    threads = min(torch.get_num_threads(), len(blocks))

    def share(first: int) -> None:
        tiles: dict[tuple[int, int], _Tile] = {}
        # Grad mode is per thread: without this, every operation here would record a graph.
        with torch.no_grad():
            for rows in blocks[first::threads]:
                values = [*fixed, *table[:, rows].unsqueeze(-1).unbind(0)]
                row_columns = tuple(values[order[k]] for k in range(len(parts)))
                row_sums = sums[:, rows].unbind(0)
                for column in columns:
                    shape = (rows.stop - rows.start, column.stop - column.start)
                    tile = tiles.setdefault(shape, _Tile(shape, dtype))
                    tile.at, tile.sums = (rows, column), row_sums
                    tile.load(row_columns, spec)
                    work(tile)

    if threads == 1:
        share(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(share, first) for first in range(threads)]:
                done.result()
    return [one.clone() for one in sums]


def _read(tensor: Tensor, tile: _Tile) -> Tensor:
    """The tile of h in the gate's precision; the tensor itself if it has that already."""
    part = tensor[tile.at]
    return part if part.dtype == wide(part.dtype) else tile.scratch("h").copy_(part)


def _horner(s: Tensor, coefficients: tuple[Tensor, ...], out: Tensor, slope: Tensor | None = None) -> None:
    """Evaluates a polynomial at s into `out` and its derivative into `slope`; coefficients as columns, lowest first."""
    *lower, value = coefficients
    derivative: Tensor | None = None
    for one in reversed(lower):
        if slope is not None:
            derivative = value if derivative is None else torch.addcmul(value, derivative, s, out=slope)
        value = torch.addcmul(one, value, s, out=out)
    if value is not out:
        out.copy_(value)
    if slope is not None and derivative is not slope:
        slope.zero_() if derivative is None else slope.copy_(derivative)


def _argument(h: Tensor, tile: _Tile, spec: GateSpec) -> tuple[Tensor, Tensor]:
    """Returns t and s."""
    t = torch.sub(h, tile.threshold, out=tile.scratch("t")).mul_(tile.inverse_scale)
    s = tile.scratch("s")
    if spec.domain == "clamp":
        return t, torch.clamp(t, -1, 1, out=s).sub_(tile.centre)
    return t, torch.sub(t, tile.centre, out=s)


def gate_forward(
    h: Tensor, gate: GateTensors, spec: GateSpec, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `explicit.gate_forward`: z in h's dtype from h [d_sae, n_tokens] (written to `out` if given, which may
    be h itself), and counts and l1 [d_sae] in `wide` of that dtype."""
    z = torch.empty_like(h, memory_format=torch.contiguous_format) if out is None else out

    def work(tile: _Tile) -> None:
        part, code, active = _read(h, tile), tile.scratch("code"), tile.scratch("active")
        if spec.amplitude == "identity":
            code.copy_(part)
        else:
            t, s = _argument(part, tile, spec)
            _horner(s, tile.a, code)
            if spec.q:
                _horner(s, tile.b, active)
                code.div_(active.abs_().add_(1))
        if spec.form == "gated":
            torch.gt(part, tile.threshold, out=active)
            if spec.amplitude == "rational":
                code.mul_(part)
        else:
            if spec.domain == "clamp":
                code.add_(t.sub_(1).clamp_(min=0))
            code.mul_(tile.output_scale)
            torch.abs(code, out=active).gt_(tile.activity)
        counts, l1 = tile.sums
        counts.add_(active.sum(1))
        if spec.hard:
            code.mul_(active)
        z[tile.at] = code
        l1.add_(code.abs_().sum(1))

    counts, l1 = _run(work, h, gate, spec, 2)
    return z, counts, l1


def gate_backward(
    h: Tensor,
    dz: Tensor,
    dcounts: Tensor | None,
    dl1: Tensor | None,
    gate: GateTensors,
    spec: GateSpec,
    coefficients: bool = True,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, GateTensors]:
    """Computes `explicit.gate_backward`, with dh in h's dtype; inplace: dh overwrites dz."""
    dh = dz if inplace else torch.empty_like(h, memory_format=torch.contiguous_format)
    p, q = spec.p, spec.q
    through = _direct if spec.form == "direct" else _gated

    def work(tile: _Tile) -> None:
        part = _read(h, tile)
        # A copy, because it is changed here and dz may be the memory that dh overwrites.
        g = tile.scratch("g").copy_(dz[tile.at])
        t, s = _argument(part, tile, spec)
        r, slope, spare = tile.scratch("r"), tile.scratch("slope"), tile.scratch("spare")
        _horner(s, tile.a, r, slope)
        if q:
            inverse, dB, sign = tile.scratch("B"), tile.scratch("dB"), tile.scratch("sign")
            _horner(s, tile.b, inverse, dB)
            torch.sign(inverse, out=sign)
            inverse.abs_().add_(1).reciprocal_()
            r.mul_(inverse)
            slope.addcmul_(dB.mul_(sign), r, value=-1).mul_(inverse)
        # g becomes dL/dr; `rest` is the part of dL/dh that does not go through the rational.
        rest = through(part, g, t, r, tile, spec, dcounts is not None, dl1 is not None)
        dtheta, d_input, d_centre, db_enc, d_output, *sums = tile.sums
        if rest is None:
            d_output.add_(tile.scratch("value").sum(1))
        dt = torch.mul(slope, g, out=slope)
        if coefficients:
            d_centre.add_(dt.sum(1))
        if spec.domain == "clamp":
            dt.mul_(torch.abs(t, out=spare).le_(1))
            if spec.form == "direct":
                dt.addcmul_(torch.gt(t, 1, out=spare), g)
        if rest is None:
            torch.mul(dt, tile.inverse_scale, out=spare)
        else:
            torch.addcmul(rest, dt, tile.inverse_scale, out=spare)
        dh[tile.at] = spare
        db_enc.add_(spare.sum(1))
        dtheta.add_(dt.sum(1))
        d_input.add_(dt.mul_(t).sum(1))
        if not coefficients:
            return
        u = g.mul_(inverse) if q else g
        v = r.mul_(u).mul_(sign) if q else None
        for i in range(p + 1):
            sums[i].add_((u.mul_(s) if i else u).sum(1))
        for j in range(q):
            assert v is not None
            sums[p + 1 + j].add_(v.mul_(s).sum(1))

    dtheta, d_input, d_centre, db_enc, d_output, *rest = _run(work, h, gate, spec, 6 + p + q, dcounts, dl1)
    scale = gate.input_scale.neg()
    da = torch.stack(rest[: p + 1], dim=1)
    db = torch.stack(rest[p + 1 :], dim=1).neg() if q else h.new_zeros(len(h), 0, dtype=da.dtype)
    grads = GateTensors(da, db, -d_centre, d_input / scale, d_output, dtheta / scale, torch.zeros_like(dtheta))
    return dh, db_enc, grads


def _direct(
    h: Tensor, g: Tensor, t: Tensor, r: Tensor, tile: _Tile, spec: GateSpec, counted: bool, summed: bool
) -> None:
    """Changes g from dL/dz to dL/dr; leaves the terms of dL/dC_out in the scratch "value"."""
    value, active = tile.scratch("value"), tile.scratch("spare")
    if spec.domain == "clamp":
        torch.sub(t, 1, out=value).clamp_(min=0).add_(r)
    else:
        value.copy_(r)
    masked = spec.hard and spec.backward == "soft"
    if summed or masked:
        z = torch.mul(value, tile.output_scale, out=tile.scratch("z"))
        torch.abs(z, out=active).gt_(tile.activity)
        if summed:
            z.sign_()
            g.addcmul_(z.mul_(active) if spec.hard else z, tile.dl1)
        if masked:
            g.mul_(active)
    value.mul_(g)
    g.mul_(tile.output_scale)


def _gated(
    h: Tensor, g: Tensor, t: Tensor, r: Tensor, tile: _Tile, spec: GateSpec, counted: bool, summed: bool
) -> Tensor:
    """Changes g from dL/dz to dL/dr; returns the part of dL/dh that goes through the amplitude."""
    rest, opened = tile.scratch("value"), tile.scratch("spare")
    identity, masked = spec.amplitude == "identity", spec.hard and spec.backward == "soft"
    if spec.hard:
        torch.gt(h, tile.threshold, out=opened)
    if summed:
        z = (rest.copy_(h) if identity else torch.mul(h, r, out=rest)).sign_()
        g.addcmul_(z.mul_(opened) if spec.hard else z, tile.dl1)
    if identity:
        rest.copy_(g)
    else:
        torch.mul(g, r, out=rest)
    if spec.hard:
        rest.mul_(opened)
    if masked and identity:
        g.zero_()
    else:
        g.mul_(h)
        if masked:
            g.mul_(opened)
    if counted:
        g.add_(tile.dcounts)
    return rest
