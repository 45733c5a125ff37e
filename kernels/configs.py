"""Tile sizes: one small table per GPU generation, chosen by dtype, degree and sharing. Pure functions of these.

Each entry is checked by `python -m rsae_triton.kernels.aot`: no register spills, shared memory in bounds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton


class MatmulTile(NamedTuple):
    """encode_forward, encode_backward: block sizes, the parts (`sub`) of the epilogue, warps, pipeline stages."""

    features: int
    tokens: int
    inner: int
    sub: int
    warps: int
    stages: int
    group: int = 8
    """Feature blocks that run together over the same tokens, to meet in the L2 cache."""
    lanes: int = 4
    """encode_backward: threads that share a feature (4 as the tensor cores of sm_80 and sm_90 leave a row)."""


class PointwiseTile(NamedTuple):
    """rational_forward, rational_backward: [features, lanes, vector], `vector` tokens to a thread."""

    features: int
    lanes: int
    vector: int
    warps: int
    stages: int = 1
    """Iterations of the loop over tokens whose loads are on their way at a time."""


class RowsTile(NamedTuple):
    """sparse_rows: [words, tokens] (words of 32 features) and [places, tokens] (of the candidates' rows)."""

    words: int
    places: int
    tokens: int
    warps: int


class DecodeTile(NamedTuple):
    """sparse_decode: rows of W_dec (or of its gradient's terms) that are in flight, and their columns."""

    rows: int
    columns: int
    warps: int


SPECIALISED = 16
"""Triton compiles a kernel anew for sizes that this divides, and only then knows that rows are aligned."""
LARGE_DEGREE = 8
"""From p + q of this on a gate counts as large: its coefficients (one set per feature) crowd the registers of a
tile, and in the backward pass so do its sums, shared or not."""

# generation -> (bytes of an element, large) -> tile. Of the tiles that do not spill, the largest whose epilogue
# stores whole 32-byte sectors; which of them is fastest has not been measured yet (docs/kernels.md).
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
    # Tensor memory hands eight warps a tile whose token halves belong to different warps, and splitting it would
    # go through shared memory; four warps hold whole rows.
    10: {
        (2, False): MatmulTile(128, 64, 64, 2, 4, 4),
        (2, True): MatmulTile(128, 64, 64, 4, 4, 4),
        (4, False): MatmulTile(128, 64, 32, 4, 4, 4),
        (4, True): MatmulTile(128, 64, 32, 4, 4, 4),
    },
}

# The backward epilogue holds p + q + 5 sums and, per feature, as many coefficients, for each feature of a thread.
# So these tiles are narrow: few enough registers that two or three programs of four warps share a multiprocessor,
# and the product of one runs under the epilogue of another. On sm_80 a tile must also be narrow for its warps to
# lie along the features; otherwise every sum crosses warps.
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
    """The table that serves a major compute capability. Consumer Blackwell (12) has Ampere's tensor cores
    and shared memory; what is newer than we know gets the most careful table too."""
    return capability if capability in MATMUL else 8


def large(p: int, q: int) -> bool:
    return p + q >= LARGE_DEGREE


def matmul_tile(capability: int, dtype: torch.dtype, p: int, q: int, shared: bool, n_tokens: int) -> MatmulTile:
    """The tile of `encode_forward` on a GPU of this major compute capability."""
    tile = MATMUL[generation(capability)][dtype.itemsize, large(p, q) and not shared]
    if n_tokens % SPECIALISED:  # codes are stored one by one, each with a pointer of its own
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
    """The tile of the pointwise kernels: one warp to a feature, 16 bytes of h to a thread.

    Rows that do not start on 16 bytes cannot be read so; then a thread takes single tokens, because spreading
    a vector over lanes would make every sum of the loop a shuffle. Such loads cannot be sent ahead either. The others
    are: two iterations ahead, because the backward pass's sums leave room for 12 to 16 warps on a multiprocessor, whose
    own loads (16 KB) are less than what keeps a GPU's memory busy (some 25 KB on an H200).
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
    """The tile of `sparse_decode`: 16 bytes of a bfloat16 row to a thread, 8 rows at a time to hide their latency."""
    return DecodeTile(rows=8, columns=min(512, triton.next_power_of_2(max(d_in, 1))), warps=4)


# The sparse step. What is fastest has not been measured yet; each has no spills, and enough loads on their way.
ENTRY_PROGRAMS = 4096
MOST_COLUMNS = 16384
"""Longest row that `adam_rows` holds in registers."""


def mark_tile(dtype: torch.dtype, n_tokens: int) -> PointwiseTile:
    """The tile of `support_mark`: 32 features, so that a word of bits along them is one program's, and as many tokens
    as its registers take: those of rows that are not aligned have a pointer each, and cannot be sent for ahead."""
    if n_tokens % SPECIALISED:
        return PointwiseTile(features=32, lanes=32, vector=1, warps=4)
    return PointwiseTile(features=32, lanes=64 if dtype.itemsize == 4 else 128, vector=1, warps=4, stages=2)


def entry_tile() -> RowsTile:
    """The tile of the lists: 8 features (or tokens) by 32 words of 32 tokens (or features)."""
    return RowsTile(words=32, places=0, tokens=8, warps=4)


def entry_block(p: int, q: int, shared: bool) -> int:
    """Entries that a program of the entries' gate takes at a time: with many coefficients each, one to a thread."""
    return 128 if large(p, q) and not shared else 256


def dots_tile(d_in: int) -> DecodeTile:
    """The tile of `entry_dots`: entries at a time, and columns of their rows."""
    return DecodeTile(rows=16, columns=min(128, triton.next_power_of_2(max(d_in, 1))), warps=4)


def entry_programs(capacity: int, block: int) -> int:
    """Programs that share the blocks of entries: how many blocks there really are is known on the GPU alone."""
    return min(triton.cdiv(capacity, block), ENTRY_PROGRAMS)


def row_warps(d_in: int) -> int:
    """Warps to a row of `adam_rows`: 8 or 16 numbers of it to a thread."""
    return min(16, max(1, triton.next_power_of_2(max(d_in, 1)) // 256))
