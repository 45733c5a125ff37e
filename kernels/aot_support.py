"""`aot` for the sparse step: how its kernels are launched, and in which variants."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton

from .adam_rows import adam_rows_kernel, remove_radial_kernel, row_norms_kernel
from .aot_variants import Variant
from .configs import decode_tile, dots_tile, entry_block, entry_tile, mark_tile, row_warps
from .narrow_rows import narrow_rows_kernel
from .round_search import round_search_back_kernel, round_search_kernel
from .round_search import tile as search_tile
from .support_gate import entry_gate_backward_kernel, entry_gate_forward_kernel
from .support_list import count_rows_kernel, list_entries_kernel, list_rows_kernel
from .support_mark import support_mark_kernel
from .support_products import entry_dots_kernel, support_decode_kernel
from .support_sums import feature_sums_kernel, long_runs_kernel
from .support_threshold import BLOCK, threshold_backward_kernel, threshold_forward_kernel
from .support_totals import COLUMNS as TOTALS_COLUMNS
from .support_totals import ROWS as TOTALS_ROWS
from .support_totals import block_sums_kernel, totals_kernel

KERNELS = {
    "support_mark": support_mark_kernel,
    "list_entries": list_entries_kernel,
    "count_rows": count_rows_kernel,
    "list_rows": list_rows_kernel,
    "entry_gate_forward": entry_gate_forward_kernel,
    "entry_gate_backward": entry_gate_backward_kernel,
    "threshold_forward": threshold_forward_kernel,
    "threshold_backward": threshold_backward_kernel,
    "support_decode": support_decode_kernel,
    "entry_dots": entry_dots_kernel,
    "long_runs": long_runs_kernel,
    "feature_sums": feature_sums_kernel,
    "block_sums": block_sums_kernel,
    "totals": totals_kernel,
    "narrow_rows": narrow_rows_kernel,
    "row_norms": row_norms_kernel,
    "remove_radial": remove_radial_kernel,
    "adam_rows": adam_rows_kernel,
    "round_search": round_search_kernel,
    "round_search_back": round_search_back_kernel,
}
HEAVY = ("support_mark", "feature_sums", "long_runs", "entry_gate_backward", "threshold_backward")
"""Kernels for which three programs per multiprocessor are enough, because each has many loads in flight."""
ROWS = ("row_norms", "remove_radial", "adam_rows", "narrow_rows")
SEARCH = ("round_search", "round_search_back")
GATES = ("entry_gate_forward", "entry_gate_backward")
ALONE = ("count_rows", "totals", "row_norms", "remove_radial", "threshold_backward")
"""Kernels that are compiled for one dtype only, whatever the dtype of the products."""
D_IN = 2304
"""Gemma-2-2B's width, since the tiles depend on it."""


def launch(v: Variant) -> tuple[dict, dict, str]:
    """Returns constants, options and the tile's name; see `aot.launch`."""
    if v.kernel == "support_mark":
        mark = mark_tile(v.dtype, 15 if v.ragged else 16, screened=bool(v.screen))
        constants = {
            "BLOCK_F": mark.features,
            "BLOCK_N": mark.lanes,
            "STAGES": mark.stages,
            "HAS_BIAS": True,
            "HAS_SCALE": True,
            "SLACK": v.screen == "first",
            "AMONG": v.screen == "second",
        }
        return constants, {"num_warps": mark.warps, "num_stages": 1}, f"{mark.features}x{constants['BLOCK_N']}"
    if v.kernel in ("list_entries", "count_rows", "list_rows"):
        entry = entry_tile()
        constants = {"BLOCK_W": entry.words, "BLOCK_F" if v.kernel == "list_entries" else "BLOCK_N": entry.tokens}
        if v.kernel == "list_entries":
            constants["HAS_BIAS"] = True
        return constants, {"num_warps": entry.warps, "num_stages": 1}, f"{entry.words}x{entry.tokens} w{entry.warps}"
    if v.kernel in GATES:
        block = entry_block(v.p, v.q, v.shared)
        constants = {"P": v.p, "Q": v.q, "IDENTITY": False, "SHARED": v.shared, "BLOCK_E": block}
        if v.kernel == "entry_gate_backward":
            constants |= {"RATIONAL_BACKWARD": True, "HAS_DL1": True}
        return constants, {"num_warps": 4, "num_stages": 1}, f"{block} w4"
    if v.kernel in ("threshold_forward", "threshold_backward"):
        constants = {"BLOCK_E": BLOCK}
        if v.kernel == "threshold_backward":
            flags = ("RECTANGLE", "TO_H", "HAS_DL1", "BOUNDED")
            constants |= dict.fromkeys(flags, True)
        return constants, {"num_warps": 4, "num_stages": 1}, f"{BLOCK} w4"
    if v.kernel in ROWS:
        constants = {"BLOCK_D": triton.next_power_of_2(D_IN)}
        if v.kernel == "narrow_rows":
            constants["SCALED"] = bool(v.screen)
        elif v.kernel != "remove_radial":
            constants["RADIAL"] = True
        if v.kernel == "adam_rows":
            constants |= {"NORMS": True, "COPY": True}
        return constants, {"num_warps": row_warps(D_IN)}, f"{constants['BLOCK_D']} w{row_warps(D_IN)}"
    if v.kernel in SEARCH:
        found = search_tile(D_IN, v.dtype.itemsize)
        flags = ("CORRECT",) if v.kernel == "round_search" else ("HAS_DAFTER", "HAS_DRAW")
        constants = {**dict.fromkeys(flags, True), "BLOCK_J": found["BLOCK_J"], "BLOCK_D": found["BLOCK_D"]}
        name = f"{constants['BLOCK_J']}x{constants['BLOCK_D']} w{found['num_warps']}"
        return constants, {"num_warps": found["num_warps"]}, name
    if v.kernel == "totals":
        constants = {"BLOCK_R": TOTALS_ROWS, "BLOCK_D": TOTALS_COLUMNS}
        return constants, {"num_warps": 8}, f"{TOTALS_ROWS}x{TOTALS_COLUMNS} w8"
    tile = dots_tile(D_IN) if v.kernel == "entry_dots" else decode_tile(D_IN)
    rows = {"entry_dots": "BLOCK_E", "block_sums": "BLOCK_F"}.get(v.kernel, "BLOCK_J")
    constants = {rows: tile.rows, "BLOCK_D": tile.columns}
    if v.kernel == "support_decode":
        constants |= dict.fromkeys(("DECODE", "LIMITED", "HAS_BIAS", "LOSS", "SCALED", "ERROR"), True)
    if v.kernel == "block_sums":
        constants["THROUGH"] = True
    if v.kernel == "entry_dots":
        constants["DENSE"] = bool(v.screen)
    if v.kernel in ("feature_sums", "long_runs"):
        constants["SIZED"] = v.sized
    if v.kernel == "feature_sums":
        constants |= {"TOGETHER": v.together, "ADD": v.together, "PENALTY": not v.together}
    return constants, {"num_warps": tile.warps}, f"{tile.rows}x{tile.columns} w{tile.warps}"


def types(v: Variant, element: str) -> dict[str, str]:
    """The types of the arguments that are not 32-bit integers; weights, their gradients and moments are float32."""
    found = dict.fromkeys(("h", "dense", "g", "x", "w", "bias", "copy"), f"*{element}")
    found |= dict.fromkeys(("values", "z", "dz", "dh", "dtheta", "threshold", "scale", "a", "b", "centre"), "*fp32")
    found |= dict.fromkeys(("norms", "thresholds", "partial", "sizes"), "*fp32")
    found |= dict.fromkeys(("width", "bounded", "dcount", "dl1"), "fp32")
    found |= dict.fromkeys(("matrices", "numbers", "decoder", "encoder", "out"), "*fp32")
    found |= dict.fromkeys(("target", "error", "losses", "columns", "through", "loss", "mse_out"), "*fp32")
    found |= dict.fromkeys(("l1_out", "l0_out", "without_radial", "db_dec", "l1", "along"), "*fp32")
    found |= dict.fromkeys(("factor", "penalty", "mean", "l1_weight", "l0_weight", "rescale"), "fp32")
    found |= dict.fromkeys(("h_sums", "theta_sums", "l1_sums", "along_sums"), "*fp32")
    found |= dict.fromkeys(("weight", "grad", "mean", "square", "squares"), "*fp32")
    found |= dict.fromkeys(("support", "active", "tokens", "features", "counts", "totals"), "*i32")
    found |= dict.fromkeys(("offsets", "used"), "*i64")
    found |= {"slack": "*fp32", "lift": "*fp32", "candidates": "*i32", "matrix": f"*{element}"}
    found |= {"scales": "*fp32", "largest": "fp32"}
    if v.kernel in ("list_rows", "support_decode"):  # their codes are in the dtype of the products
        found |= dict.fromkeys(("z", "values"), f"*{element}")
    if v.kernel in SEARCH:
        numbers = ("r", "weight", "y", "c", "e", "m", "after", "alpha", "raw", "epsilon", "dy", "dafter", "draw")
        found |= dict.fromkeys((*numbers, "dweight", "dc", "de", "dm", "depsilon"), "*fp32")
        found |= {"opened": "*u8"} | dict.fromkeys(("features", "order", "starts"), "*i64")
    if v.kernel in ("support_mark", "list_entries", "block_sums"):
        found["partial"] = "*i32"
    if v.kernel == "block_sums":
        found["counts"] = "*fp32"
    if v.kernel == "entry_dots" and v.screen:
        found["out"] = f"*{element}"
    if v.kernel == "narrow_rows":
        found["rows"] = "*fp8e4nv" if v.screen else "*bf16"
    if v.kernel == "totals":
        found |= {"mean": "fp32", "entries": "*fp64"}
    if v.kernel == "feature_sums":  # the matrix itself, and norms
        found["w"] = "*fp32"
    if v.together:  # the lists of an encoder with rounds
        found |= {"tokens": "*i64", "features": "*i64"}
    return found


def variants(arch: int) -> Iterator[Variant]:
    for dtype in (torch.bfloat16, torch.float32):
        for kernel in sorted(KERNELS.keys() - set(GATES) - set(ALONE)):
            yield Variant(kernel, arch, dtype)
        yield Variant("support_mark", arch, dtype, ragged=True)
        yield Variant("entry_dots", arch, dtype, screen="first")
        yield Variant("support_mark", arch, dtype, screen="second")
        if arch >= 90:  # older GPUs have no float8
            yield Variant("narrow_rows", arch, dtype, screen="first")
        yield from (Variant(kernel, arch, dtype, sized=True) for kernel in ("feature_sums", "long_runs"))
    for ragged in (False, True):
        yield Variant("support_mark", arch, torch.bfloat16, ragged=ragged, screen="first")
    yield Variant("support_mark", arch, torch.float32, ragged=True, screen="second")
    yield from (Variant(kernel, arch, torch.float32, together=True) for kernel in ("feature_sums", "long_runs"))
    yield from (Variant(kernel, arch, torch.float32) for kernel in ALONE)
    for kernel in GATES:
        for degree in ((3, 2), (9, 8), (12, 12)):
            yield from (Variant(kernel, arch, torch.float32, *degree, shared, gated=True) for shared in (True, False))
