"""What the compiler makes of the kernels, without a GPU: `python -m rsae_triton.kernels.aot` prints the table.

Every tile in `configs` is compiled for sm_80, sm_90 and sm_100, and the machine code is read back with the
tools that ship inside the triton package: registers, spills, stack, shared memory, tensor-core instructions.
ptxas gives no warning when it spills ten thousand times, so `faults` looks. Not for use under the interpreter.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import aot_sparse
from .configs import matmul_tile, pointwise_tile
from .encode_forward import encode_forward_kernel
from .interpreter import INTERPRETED
from .rational_backward import rational_backward_kernel
from .rational_forward import rational_forward_kernel

KERNELS = {
    "encode_forward": encode_forward_kernel,
    "rational_forward": rational_forward_kernel,
    "rational_backward": rational_backward_kernel,
    **aot_sparse.KERNELS,
}
PRODUCTS = ("encode_forward", "sparse_encode")
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTC.{0,2}MMA"}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Variant(NamedTuple):
    """One kernel as it would be launched: for which GPU, in which dtype, with which gate."""

    kernel: str
    arch: int
    dtype: torch.dtype
    p: int
    q: int
    shared: bool
    gated: bool = False
    precision: str = "tf32"
    ragged: bool = False
    """True: the number of tokens is no multiple of 16, so codes cannot be stored 16 bytes at a time."""
    ranked: bool = False
    """The top-k variant of the sparse kernels: codes in float32."""

    def __str__(self) -> str:
        form, sets = "gated" if self.gated else "direct", "shared" if self.shared else "per feature"
        precision = f" {self.precision}" if self.dtype == torch.float32 and self.kernel in PRODUCTS else ""
        flags = f"{' ragged' if self.ragged else ''}{' top-k' if self.ranked else ''}"
        if self.kernel in aot_sparse.KERNELS and self.kernel not in PRODUCTS:
            return f"{NAMES[self.dtype]}{flags}"
        return f"{NAMES[self.dtype]}{precision} {form} ({self.p}, {self.q}) {sets}{flags}"


class Report(NamedTuple):
    """What the machine code of a variant uses. `spills` counts its loads and stores of local memory."""

    variant: Variant
    tile: str
    registers: int
    spills: int
    stack: int
    shared_memory: int
    tensor_core: int

    def faults(self) -> list[str]:
        """What must not be in a kernel that is shipped."""
        found = []
        if self.spills or self.stack:
            found.append(f"{self.spills} spill instructions, {self.stack} bytes of stack")
        if self.shared_memory > SHARED_MEMORY[self.variant.arch]:
            found.append(f"{self.shared_memory} bytes of shared memory")
        if self.variant.kernel in PRODUCTS and not self.tensor_core:
            found.append("no tensor-core instruction")
        return found


def _launch(v: Variant) -> tuple[dict, dict, str]:
    """Compile-time constants, launch options and the tile's name, as the wrappers choose them."""
    if v.kernel in aot_sparse.KERNELS:
        return aot_sparse.launch(v)
    gate = {
        "P": v.p, "Q": v.q, "GATED": v.gated, "CLAMP": True, "IDENTITY": False, "HARD": True, "SHARED": v.shared,
    }  # fmt: skip
    if v.kernel == "encode_forward":
        tile = matmul_tile(v.arch // 10, v.dtype, v.p, v.q, v.shared, 15 if v.ragged else 16)
        constants = {
            **gate, "SAVE_H": True, "BLOCK_F": tile.features, "BLOCK_N": tile.tokens, "BLOCK_D": tile.inner,
            "SUB": tile.sub, "GROUP": tile.group, "stride_xd": 1, "stride_wf": 1,
            "PRECISION": v.precision if v.dtype == torch.float32 else "ieee",
        }  # fmt: skip
        name = f"{tile.features}x{tile.tokens}x{tile.inner} sub {tile.sub} w{tile.warps} s{tile.stages}"
        return constants, {"num_warps": tile.warps, "num_stages": tile.stages}, name
    tile = pointwise_tile(v.dtype, 15 if v.ragged else 16)
    constants = {**gate, "BLOCK_F": tile.features, "LANES": tile.lanes, "VECTOR": tile.vector}
    if v.kernel == "rational_backward":
        constants |= {"RATIONAL_BACKWARD": v.gated, "HAS_DCOUNTS": v.gated, "HAS_DL1": True}
    name = f"{tile.features}x{tile.lanes * tile.vector} w{tile.warps}"
    return constants, {"num_warps": tile.warps, "num_stages": 1}, name


def compile_variant(v: Variant) -> Report:
    """Compiles a variant down to machine code and reads it back. Seconds each; triton caches the result."""
    if INTERPRETED:
        raise RuntimeError("the interpreter is on: unset TRITON_INTERPRET to compile ahead of time")
    kernel = KERNELS[v.kernel]
    constants, options, tile = _launch(v)
    element = NAMES[v.dtype]
    types = dict.fromkeys(("x", "w", "z", "h", "dz", "dh"), f"*{element}")
    types |= dict.fromkeys(("dcounts", "dl1", "partial", "coefficients", "rows"), "*fp32")
    if v.kernel in aot_sparse.KERNELS:
        types = aot_sparse.types(v, element)
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    # Pointers from torch are aligned to 16 bytes; so are sizes that are multiples of 16.
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (signature[name] == "i32" and not (v.ragged and name == "n_tokens"))
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    built = triton.compile(source, target=GPUTarget("cuda", v.arch, 32), options=options)
    usage, code = _cuobjdump(built.asm["cubin"], "--dump-resource-usage"), _cuobjdump(built.asm["cubin"], "-sass")
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", code, re.MULTILINE)
    return Report(
        v, tile, used["REG"], sum(op in ("STL", "LDL") for op in opcodes), used["STACK"], built.metadata.shared,
        sum(re.fullmatch(TENSOR_CORE[v.arch], op) is not None for op in opcodes),
    )  # fmt: skip


def _cuobjdump(cubin: bytes, option: str) -> str:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}  # it calls nvdisasm
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(tools / "cuobjdump"), option, str(path)]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def variants(archs: tuple[int, ...] = (80, 90, 100)) -> Iterator[Variant]:
    """The table: each kernel, generation, dtype and degree bucket, at the heaviest gates of the bucket."""
    for arch in archs:
        for shared, degree in ((True, (3, 2)), (True, (9, 8)), (False, (3, 2)), (False, (5, 4)), (False, (9, 8)),
                               (False, (12, 12))):  # fmt: skip
            for gated in (False, True):
                for dtype in (torch.bfloat16, torch.float32):
                    yield Variant("encode_forward", arch, dtype, *degree, shared, gated)
                    yield Variant("rational_backward", arch, dtype, *degree, shared, gated)
            yield Variant("rational_forward", arch, torch.bfloat16, *degree, shared)
        for degree in ((3, 2), (9, 8)):
            yield Variant("encode_forward", arch, torch.float32, *degree, False, precision="tf32x3")
            for dtype in (torch.bfloat16, torch.float32):
                yield Variant("encode_forward", arch, dtype, *degree, False, ragged=True)
                yield Variant("rational_backward", arch, dtype, *degree, False, ragged=True)
        yield from sparse_variants(arch)


def sparse_variants(arch: int) -> Iterator[Variant]:
    """At the heaviest gate all four kinds of code, elsewhere two."""
    for dtype in (torch.bfloat16, torch.float32):
        for shared, degree in aot_sparse.GATES:
            for gated, ranked in ((False, False), (True, True), (False, True), (True, False)):
                if gated == ranked or degree == (12, 12):
                    yield Variant("sparse_encode", arch, dtype, *degree, shared, gated, ranked=ranked)
        yield Variant("sparse_encode", arch, dtype, 9, 8, False, ragged=True)
        yield Variant("gather_rows", arch, dtype, 0, 0, True)
        for kernel in ("gather_rows", "keep_largest"):
            yield Variant(kernel, arch, dtype, 0, 0, True, ranked=True)
        for kernel in ("sparse_decode", "sparse_dots", "segment_sum"):
            yield Variant(kernel, arch, dtype, 0, 0, True)


def representative(arch: int) -> list[Variant]:
    """The few that the test suite has time for: the heaviest usual gate, and float32."""
    return [
        Variant("encode_forward", arch, torch.bfloat16, 9, 8, shared=False),
        Variant("encode_forward", arch, torch.float32, 3, 2, shared=True, gated=True),
        Variant("rational_backward", arch, torch.bfloat16, 9, 8, shared=False, gated=True),
        Variant("rational_forward", arch, torch.bfloat16, 9, 8, shared=False),
        Variant("sparse_encode", arch, torch.bfloat16, 9, 8, shared=False, ranked=True),
        Variant("gather_rows", arch, torch.bfloat16, 0, 0, shared=True, ranked=True),
        Variant("sparse_decode", arch, torch.bfloat16, 0, 0, shared=True),
    ]


HEADER = """| kernel | gate | sm | tile | registers | spills | stack | shared memory | tensor-core ops |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def row(r: Report) -> str:
    return (
        f"| {r.variant.kernel} | {r.variant} | {r.variant.arch} | {r.tile} | {r.registers} | {r.spills} "
        f"| {r.stack} | {r.shared_memory} | {r.tensor_core} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", choices=sorted(SHARED_MEMORY), help="default: all")
    parser.add_argument("--kernel", choices=sorted(KERNELS), help="default: all")
    parser.add_argument("--few", action="store_true", help="a representative few of each GPU generation")
    options = parser.parse_args()
    archs = tuple(options.arch or SHARED_MEMORY)
    every = [v for arch in archs for v in representative(arch)] if options.few else variants(archs)
    wanted = [v for v in every if options.kernel in (None, v.kernel)]
    print(f"triton {triton.__version__}, {len(wanted)} variants\n\n{HEADER}")
    faulty = []
    for variant in sorted(wanted, key=lambda v: (v.kernel, v.arch)):
        report = compile_variant(variant)
        print(row(report), flush=True)
        faulty += [f"{variant.kernel} sm_{variant.arch} {variant}: {fault}" for fault in report.faults()]
    print("\n" + ("\n".join(faulty) or "no spills, no stack, shared memory in bounds, tensor cores in use"))
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
