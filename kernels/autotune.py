"""RSAE_AUTOTUNE=1: measures which tile is fastest on this GPU instead of using the table, and remembers it on disk.

There is one small JSON file for each kernel, shape and GPU under $RSAE_CACHE/autotune (by default in the user's cache
folder), named by a hash of everything that the answer depends on: the GPU, the versions of torch and triton, the source
of the kernels. Processes can share the folder, because an incomplete file is ignored, and `rsae_triton.ops` writes
files completely or not at all. The first call for a shape takes minutes. Sums are bit-reproducible for a given tile, so
from run to run only as long as the folder is kept.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from .configs import SPECIALISED, MatmulTile, PointwiseTile, generation

Tile = TypeVar("Tile", MatmulTile, PointwiseTile)
_SHARED_MEMORY = {8: 163 * 1024, 9: 227 * 1024, 10: 227 * 1024}
_chosen: dict[str, MatmulTile | PointwiseTile] = {}
"""What this process already knows, by file name."""
keep: Callable[[Path, str], object] = Path.write_text
"""Writes an answer; `rsae_triton.ops.backends` replaces it by a function that leaves either the old file or the new
one."""


def pick(
    name: str,
    default: Tile,
    candidates: Callable[[], Iterator[Tile]],
    on: Tensor,
    depends_on: dict[str, Any],
    launch: Callable[[Tile], object],
) -> Tile:
    """Returns `default`, or with RSAE_AUTOTUNE=1 the fastest of it and the candidates.

    name: the kernel's. on: a tensor on the GPU. depends_on: the shape and everything else that a launch is specialised
    for. launch: runs the kernel with a tile, and may be called any number of times; a tile that it cannot run is
    skipped.
    """
    if os.environ.get("RSAE_AUTOTUNE") != "1" or not can_measure(on):
        return default
    key = {
        "kernel": name, "device": device_name(on), "torch": torch.__version__, "triton": triton.__version__,
        "source": source_hash(), **{k: str(v) for k, v in depends_on.items()},
    }  # fmt: skip
    file = f"{name}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.json"
    if file not in _chosen:
        if on.is_cuda and torch.cuda.is_current_stream_capturing():
            return default  # nothing can be timed inside a CUDA graph: run the shape once before capturing it
        tiles = list(dict.fromkeys([default, *candidates()]))
        _chosen[file] = _read(folder() / file, key, tiles) or _search(folder() / file, key, tiles, launch)
    return _chosen[file]  # type: ignore[return-value]


def _search(path: Path, key: dict[str, str], tiles: list[Tile], launch: Callable[[Tile], object]) -> Tile:
    times: list[float | None] = []
    for tile in tiles:
        try:
            times.append(measure(functools.partial(launch, tile)))
        except unusable():
            times.append(None)
    known = [one for one in times if one is not None]
    if not known:
        return tiles[0]
    best = times.index(min(known))
    tried = [{"tile": list(tile), "ms": ms} for tile, ms in zip(tiles, times, strict=True)]
    _write(path, {"key": key, "tile": list(tiles[best]), "ms": times[best], "tried": tried})
    return tiles[best]


def measure(launch: Callable[[], object]) -> float:
    """The median time of a launch in milliseconds, with a cold L2 cache."""
    return triton.testing.do_bench(launch, warmup=10, rep=50, return_mode="median")


def unusable() -> tuple[type[Exception], ...]:
    """The errors that say that a tile does not fit the GPU or the compiler."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return OutOfResources, PTXASError, CompilationError


def can_measure(on: Tensor) -> bool:
    return on.is_cuda


def device_name(on: Tensor) -> str:
    return torch.cuda.get_device_name(on.device)


def folder() -> Path:
    """The folder for the answers."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "rsae-triton"
    return Path(os.environ.get("RSAE_CACHE") or default).expanduser() / "autotune"


@functools.cache
def source_hash() -> str:
    """A hash of all files in this folder, since a kernel is made of several."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()[:16]


def _read(path: Path, key: dict[str, str], tiles: list[Tile]) -> Tile | None:
    """Reads the answer in a file, if it is for this key and names a possible tile; else None."""
    try:
        found = json.loads(path.read_text())
        tile = type(tiles[0])(*found["tile"])
        return tile if found["key"] == key and tile in tiles else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        keep(path, json.dumps(content, indent=1))
    except OSError as error:
        warnings.warn(f"the tile found for {path.stem} cannot be kept ({error}); set RSAE_CACHE", stacklevel=2)


def shape_key(n_features: int, n_tokens: int, *matrices: Tensor) -> dict[str, Any]:
    """The parts of a shape that the answer depends on: tokens up to the next power of two, and what Triton
    specialises."""
    return {
        "n_features": n_features,
        "n_tokens": (1 << max(n_tokens - 1, 0).bit_length(), n_tokens % SPECIALISED == 0),
        "matrices": [(one.dtype, one.shape[1], [step == 1 for step in one.stride()]) for one in matrices],
    }


def product_tiles(capability: int, itemsize: int, *, backward: bool) -> Iterator[MatmulTile]:
    """Yields tiles worth trying for `encode_forward`, or for `encode_backward` with its larger epilogue."""
    which = generation(capability)
    lanes = 1 if which == 10 else 4
    for features in (64, 128, 256):
        for tokens in (16, 32, 64, 128) if backward else (32, 64, 128, 256):
            for warps in (4, 8):
                per_thread = features * tokens // (32 * warps)
                if not (8 if backward else 16) <= per_thread <= (64 if backward else 128):
                    continue
                for inner in (32, 64) if itemsize == 2 else (16, 32):
                    stages = min(4, _SHARED_MEMORY[which] // ((features + tokens) * inner * itemsize))
                    for sub in (1, 2, 4):
                        # Parts from as narrow as a thread's row of a product, up to what clearly has too many
                        # registers.
                        part = tokens // sub
                        if stages >= 2 and part >= 16 and features * part // (32 * warps) <= 32:
                            yield MatmulTile(features, tokens, inner, sub, warps, stages, lanes=lanes)


def pointwise_tiles(itemsize: int, n_tokens: int) -> Iterator[PointwiseTile]:
    """Yields tiles worth trying for `rational_forward` and `rational_backward`."""
    for warps in (2, 4, 8):
        for features in (warps // 2, warps, 2 * warps):
            if n_tokens % SPECIALISED:
                yield from (PointwiseTile(features, lanes, 1, warps) for lanes in (32, 64, 128))
            else:
                for size in (8, 16, 32):
                    yield from (PointwiseTile(features, 32, size // itemsize, warps, stages) for stages in (1, 3))
