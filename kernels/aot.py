"""Compiles the kernels without a GPU and checks their machine code: `python -m rsae_triton.kernels.aot` prints a table.

Every tile in `configs` is compiled for sm_80, sm_90 and sm_100. A shipped tile must have no spills, no stack, shared
memory within bounds, tensor cores in every matrix product, few enough registers for the intended number of programs per
multiprocessor, and fp32 instructions per element within a tenth of the record. (ptxas gives no warning even if it
spills ten thousand times.) Does not work under the interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from . import aot_sparse, aot_support
from .aot_variants import ARCHS, NAMES, NO_GATE, PRODUCTS, Variant
from .configs import (
    MatmulTile,
    backward_tile,
    large,
    matmul_tile,
    pointwise_tile,
    sparse_tile,
)
from .encode_backward import encode_backward_kernel
from .encode_forward import encode_forward_kernel
from .machine_code import Launch, Usage, inspect
from .rational_backward import rational_backward_kernel
from .rational_forward import rational_forward_kernel

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTERS = 65536
"""Registers of a multiprocessor, in all three generations; a thread can use 255."""
DRIFT = 0.1
KERNELS = {
    "encode_forward": encode_forward_kernel,
    "encode_backward": encode_backward_kernel,
    "rational_forward": rational_forward_kernel,
    "rational_backward": rational_backward_kernel,
    **aot_sparse.KERNELS,
    **aot_support.KERNELS,
}


class Report(NamedTuple):
    """The resources that a variant's machine code uses; `arithmetic` is fp32 instructions per element of the gate, or
    None."""

    variant: Variant
    tile: str
    usage: Usage
    ceiling: int
    arithmetic: float | None

    def faults(self, recorded: float | None = None) -> list[str]:
        """Lists what a shipped kernel must not have. recorded: fp32 instructions per element, if on record."""
        used, found = self.usage, []
        if used.spills or used.stack:
            found.append(f"{used.spills} spill instructions, {used.stack} bytes of stack")
        if used.shared_memory > SHARED_MEMORY[self.variant.arch]:
            found.append(f"{used.shared_memory} bytes of shared memory")
        if used.registers > self.ceiling:
            found.append(f"{used.registers} registers, {self.ceiling} allowed")
        if self.variant.kernel in PRODUCTS and not used.tensor_core:
            found.append("no tensor-core instruction")
        if recorded and self.arithmetic is not None and abs(self.arithmetic / recorded - 1) > DRIFT:
            found.append(f"{self.arithmetic} fp32 instructions per element, {recorded} on record")
        return found


def programs(v: Variant) -> int:
    """The number of programs that a multiprocessor should have registers for."""
    if v.kernel in PRODUCTS:
        return 1 if _tile(v).warps == 8 else 2
    if v.kernel == "rational_backward" and large(v.p, v.q):
        return 2 if v.arch == 100 else 3
    # A program of adam_rows has as many warps as its row needs.
    return {
        "rational_forward": 8,
        **dict.fromkeys(aot_support.ROWS + aot_support.SEARCH, 2),
        **dict.fromkeys(aot_support.HEAVY, 3),
    }.get(v.kernel, 4)


def _tile(v: Variant) -> MatmulTile:
    n_tokens = 15 if v.ragged else 16
    if v.kernel == "encode_backward":
        return backward_tile(v.arch // 10, v.dtype, v.p, v.q, n_tokens)
    choose = matmul_tile if v.kernel == "encode_forward" else sparse_tile
    return choose(v.arch // 10, v.dtype, v.p, v.q, v.shared, n_tokens)


def launch(v: Variant) -> tuple[Launch, str, float]:
    """Returns the launch as the wrappers make it, the tile's name, and how many elements of the gate a thread has (0:
    no gate)."""
    element, unaligned = f"*{NAMES[v.dtype]}", ("n_tokens",) if v.ragged else ()
    for part in (aot_sparse, aot_support):
        if v.kernel in part.KERNELS:
            constants, options, name = part.launch(v)
            made = Launch(KERNELS[v.kernel], part.types(v, NAMES[v.dtype]), constants, options, unaligned)
            return made, name, 0 if v.kernel in NO_GATE else _elements(constants, options)
    types = dict.fromkeys(("x", "w", "g", "h", "z", "dz", "dh"), element)
    types |= dict.fromkeys(("dcounts", "dl1", "partial", "coefficients", "rows"), "*fp32")
    constants = {
        "P": v.p, "Q": v.q, "GATED": v.gated, "CLAMP": True, "IDENTITY": False, "HARD": True, "SHARED": v.shared,
    }  # fmt: skip
    if v.kernel.endswith("_backward"):
        constants |= {"RATIONAL_BACKWARD": v.gated, "HAS_DCOUNTS": v.gated, "HAS_DL1": not v.frozen}
        constants["COEFFICIENTS"] = not v.frozen
    if v.kernel in PRODUCTS:
        tile = _tile(v)
        constants |= {
            "BLOCK_F": tile.features, "BLOCK_N": tile.tokens, "BLOCK_D": tile.inner, "SUB": tile.sub,
            "GROUP": tile.group, "PRECISION": v.precision if v.dtype == torch.float32 else "ieee",
        }  # fmt: skip
        if v.kernel == "encode_backward":
            constants |= {"stride_gd": 1, "stride_wd": 1, "SAVE_Z": False, "LANES": tile.lanes}
        else:
            constants |= {"stride_xd": 1, "stride_wf": 1, "SAVE_H": True}
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        name = f"{tile.features}x{tile.tokens}x{tile.inner} sub {tile.sub} w{tile.warps} s{tile.stages}"
    else:
        flat = pointwise_tile(v.dtype, 15 if v.ragged else 16)
        constants |= {"BLOCK_F": flat.features, "LANES": flat.lanes, "VECTOR": flat.vector, "STAGES": flat.stages}
        options = {"num_warps": flat.warps, "num_stages": 1}
        name = f"{flat.features}x{flat.lanes * flat.vector} w{flat.warps}"
    return Launch(KERNELS[v.kernel], types, constants, options, unaligned), name, _elements(constants, options)


def _elements(constants: dict[str, int], options: dict[str, int]) -> float:
    if "BLOCK_E" in constants:
        return constants["BLOCK_E"] / (32 * options["num_warps"])
    tokens = constants["BLOCK_N"] if "BLOCK_N" in constants else constants["LANES"] * constants["VECTOR"]
    return constants["BLOCK_F"] * tokens / (32 * options["num_warps"])


def compile_variant(v: Variant) -> Report:
    """Compiles a variant to machine code and inspects it. This takes seconds; triton caches the result."""
    made, tile, elements = launch(v)
    usage = inspect(made, v.arch)
    ceiling = min(255, REGISTERS // (32 * made.options["num_warps"] * programs(v)) // 8 * 8)
    return Report(v, tile, usage, ceiling, round(usage.arithmetic / elements, 1) if elements else None)


def variants(archs: Iterable[int] = ARCHS) -> Iterator[Variant]:
    """Yields the rows of the table: each kernel, generation, dtype and degree bucket, at the heaviest gates of the
    bucket."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for arch in archs:
        for shared, degree in ((True, (3, 2)), (True, (9, 8)), (False, (3, 2)), (False, (5, 4)), (False, (9, 8)),
                               (False, (12, 12))):  # fmt: skip
            for gated in (False, True):
                for dtype in (bf16, fp32):
                    for kernel in ("encode_forward", "encode_backward", "rational_backward"):
                        yield Variant(kernel, arch, dtype, *degree, shared, gated)
                        if gated and shared and kernel.endswith("_backward"):  # as in the default recipe
                            yield Variant(kernel, arch, dtype, *degree, shared, gated, frozen=True)
            yield Variant("rational_forward", arch, bf16, *degree, shared)
        for degree in ((3, 2), (9, 8)):
            for kernel in ("encode_forward", "encode_backward"):
                yield Variant(kernel, arch, fp32, *degree, False, precision="tf32x3")
            for dtype in (bf16, fp32):
                for kernel in ("encode_forward", "encode_backward", "rational_backward"):
                    yield Variant(kernel, arch, dtype, *degree, False, ragged=True)
        yield from sparse_variants(arch)
        yield from aot_support.variants(arch)


def sparse_variants(arch: int) -> Iterator[Variant]:
    """Yields all four kinds of code at the heaviest gate, and two kinds elsewhere."""
    for dtype in (torch.bfloat16, torch.float32):
        for shared, degree in aot_sparse.GATES:
            for gated, ranked in ((False, False), (True, True), (False, True), (True, False)):
                if gated == ranked or degree == (12, 12):
                    yield Variant("sparse_encode", arch, dtype, *degree, shared, gated, ranked=ranked)
        yield Variant("sparse_encode", arch, dtype, 9, 8, False, ragged=True)
        yield Variant("gather_rows", arch, dtype)
        for kernel in ("gather_rows", "keep_largest"):
            yield Variant(kernel, arch, dtype, ranked=True)
        for kernel in ("sparse_decode", "sparse_dots", "segment_sum"):
            yield Variant(kernel, arch, dtype)


def representative(arch: int) -> list[Variant]:
    """The few variants that the test suite has time for: the heaviest usual gate, and float32."""
    bf16 = torch.bfloat16
    return [
        Variant("encode_forward", arch, bf16, 9, 8, shared=False),
        Variant("encode_forward", arch, torch.float32, 3, 2, gated=True),
        Variant("encode_backward", arch, bf16, 3, 2),
        Variant("rational_backward", arch, bf16, 9, 8, shared=False, gated=True),
        Variant("rational_forward", arch, bf16, 9, 8, shared=False),
        Variant("sparse_encode", arch, bf16, 9, 8, shared=False, ranked=True),
        Variant("gather_rows", arch, bf16, ranked=True),
        Variant("sparse_decode", arch, bf16),
        Variant("support_mark", arch, bf16),
        Variant("feature_sums", arch, bf16),
    ]


def every_variant() -> list[Variant]:
    return [*variants(), *(v for arch in ARCHS for v in representative(arch))]


COLUMNS = ("kernel", "gate", "sm", "tile", "registers", "spills", "stack", "shared memory", "tensor-core ops")
HEADER = "\n".join(f"| {' | '.join(cells)} |" for cells in ((*COLUMNS, "fp32 per element"), ("---",) * 10))


def row(r: Report) -> str:
    u, per_element = r.usage, "" if r.arithmetic is None else r.arithmetic
    return (
        f"| {r.variant.kernel} | {r.variant} | {r.variant.arch} | {r.tile} | {u.registers} | {u.spills} "
        f"| {u.stack} | {u.shared_memory} | {u.tensor_core} | {per_element} |"
    )


def summary(reports: list[Report]) -> str:
    """One line per kernel and generation."""
    lines = [
        "| kernel | sm | variants | registers | spills and stack | shared memory, most | tensor-core ops, fewest |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kernel in KERNELS:
        for arch in ARCHS:
            used = [r.usage for r in reports if (r.variant.kernel, r.variant.arch) == (kernel, arch)]
            if used:
                registers = sorted(u.registers for u in used)
                bad = sum(u.spills + u.stack > 0 for u in used)
                lines.append(
                    f"| {kernel} | {arch} | {len(used)} | {registers[0]} to {registers[-1]} | {bad or 'none'} "
                    f"| {max(u.shared_memory for u in used)} | {min(u.tensor_core for u in used)} |"
                )
    return "\n".join(lines)


def read_record(path: Path | None) -> dict:
    return json.loads(path.read_text()) if path and path.exists() else {}


def write_record(path: Path, reports: list[Report]) -> None:
    """Records the fp32 instructions per element, keeping other variants recorded with the same Triton."""
    record = read_record(path)
    counts = record["fp32_per_element"] if record.get("triton") == triton.__version__ else {}
    counts |= {r.variant.key: r.arithmetic for r in reports if r.arithmetic is not None}
    known = sorted(counts.keys() & {v.key for v in every_variant()})
    made = {"triton": triton.__version__, "fp32_per_element": {key: counts[key] for key in known}}
    _replace(path, json.dumps(made, indent=1) + "\n")


def write_page(page: Path, reports: list[Report]) -> None:
    """Writes both tables between the page's marks."""
    start, end = "<!-- made by `make aot`: begin -->", "<!-- made by `make aot`: end -->"
    text = page.read_text()
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"{page} has no place for the table: put the lines {start!r} and {end!r} into it")
    head, tail = text.split(start)[0], text.split(end)[1]
    table = "\n".join([HEADER, *map(row, reports)])
    title = f"{len(reports)} of {len({v.key for v in every_variant()})} variants, Triton {triton.__version__}"
    made = f"{title}:\n\n{summary(reports)}\n\n<details><summary>All of them</summary>\n\n{table}\n\n</details>"
    _replace(page, f"{head}{start}\n\n{made}\n\n{end}{tail}")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(f"{path.suffix}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", choices=ARCHS, help="default: all")
    parser.add_argument("--kernel", choices=sorted(KERNELS), action="append", help="default: all")
    parser.add_argument("--few", action="store_true", help="a representative few of each GPU generation")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time (default: one a core)")
    parser.add_argument("--recorded", type=Path, help="JSON with the fp32 instructions per element to compare with")
    parser.add_argument("--record", action="store_true", help="write them instead of comparing")
    parser.add_argument("--page", type=Path, help="the page that the tables are written into (docs/machine-code.md)")
    options = parser.parse_args()
    archs = tuple(options.arch or ARCHS)
    every = [v for arch in archs for v in representative(arch)] if options.few else variants(archs)
    wanted = [v for v in every if v.kernel in (options.kernel or KERNELS)]
    wanted.sort(key=lambda v: (list(KERNELS).index(v.kernel), v.arch))
    record = read_record(options.recorded)
    old = record.get("fp32_per_element", {})
    comparable = record.get("triton") == triton.__version__ and not options.record
    print(f"triton {triton.__version__}, {len(wanted)} variants\n\n{HEADER}", flush=True)
    reports, faulty = [], []
    with contextlib.ExitStack() as stack:
        pool = (
            stack.enter_context(ProcessPoolExecutor(options.jobs, get_context("spawn"))) if options.jobs > 1 else None
        )
        for report in (pool.map if pool else map)(compile_variant, wanted):
            print(row(report), flush=True)
            reports.append(report)
            faults = report.faults(old.get(report.variant.key) if comparable else None)
            faulty += [f"{report.variant.key}: {fault}" for fault in faults]
    print(
        "\n" + ("\n".join(faulty) or "no spills, no stack, registers and shared memory in bounds, tensor cores in use")
    )
    if record and not comparable and not options.record:
        print(f"instructions not compared: those on record are of triton {record['triton']}")
    if options.record and options.recorded:
        write_record(options.recorded, reports)
    if options.page:
        write_page(options.page, reports)
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
