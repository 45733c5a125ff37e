"""Runs the kernels without a GPU: TRITON_INTERPRET=1, set before triton is first imported.

Triton's interpreter represents a bfloat16 by the uint16 of its bits, and (up to 3.7 at least) has three bugs: `tl.dot`
multiplies those integers, rounding float32 to bfloat16 truncates, and rounding to float8 halves what is rounded up to
a power of two. `repair` corrects them, so that tests run the same code as a GPU. Nothing is changed if the interpreter
is off.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl


def _probe() -> None:
    pass


# Asks triton itself, because how the switch is set (an environment variable, a knob) may change.
INTERPRETED: bool = not isinstance(triton.jit(_probe), triton.JITFunction)


def _bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    flat = torch.from_numpy(np.array(values, dtype=np.float32)).to(torch.bfloat16)
    return flat.view(torch.int16).numpy().view(np.uint16)


def _float32_to_float8(values: np.ndarray) -> np.ndarray:
    flat = torch.from_numpy(np.array(values, dtype=np.float32)).to(torch.float8_e4m3fn)
    return flat.view(torch.uint8).numpy()


def repair() -> None:
    """Makes the interpreter multiply and round as a GPU does. Can be called repeatedly."""
    from triton.runtime import interpreter

    if getattr(interpreter, "_rsae_triton_repaired", False):
        return
    builder, convert = interpreter.InterpreterBuilder, interpreter._convert_float
    dot, handle = builder.create_dot, interpreter.TensorHandle

    def create_dot(self, a, b, d, *rest):
        a, b = (
            handle(_bfloat16_to_float32(side.data), tl.float32) if side.dtype.scalar == tl.bfloat16 else side
            for side in (a, b)
        )
        return dot(self, a, b, d, *rest)

    def convert_float(values, source, target, rounding_mode):
        if source == tl.float32 and target == tl.bfloat16:
            return _float32_to_bfloat16(values)
        if source == tl.float32 and target == tl.float8e4nv:
            return _float32_to_float8(values)
        return convert(values, source, target, rounding_mode)

    builder.create_dot, interpreter._convert_float = create_dot, convert_float
    interpreter._rsae_triton_repaired = True


if INTERPRETED:
    repair()
