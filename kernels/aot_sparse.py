"""`aot` for the sparse encoder and decoder: how their kernels are launched, and in which variants."""

from __future__ import annotations

import torch

from .aot_variants import Variant
from .configs import decode_tile, rows_tile, sparse_tile
from .sparse_decode import segment_sum_kernel, sparse_decode_kernel, sparse_dots_kernel
from .sparse_encode import sparse_encode_kernel
from .sparse_rows import gather_rows_kernel, keep_largest_kernel

KERNELS = {
    "sparse_encode": sparse_encode_kernel,
    "gather_rows": gather_rows_kernel,
    "keep_largest": keep_largest_kernel,
    "sparse_decode": sparse_decode_kernel,
    "sparse_dots": sparse_dots_kernel,
    "segment_sum": segment_sum_kernel,
}
# Sizes that the rows' tiles depend on; these are Gemma-2-2B's.
N_WORDS, D_IN = 65536 // 32, 2304
GATES = [(True, (3, 2)), (True, (9, 8)), (False, (3, 2)), (False, (5, 4)), (False, (9, 8)), (False, (12, 12))]


def launch(v: Variant) -> tuple[dict, dict, str]:
    """Returns constants, options and the tile's name; see `aot.launch`."""
    if v.kernel == "sparse_encode":
        tile = sparse_tile(v.arch // 10, v.dtype, v.p, v.q, v.shared, 15 if v.ragged else 16)
        constants = {
            "P": v.p, "Q": v.q, "GATED": v.gated, "CLAMP": True, "IDENTITY": False, "SHARED": v.shared,
            "RANKED": v.ranked, "BLOCK_F": tile.features, "BLOCK_N": tile.tokens, "BLOCK_D": tile.inner,
            "SUB": tile.sub, "GROUP": tile.group, "stride_xd": 1, "stride_wf": 1,
            "PRECISION": v.precision if v.dtype == torch.float32 else "ieee",
        }  # fmt: skip
        name = f"{tile.features}x{tile.tokens}x{tile.inner} sub {tile.sub} w{tile.warps} s{tile.stages}"
        return constants, {"num_warps": tile.warps, "num_stages": tile.stages}, name
    if v.kernel in ("gather_rows", "keep_largest"):
        rows = rows_tile(N_WORDS)
        constants = {"BLOCK_N": rows.tokens}
        if v.kernel == "gather_rows":
            constants |= {"RANKED": v.ranked, "BLOCK_W": rows.words}
        else:
            constants["BLOCK_J"] = rows.places
        height = rows.words if v.kernel == "gather_rows" else rows.places
        return constants, {"num_warps": rows.warps, "num_stages": 1}, f"{height}x{rows.tokens} w{rows.warps}"
    decode = decode_tile(D_IN)
    constants = {"BLOCK_J": decode.rows, "BLOCK_D": decode.columns}
    return constants, {"num_warps": decode.warps}, f"{decode.rows}x{decode.columns} w{decode.warps}"


def types(v: Variant, element: str) -> dict[str, str]:
    """The types of the arguments that are not 32-bit integers."""
    code = "*fp32" if v.ranked else f"*{element}"
    found = dict.fromkeys(("x", "w", "g", "bias", "out", "weights", "out_values"), f"*{element}")
    found |= dict.fromkeys(("z", "values"), code)
    found |= dict.fromkeys(("coefficients",), "*fp32")
    found |= dict.fromkeys(("bits", "best", "out_counts"), "*i32")
    found |= dict.fromkeys(("indices", "out_indices", "at", "bounds"), "*i64")
    # `rows` are the gate's thresholds in the encoder, and the rows to sum in the decoder's backward pass.
    found["rows"] = "*fp32" if v.kernel == "sparse_encode" else f"*{element}"
    # The encoder counts in int32; a code to decode has int64 counts.
    found["counts"] = "*i32" if v.kernel in ("gather_rows", "keep_largest") else "*i64"
    return found
