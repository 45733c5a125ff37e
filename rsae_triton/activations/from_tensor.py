"""A store from activations that were read elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from rsae_triton.activations.store import MANIFEST, SCHEMA, ActivationStore
from rsae_triton.common.checks import check_data, check_finite, check_integer
from rsae_triton.common.errors import ConfigError, NumericsError, ShapeError, StorageError, first_line
from rsae_triton.common.files import as_path, file_sha256


def store_tensor(
    x: torch.Tensor, folder: str | Path, *, rows_per_shard: int = 1 << 16, provenance: dict[str, Any] | None = None
) -> ActivationStore:
    """Writes x [n_tokens, d_in], in the model's own units and in its dtype, as an activation store.

    Rows keep their order on disk; reading shuffles them. `provenance` (model, hook_name, ...) goes into the manifest.

    Raises:
        ShapeError, NumericsError: x is not [n_tokens, d_in], or not finite. ConfigError: the folder is there already,
            or provenance that JSON cannot hold. StorageError: the disk refuses; nothing is left of the store.
    """
    folder = as_path("folder", folder)
    check_data("x", x)
    check_integer("rows_per_shard", rows_per_shard, 1)
    if x.dim() != 2 or not x.numel():
        raise ShapeError(f"x has shape {tuple(x.shape)}; activations are [n_tokens, d_in]")
    check_finite("x", x, "remove those rows")
    try:
        json.dumps(dict(provenance or {}))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"provenance holds what JSON cannot ({error}); nothing was written to {folder}") from error
    if folder.exists():
        raise ConfigError(f"{folder} is there already; choose another folder")
    mean_norm = float(x.float().norm(dim=1).double().mean())
    if mean_norm == 0:
        raise NumericsError("all activations are zero")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        _write(partial, x, rows_per_shard, mean_norm, provenance or {})
        os.replace(partial, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise StorageError(f"{folder} cannot be written ({reason}); choose another place, or make room") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return ActivationStore(folder)


def _write(partial: Path, x: torch.Tensor, rows_per_shard: int, mean_norm: float, provenance: dict[str, Any]) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shards, files = [], {}
    parts = {f"shard-{number:05d}.safetensors": part for number, part in enumerate(x.split(rows_per_shard))}
    for name, part in parts.items():
        save_file({"activations": part.detach().cpu().contiguous()}, partial / name)
        shards.append({"file": name, "rows": len(part)})
    save_file({"mean": x.double().mean(0).float()}, partial / "mean.safetensors")
    for name in (*parts, "mean.safetensors"):
        files[name] = {"bytes": (partial / name).stat().st_size, "sha256": file_sha256(partial / name)}
    key = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    manifest = {
        **provenance,
        "schema": SCHEMA,
        "key": key,
        "dtype": str(x.dtype).removeprefix("torch."),
        "d_in": x.shape[1],
        "n_tokens": len(x),
        "scale": x.shape[1] ** 0.5 / mean_norm,
        "mean_norm": mean_norm,
        "mean_file": "mean.safetensors",
        "sequences_file": None,
        "documents_file": None,
        "shards": shards,
        "files": files,
    }
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
