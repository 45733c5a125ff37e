"""Tile sizes: one small table per GPU generation, chosen by dtype, degree and sharing. Pure functions of these.

Each entry is checked by `python -m rsae_triton.kernels.aot`: no register spills, shared memory in bounds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class MatmulTile(NamedTuple):
    """encode_forward: block sizes, the parts (`sub`) the gate is evaluated in, warps and pipeline stages."""

    features: int
    tokens: int
    inner: int
    sub: int
    warps: int
    stages: int
    group: int = 8
    """Feature blocks that run together over the same tokens, to meet in the L2 cache."""


class PointwiseTile(NamedTuple):
    """rational_forward, rational_backward: [features, lanes, vector], `vector` tokens to a thread."""

    features: int
    lanes: int
    vector: int
    warps: int


LARGE_DEGREE = 12
"""From p + q of this on, a gate counts as large: its coefficients crowd the registers of a tile."""

# generation -> (bytes of an element, large degree and one gate per feature) -> tile
MATMUL = {
    8: {
        (2, False): MatmulTile(128, 128, 32, 2, 8, 4),
        (2, True): MatmulTile(128, 128, 32, 4, 8, 4),
        (4, False): MatmulTile(128, 64, 32, 2, 8, 3),
        (4, True): MatmulTile(128, 64, 32, 2, 8, 3),
    },
    9: {
        (2, False): MatmulTile(128, 128, 64, 2, 8, 4),
        (2, True): MatmulTile(128, 128, 64, 2, 8, 4),
        (4, False): MatmulTile(128, 128, 32, 2, 8, 3),
        (4, True): MatmulTile(128, 128, 32, 2, 8, 3),
    },
    10: {
        (2, False): MatmulTile(128, 128, 64, 2, 8, 4),
        (2, True): MatmulTile(128, 128, 64, 4, 8, 4),
        (4, False): MatmulTile(128, 128, 32, 2, 8, 3),
        (4, True): MatmulTile(128, 128, 32, 4, 8, 3),
    },
}


def generation(capability: int) -> int:
    """The table that serves a major compute capability. Consumer Blackwell (12) has Ampere's tensor cores
    and shared memory; what is newer than we know gets the most careful table too."""
    return capability if capability in MATMUL else 8


def matmul_tile(capability: int, dtype: torch.dtype, p: int, q: int, shared: bool) -> MatmulTile:
    """The tile of `encode_forward` on a GPU of this major compute capability."""
    large = p + q >= LARGE_DEGREE and not shared
    return MATMUL[generation(capability)][dtype.itemsize, large]


def pointwise_tile(capability: int, dtype: torch.dtype, p: int, q: int, shared: bool) -> PointwiseTile:
    """The tile of the pointwise kernels: one warp to a feature, 16 bytes of h to a thread."""
    return PointwiseTile(features=4, lanes=32, vector=16 // dtype.itemsize, warps=4)
