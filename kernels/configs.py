"""Tile sizes: one small table per GPU generation, looked up by dtype, degree and sharing. Pure functions of these.

Each entry is checked by `python -m rsae_triton.kernels.aot`: no register spills, shared memory within bounds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton


class MatmulTile(NamedTuple):
    """For encode_forward and encode_backward: block sizes, the parts (`sub`) of the epilogue, warps, pipeline
    stages."""

    features: int
    tokens: int
    inner: int
    sub: int
    warps: int
    stages: int
    group: int = 8
    """Number of feature blocks that run together over the same tokens, so that they share the L2 cache."""
    lanes: int = 4
    """For encode_backward: threads that share a feature (4, as the tensor cores of sm_80 and sm_90 leave a row)."""


class PointwiseTile(NamedTuple):
    """For rational_forward and rational_backward: [features, lanes, vector], with `vector` tokens per thread."""

    features: int
    lanes: int
    vector: int
    warps: int
    stages: int = 1
    """Number of iterations of the loop over tokens whose loads are in flight at a time."""


class RowsTile(NamedTuple):
    """For sparse_rows: [words, tokens] (words of 32 features) and [places, tokens] (of the candidates' rows)."""

    words: int
    places: int
    tokens: int
    warps: int


class DecodeTile(NamedTuple):
    """For sparse_decode: rows of W_dec (or of its gradient's terms) that are in flight, and their columns."""

    rows: int
    columns: int
    warps: int


SPECIALISED = 16
"""Triton compiles a kernel anew for sizes divisible by this, and only then knows that rows are aligned."""
LARGE_DEGREE = 8
"""The least p + q of a gate that counts as large: its coefficients (one set per feature) take up the registers of a
tile. In the backward pass so do its sums, shared or not."""

# generation -> (bytes per element, large) -> tile. Among the tiles that do not spill, these are the largest whose
# epilogue stores whole 32-byte sectors. Which of them is fastest has not been measured yet (docs/kernels.md).
MATMUL = {
    8: {
        (2, False): MatmulTile(128, 128, 32, 2, 8, 4),
        (2, True): MatmulTile(128, 64, 32, 2, 8, 4),
        (4, False): MatmulTile(128, 64, 32, 4, 8, 3),
        (4, True): MatmulTile(128, 64, 32, 4, 8, 3),
    },
    9: {
        (2, False): MatmulTile(128, 128, 64, 2, 8, 4),
        (2, True): MatmulTile(128, 128, 64, 4, 8, 4),
        (4, False): MatmulTile(128, 64, 32, 4, 8, 3),
        (4, True): MatmulTile(128, 64, 32, 4, 8, 3),
    },
    # Tensor memory gives eight warps a tile whose token halves belong to different warps, and splitting it would go
    # through shared memory; with four warps each holds whole rows.
    10: {
        (2, False): MatmulTile(128, 64, 64, 2, 4, 4),
        (2, True): MatmulTile(128, 64, 64, 4, 4, 4),
        (4, False): MatmulTile(128, 64, 32, 4, 4, 4),
        (4, True): MatmulTile(128, 64, 32, 4, 4, 4),
    },
}

# The backward epilogue holds p + q + 5 sums and, per feature, as many coefficients, for each feature of a thread. So
# these tiles are narrow: they need few enough registers that two or three programs of four warps share a
# multiprocessor, and the product of one runs during the epilogue of another. On sm_80 a tile must also be narrow for
# its warps to lie along the features; otherwise every sum would cross warps.
BACKWARD = {
    8: {
        (2, False): MatmulTile(64, 32, 32, 2, 4, 4),
        (2, True): MatmulTile(64, 16, 32, 1, 4, 4),
        (4, False): MatmulTile(64, 32, 32, 2, 4, 3),
        (4, True): MatmulTile(64, 16, 32, 1, 4, 3),
    },
    9: {
        (2, False): MatmulTile(64, 64, 64, 4, 4, 4),
        (2, True): MatmulTile(64, 32, 64, 2, 4, 4),
        (4, False): MatmulTile(64, 32, 32, 2, 4, 4),
        (4, True): MatmulTile(64, 32, 32, 2, 4, 4),
    },
    10: {
        (2, False): MatmulTile(128, 32, 64, 4, 4, 4, lanes=1),
        (2, True): MatmulTile(128, 32, 64, 4, 4, 4, lanes=1),
        (4, False): MatmulTile(128, 32, 32, 4, 4, 4, lanes=1),
        (4, True): MatmulTile(128, 16, 32, 2, 4, 4, lanes=1),
    },
}


def generation(capability: int) -> int:
    """The table for a major compute capability. Consumer Blackwell (12) has Ampere's tensor cores and shared memory;
    unknown newer GPUs also get the most conservative table."""
    return capability if capability in MATMUL else 8


def large(p: int, q: int) -> bool:
    return p + q >= LARGE_DEGREE


def matmul_tile(capability: int, dtype: torch.dtype, p: int, q: int, shared: bool, n_tokens: int) -> MatmulTile:
    """The tile of `encode_forward` on a GPU of this major compute capability."""
    tile = MATMUL[generation(capability)][dtype.itemsize, large(p, q) and not shared]
    if n_tokens % SPECIALISED:  # codes are stored one by one, each with its own pointer
        most = 32 if generation(capability) == 10 else 64
        tile = tile._replace(tokens=min(tile.tokens, most), sub=4)
    return tile


def backward_tile(capability: int, dtype: torch.dtype, p: int, q: int, n_tokens: int) -> MatmulTile:
    """The tile of `encode_backward` on a GPU of this major compute capability."""
    tile = BACKWARD[generation(capability)][dtype.itemsize, large(p, q)]
    if n_tokens % SPECIALISED and large(p, q) and tile.lanes > 1:  # one part keeps fewer pointers alive than two
        tile = tile._replace(sub=1)
    return tile


def pointwise_tile(dtype: torch.dtype, n_tokens: int) -> PointwiseTile:
    """The tile of the pointwise kernels: one warp per feature, 16 bytes of h per thread.

    If rows do not start at multiples of 16 bytes, they cannot be read that way. A thread then takes single tokens,
    because spreading a vector over lanes would make every sum in the loop a shuffle; such loads cannot be issued ahead.
    All others are issued two iterations ahead: the backward pass's sums leave room for only 12 to 16 warps per
    multiprocessor, whose own loads (16 KB) are too few to keep a GPU's memory busy (some 25 KB on an H200).
    """
    if n_tokens % SPECIALISED:
        return PointwiseTile(features=4, lanes=64, vector=1, warps=4)
    return PointwiseTile(features=4, lanes=32, vector=16 // dtype.itemsize, warps=4, stages=3)


def sparse_tile(capability: int, dtype: torch.dtype, p: int, q: int, shared: bool, n_tokens: int) -> MatmulTile:
    """The tile of `sparse_encode`: a multiple of 32 features."""
    return matmul_tile(capability, dtype, p, q, shared, n_tokens)


def rows_tile(n_words: int) -> RowsTile:
    """The tile of `sparse_rows`: 8 tokens, because that many words of 4 bytes fill a sector of memory."""
    return RowsTile(words=min(64, triton.next_power_of_2(n_words)), places=64, tokens=8, warps=4)


def decode_tile(d_in: int) -> DecodeTile:
    """The tile of `sparse_decode`: 16 bytes of a bfloat16 row per thread, 8 rows at a time to hide their latency."""
    return DecodeTile(rows=8, columns=min(512, triton.next_power_of_2(max(d_in, 1))), warps=4)


# The sparse step. Which tiles are fastest has not been measured yet; none of these spills, and all have enough loads in
# flight.
ENTRY_PROGRAMS = 4096
MARK_FEATURES = 32
"""Number of features in a block of `support_mark`, so that a word of bits along them belongs to one program;
`list_entries` takes the same blocks."""
MOST_COLUMNS = 16384
"""Longest row that `adam_rows` holds in registers."""


def mark_tile(dtype: torch.dtype, n_tokens: int, screened: bool = False) -> PointwiseTile:
    """The tile of `support_mark`: a block of features, and as many tokens as fit its registers. (Tokens of rows that
    are not aligned have a pointer each, and cannot be loaded ahead.) screened: with a margin, or among candidates,
    which take registers too."""
    if n_tokens % SPECIALISED:
        return PointwiseTile(features=MARK_FEATURES, lanes=32, vector=1, warps=8 if screened else 4)
    lanes = 64 if dtype.itemsize == 4 or screened else 128
    return PointwiseTile(features=MARK_FEATURES, lanes=lanes, vector=1, warps=4, stages=2)


def entry_tile() -> RowsTile:
    """The tile of the lists: 32 features (or tokens) by 16 words of 32 tokens (or features)."""
    return RowsTile(words=16, places=0, tokens=32, warps=4)


def entry_block(p: int, q: int, shared: bool) -> int:
    """Number of entries that a program of the entries' gate takes at a time; with many coefficients each, one per
    thread."""
    return 128 if large(p, q) and not shared else 256


def dots_tile(d_in: int) -> DecodeTile:
    """The tile of `entry_dots`: entries at a time, and columns of their rows."""
    return DecodeTile(rows=16, columns=min(128, triton.next_power_of_2(max(d_in, 1))), warps=4)


def entry_programs(capacity: int, block: int) -> int:
    """Number of programs that share the blocks of entries; how many blocks there really are is only known on the
    GPU."""
    return min(triton.cdiv(capacity, block), ENTRY_PROGRAMS)


def row_warps(d_in: int) -> int:
    """Number of warps per row of `adam_rows`: 8 or 16 numbers of it per thread."""
    return min(16, max(1, triton.next_power_of_2(max(d_in, 1)) // 256))
