"""Compiles a kernel for a GPU that need not be present, and inspects the machine code.

It uses the tools inside the triton package. Does not work under the interpreter.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .interpreter import INTERPRETED

TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTC.{0,2}MMA"}
# Instructions of the fp32 pipe and the special functions; a packed one (FFMA2, sm_100) handles two elements.
ARITHMETIC = "F(ADD|MUL|FMA|MNMX|MNMX3|SEL|SET|SETP)2?|MUFU"


class Launch(NamedTuple):
    """A kernel with everything that determines its machine code.

    types: element types of pointers and tensors ("*bf16") by argument; what is in neither types nor constants is a
    32-bit integer. unaligned: arguments that are not multiples of 16.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    unaligned: tuple[str, ...] = ()


class Usage(NamedTuple):
    """The resources that machine code uses. spills: number of loads and stores of local memory; stack, shared_memory:
    in bytes; arithmetic: number of fp32 instructions, those in loops once."""

    registers: int
    spills: int
    stack: int
    shared_memory: int
    tensor_core: int
    arithmetic: int


def inspect(launch: Launch, arch: int) -> Usage:
    """Compiles for sm_`arch` and inspects the result. This takes seconds; triton caches the result."""
    if INTERPRETED:
        raise RuntimeError("the interpreter is on: unset TRITON_INTERPRET to compile ahead of time")
    names = launch.kernel.arg_names
    signature = {
        name: "constexpr" if name in launch.constants else launch.types.get(name, "i32") for name in names
    }  # fmt: skip
    # Pointers from torch are aligned to 16 bytes, and so are sizes that are multiples of 16.
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if (signature[name].startswith("*") or signature[name] == "i32") and name not in launch.unaligned
    }
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=dict(launch.constants), attrs=attrs)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    usage, code = _cuobjdump(built.asm["cubin"], "--dump-resource-usage"), _cuobjdump(built.asm["cubin"], "-sass")
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", code, re.MULTILINE)

    def count(pattern: str) -> int:
        return sum(re.fullmatch(pattern, op) is not None for op in opcodes)

    return Usage(
        used["REG"], count("STL|LDL"), used["STACK"], built.metadata.shared, count(TENSOR_CORE[arch]),
        count(ARITHMETIC),
    )  # fmt: skip


def _cuobjdump(cubin: bytes, option: str) -> str:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}  # the tool calls nvdisasm
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(tools / "cuobjdump"), option, str(path)]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
