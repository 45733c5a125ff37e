"""Checkpoints written by many processes and read by any number, through torch.distributed.checkpoint.

Every process writes its part as a safetensors file that says where in the whole tensor each part lies; nothing is
pickled. What one process wrote is the special case of one part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsae_triton.common.checkpoint import STATE, is_sharded, read_info, read_state
from rsae_triton.common.errors import FormatError, SourceError, first_line
from rsae_triton.sae.architectures import JumpReluSAE, ReluSAE, TopKSAE
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.batch_topk import BatchTopKSAE
from rsae_triton.sae.topk_rational import RATIONAL
from rsae_triton.sae.transcoder import KINDS

_TEACHERS: tuple[type[SparseAutoencoder], ...] = (ReluSAE, JumpReluSAE, TopKSAE, BatchTopKSAE)
_KINDS: dict[str, type[SparseAutoencoder]] = {
    name: kind for kind in (*RATIONAL, *_TEACHERS, *KINDS.values()) for name in kind.architectures()
}


def write_parts(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Writes this process's file of a checkpoint; called by every process of the group at once.

    Args:
        tensors: DTensors, or plain tensors that are equal on every process.
    """
    dcp = _checkpoint()
    writer = dcp.HuggingFaceStorageWriter(str(folder / STATE), save_distributed=True)
    dcp.save(dict(tensors), storage_writer=writer)


def shapes_of(path: Path) -> dict[str, torch.Size]:
    """The whole shape of every tensor in a checkpoint.

    Raises:
        FormatError: the files are damaged.
    """
    metadata = _read(path, lambda reader: reader.read_metadata())
    return {name: one.size for name, one in metadata.state_dict_metadata.items() if not name.startswith("rng.")}


def read_parts(path: Path, into: dict[str, Tensor], *, alone: bool = False) -> None:
    """Fills the tensors of `into`, whole ones or DTensors, from a checkpoint; every process calls it at once.

    Raises:
        FormatError: the files are damaged.
    """
    _read(path, lambda reader: _checkpoint().load(into, storage_reader=reader, no_dist=alone))


def read_whole(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole, in this process alone.

    Raises:
        FormatError: the files are damaged.
    """
    metadata = _read(path, lambda reader: reader.read_metadata())
    found = {
        name: torch.empty(one.size, dtype=one.properties.dtype)
        for name, one in metadata.state_dict_metadata.items()
        if not name.startswith("rng.")
    }
    read_parts(path, found, alone=True)
    return found


def read_sae(path: Path) -> SparseAutoencoder:
    """The SAE in a checkpoint, in the units and the dtype it is trained in.

    Raises:
        FormatError: files are missing or damaged, or it is of an unknown architecture.
    """
    info = read_info(path)
    kind = _KINDS.get(info["config"].get("architecture"))
    if kind is None:
        raise FormatError(f"{path} is of an SAE of architecture {info['config'].get('architecture')!r}, unknown here")
    tensors = read_whole(path) if is_sharded(path) else read_state(path)
    weights = {name.removeprefix("sae."): one for name, one in tensors.items() if name.startswith("sae.")}
    held = {"dtype": str(weights["W_dec"].dtype)} if "W_dec" in weights else {}
    return kind.from_files({**info["config"], **held}, weights, path)


def _checkpoint() -> Any:
    import torch.distributed.checkpoint as dcp

    if not hasattr(dcp, "HuggingFaceStorageReader"):
        raise SourceError(
            f"torch {torch.__version__} cannot read or write sharded safetensors; install torch 2.9 or later"
        )
    return dcp


def _read(path: Path, action: Any) -> Any:
    import logging
    import warnings

    reader = _checkpoint().HuggingFaceStorageReader(str(path / STATE))
    # It warns that a load without a process group may not be intended; here it is.
    log = logging.getLogger("torch.distributed.checkpoint")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            return action(reader)
    except SourceError:
        raise
    except Exception as error:  # SafetensorError, KeyError, and torch's wrapper of whatever any process met
        raise FormatError(f"{path} is damaged ({first_line(error)})") from error
    finally:
        log.setLevel(level)
