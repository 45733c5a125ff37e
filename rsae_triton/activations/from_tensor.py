"""Makes a store from activations that were obtained elsewhere."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rsae_triton.activations.store import MANIFEST, SCHEMA, ActivationStore
from rsae_triton.common.checks import check_data, check_finite, check_integer
from rsae_triton.common.errors import ConfigError, NumericsError, RsaeError, ShapeError
from rsae_triton.common.files import as_path, as_utf8, check_room, file_sha256, whole_folder

_LOOK = 1 << 20  # how many numbers are checked at a time


def store_tensor(
    x: torch.Tensor, folder: str | Path, *, rows_per_shard: int = 1 << 16, provenance: dict[str, Any] | None = None
) -> ActivationStore:
    """Writes raw activations x [n_tokens, d_in], in the model's units and in their dtype, as an activation store.

    Rows keep their order on disk; reading shuffles them. `provenance` (model, hook_name, ...) goes into the manifest. x
    may be mapped from a file larger than memory (`torch.from_numpy(np.memmap(...))`), since only one shard is read at a
    time.

    Raises:
        ShapeError, NumericsError: x is not [n_tokens, d_in], or not finite.
        ConfigError: the folder exists already, or JSON cannot hold the provenance.
        StorageError: the files cannot be written; nothing is left of the store.
    """
    folder = as_path("folder", folder)
    check_data("x", x)
    check_integer("rows_per_shard", rows_per_shard, 1)
    if x.dim() != 2 or not x.numel():
        raise ShapeError(f"x has shape {tuple(x.shape)}; activations are [n_tokens, d_in]")
    if x.dtype.itemsize < 2:
        raise ConfigError(f"x is {x.dtype}; give float16, bfloat16, float32 or float64")
    try:
        as_utf8("provenance", json.dumps(dict(provenance or {}), ensure_ascii=False))
    except (TypeError, ValueError) as error:
        if isinstance(error, RsaeError):
            raise
        raise ConfigError(f"provenance holds what JSON cannot ({error}); nothing was written to {folder}") from error
    check_room(folder, x.nbytes, "the store")
    with whole_folder(folder) as partial:
        _write(partial, x.detach(), rows_per_shard, provenance or {})
    return ActivationStore(folder)


def _write(partial: Path, x: torch.Tensor, rows_per_shard: int, provenance: dict[str, Any]) -> None:
    shards, files = [], {}
    total = torch.zeros(x.shape[1], dtype=torch.float64)
    norms = 0.0
    for number, part in enumerate(x.split(rows_per_shard)):
        for rows in part.split(max(1, _LOOK // x.shape[1])):
            if not bool(rows.isfinite().all()):
                check_finite("x", x, "remove those rows")
            norms += float(rows.float().norm(dim=1).double().sum())
            total += rows.double().sum(0).cpu()
        name = f"shard-{number:05d}.safetensors"
        save_file({"activations": part.cpu().contiguous()}, partial / name)
        shards.append({"file": name, "rows": len(part)})
    mean_norm = norms / len(x)
    if mean_norm == 0:
        raise NumericsError("all activations are zero")
    save_file({"mean": (total / len(x)).float()}, partial / "mean.safetensors")
    # The folder does not have its final name yet, so no other process writes into it.
    for name in sorted(path.name for path in partial.iterdir()):
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
