"""Reads the folder of a checkpoint: training.json and state/*.safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from rsae_triton.common.checks import shown
from rsae_triton.common.errors import FormatError
from rsae_triton.common.files import read_json, read_safetensors

SCHEMA = 1
INFO, STATE = "training.json", "state"
_KINDS: dict[str, Any] = {
    "step": int, "files": dict, "config": dict, "settings": dict, "activations": str, "seconds": int | float,
}  # fmt: skip


def read_info(path: Path) -> dict[str, Any]:
    """Reads training.json of a checkpoint.

    Raises:
        FormatError: it is missing, damaged or of another schema, or a file that it names is missing or truncated.
    """
    info = read_json(path / INFO)
    if info.get("schema") != SCHEMA:
        raise FormatError(f"{path / INFO} is not of schema {SCHEMA}; it was written by another version")
    for key, kind in _KINDS.items():
        if not isinstance(info.get(key), kind) or isinstance(info[key], bool):
            raise FormatError(f"{path / INFO} has {key}={shown(info.get(key))}; it is damaged")
    if "controller" not in info or not (info["controller"] is None or isinstance(info["controller"], dict)):
        raise FormatError(f"{path / INFO} has lost the state of the sparsity weight")
    if not isinstance(info["config"].get("architecture"), str) or info["step"] < 0 or not info["files"]:
        raise FormatError(f"{path / INFO} describes no checkpoint; it is damaged")
    for name, size in info["files"].items():
        if Path(name).name != name or isinstance(size, bool) or not isinstance(size, int):
            raise FormatError(f"{path / INFO} names {shown(name)} of {shown(size)} bytes; it is damaged")
        file = path / STATE / name
        if not file.is_file() or file.stat().st_size != size:
            raise FormatError(f"{file} is missing or has not the {size:,} bytes it was written with")
    return info


def read_state(path: Path) -> dict[str, Tensor]:
    """Reads every tensor of a checkpoint that a single process wrote, mapped from its file.

    Raises:
        FormatError: files are missing or damaged.
    """
    return read_safetensors(path / STATE / "state.safetensors")


def is_sharded(path: Path) -> bool:
    """Whether several processes wrote the checkpoint."""
    return not (path / STATE / "state.safetensors").is_file()
