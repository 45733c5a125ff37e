"""Common steps of all wrappers before a launch: check, pack the gate, split the tokens, select the device."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .interpreter import INTERPRETED

MAX_DEGREE = 12
PROGRAMS = 4096
"""Number of programs that a pointwise kernel aims for: some 16 per multiprocessor of a large GPU, on every GPU."""
TOKENS_PER_SUM = 16384
"""Largest number of tokens in one float32 partial sum (a lane adds a 32nd of them)."""


class PackedGate(NamedTuple):
    """A gate in the kernels' layout: one row per number, one column per coefficient set or per feature.

    coefficients [p+1 + q + 3, G]: a, b, centre, 1/C_in, C_out; G = 1 (shared) or n_features.
    rows [2, n_features] or [3, n_features]: threshold, activity_threshold and, if it was given, b_enc.
    """

    coefficients: Tensor
    rows: Tensor
    shared: bool


def check_gate(gate: Sequence[Tensor], p: int, q: int) -> int:
    """Raises ValueError unless gate = (a [G, p+1], b [G, q], centre [G], input_scale [G], output_scale [G], threshold
    [F], activity_threshold [F]), where each G is 1 or F separately. Returns F."""
    a, b, centre, input_scale, output_scale, threshold, _ = gate
    n_features = threshold.shape[0]
    for name, degree in (("p", p), ("q", q)):
        if not 0 <= degree <= MAX_DEGREE:
            raise ValueError(f"{name} is {degree}; give a degree from 0 to {MAX_DEGREE}")
    if a.shape[1:] != (p + 1,) or b.shape[1:] != (q,):
        raise ValueError(f"a {tuple(a.shape)} and b {tuple(b.shape)} are not those of degree ({p}, {q})")
    sets = [t.shape[0] for t in (a, b, centre, input_scale, output_scale)]
    if any(n not in (1, n_features) for n in sets):
        raise ValueError(f"coefficient sets {sets}: give 1 or {n_features} (one per feature) of each")
    return n_features


def pack_gate(gate: Sequence[Tensor], p: int, q: int, b_enc: Tensor | None = None) -> PackedGate:
    """Packs a gate (see `check_gate`) and b_enc [F]."""
    n_features = check_gate(gate, p, q)
    a, b, centre, input_scale, output_scale, threshold, activity = (t.detach().float() for t in gate)
    width = 1 if all(len(t) == 1 for t in (a, b, centre, input_scale, output_scale)) else n_features
    columns = [a.t(), b.t(), centre[None], input_scale.reciprocal()[None], output_scale[None]]
    rows = [threshold, activity] if b_enc is None else [threshold, activity, b_enc.detach().float()]
    return PackedGate(torch.cat([c.expand(-1, width) for c in columns]), torch.stack(rows), width == 1)


class Split(NamedTuple):
    """How a pointwise kernel divides the tokens: into `count` runs of `tokens` each (the last may be shorter)."""

    count: int
    tokens: int


def split_tokens(n_tokens: int, feature_blocks: int, block: int) -> Split:
    """Splits by shape alone, so that the order of every sum, and so every bit of it, is the same on every GPU."""
    blocks = -(-n_tokens // block)
    wanted = max(-(-PROGRAMS // max(feature_blocks, 1)), -(-n_tokens // TOKENS_PER_SUM))
    per_split = -(-blocks // max(min(blocks, wanted), 1))
    return Split(-(-blocks // max(per_split, 1)), per_split * block)


def launching_on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one, so that the launch uses that GPU and its current stream."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    if INTERPRETED:
        return contextlib.nullcontext()
    raise ValueError(
        f"the Triton kernels need CUDA tensors and got one on {tensor.device}; "
        "use another backend, or set TRITON_INTERPRET=1 before starting Python to run them slowly on the CPU"
    )


def capability(tensor: Tensor) -> int:
    """The major compute capability of the tensor's GPU; that of the H100 under the interpreter."""
    return torch.cuda.get_device_capability(tensor.device)[0] if tensor.is_cuda else 9


def dot_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: float32 as torch's setting for matrix products says, other dtypes exactly.

    If torch forbids TF32, three TF32 products are used (accurate to about 2^-21), because true float32 products have no
    tensor cores and are ten times slower.
    """
    if dtype != torch.float32:
        return "ieee"
    backend = torch.backends.cuda.matmul
    # From torch 2.9 on, reading the old attribute raises if anyone has used the new one.
    setting = getattr(backend, "fp32_precision", None)
    allowed = backend.allow_tf32 if setting is None else setting == "tf32"
    return "tf32" if allowed else "tf32x3"
