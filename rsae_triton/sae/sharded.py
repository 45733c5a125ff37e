"""Checkpoints written by many processes and read by any number, through torch.distributed.checkpoint.

Every process writes its part as a safetensors file that records each part's position in the whole tensor. Nothing is
pickled. A checkpoint of a single process is the special case of one part.
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
    """Writes this process's file of a checkpoint. All processes of the group must call it together.

    Args:
        tensors: DTensors, or plain tensors that are equal on every process.

    Raises:
        OSError: a process could not write its part; raised by all of them.
    """
    dcp = _checkpoint()
    writer = dcp.HuggingFaceStorageWriter(str(folder / STATE), save_distributed=True)
    try:
        dcp.save(dict(tensors), storage_writer=writer)
    except dcp.api.CheckpointException as error:
        raise OSError(_reason(error)) from error


def shapes_of(path: Path) -> dict[str, torch.Size]:
    """Returns the whole shape of every tensor in a checkpoint.

    Raises:
        FormatError: the files are damaged.
    """
    metadata = _read(path, lambda reader: reader.read_metadata())
    return {name: one.size for name, one in metadata.state_dict_metadata.items() if not name.startswith("rng.")}


def read_parts(path: Path, into: dict[str, Tensor], *, alone: bool = False) -> None:
    """Fills the tensors of `into` (whole tensors or DTensors) from a checkpoint. All processes must call it together.

    Raises:
        FormatError: the files are damaged.
    """
    _read(path, lambda reader: _checkpoint().load(into, storage_reader=reader, no_dist=alone))


def read_whole(path: Path) -> dict[str, Tensor]:
    """Reads every tensor of a checkpoint completely, in this process alone.

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
    """Returns the SAE in a checkpoint, in the units and the dtype in which it is trained.

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


def _reason(error: Any) -> str:
    """The message of the first process's failure, out of those that torch combines in one exception."""
    return first_line(next(iter(error.failures.values()))[0])


def _read(path: Path, action: Any) -> Any:
    import logging
    import warnings

    reader = _checkpoint().HuggingFaceStorageReader(str(path / STATE))
    # torch warns that loading without a process group may be unintended; here it is intended.
    log = logging.getLogger("torch.distributed.checkpoint")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            return action(reader)
    except SourceError:
        raise
    except Exception as error:  # SafetensorError, KeyError
        raise FormatError(f"{path} is damaged ({first_line(error)})") from error
    except _checkpoint().api.CheckpointException as error:  # a BaseException
        raise FormatError(f"{path} is damaged ({_reason(error)})") from error
    finally:
        log.setLevel(level)
