"""Safely reads archives from unknown sources: numpy's .npz, and torch's .pt and .pth.

As in `files`, memory is in proportion to the file on disk, and no code in the file is run.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsae_triton.common.errors import FormatError, first_line
from rsae_triton.common.pickles import MAX_ENTRIES, check_pickle

_MAX_PICKLE = 4 << 20  # the structure of a checkpoint, without its tensors
_MAX_DEPTH = 16
_END, _LOCATOR, _END_64 = 22, 20, 56  # sizes in bytes of an archive's closing records


def read_npz(path: Path) -> dict[str, Tensor]:
    """Reads the arrays of a .npz file. Raises FormatError for pickled objects and for files that expand enormously."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = path.stat().st_size
            swollen = sum(member.file_size for member in archive.infolist())
            # Weights do not compress. Zeros do, a thousandfold, as in a zip bomb.
            if swollen > 8 * packed + (1 << 20):
                raise FormatError(
                    f"{path} unpacks from {packed:,} to {swollen:,} bytes; "
                    "weights do not compress like that, so it is refused"
                )
            for member in archive.infolist():
                with archive.open(member) as stream:
                    _check_npy(path, member, stream)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in arrays.files}
    except FormatError:
        raise
    except Exception as error:  # for a damaged header, zipfile, zlib, ast and tokenize raise errors of different types
        raise FormatError(
            f"{path} is truncated or not a .npz file of plain arrays ({error}); fetch it again"
        ) from error


def _check_npy(path: Path, member: zipfile.ZipInfo, stream: Any) -> None:
    """Checks that the archive holds as much as the header of an array claims."""
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    if dtype.hasobject:
        raise FormatError(f"{member.filename} in {path} holds pickled objects; only arrays of numbers are read")
    claimed = dtype.itemsize
    for length in shape:
        claimed *= int(length)
    if claimed + stream.tell() != member.file_size:
        raise FormatError(f"{member.filename} in {path} claims shape {shape} but has another size; the file is bad")


def read_torch(path: Path) -> dict[str, Any]:
    """Reads a dictionary saved by torch.save, possibly nested, of tensors and plain values. Tensors are mapped from the
    file.

    Only tensors and plain containers are ever built: the pickle is inspected before it is read, and `weights_only`
    guards the reading. Raises FormatError for anything else.
    """
    if not path.is_file():
        raise FormatError(f"{path} does not exist")
    try:
        if not zipfile.is_zipfile(path):
            raise FormatError(
                f"{path} is truncated, or was saved by torch before 1.6; fetch it again, or load and save it with torch"
            )
        _check_one_directory(path)
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise FormatError(f"{path} is compressed; torch does not save so, and it is refused")
            names = [member.filename.lower() for member in members]  # torch ignores case when it looks names up
            pickles = [member for member in members if member.filename.lower().endswith("data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE or len(set(names)) < len(names):
                raise FormatError(f"{path} is a zip archive, but not one of torch.save with tensors in it")
            data = archive.read(pickles[0])
        # What is inspected here must be what torch's own reader of archives finds under that name.
        if torch._C.PyTorchFileReader(str(path)).get_record("data.pkl") != data:
            raise _two_faced(path)
        check_pickle(path, data)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FormatError:
        raise
    except Exception as error:  # for damaged files torch raises UnpicklingError, RuntimeError, EOFError and more
        reason = first_line(error)
        raise FormatError(f"{path} is damaged or holds more than tensors ({reason}); fetch it again") from error
    if not isinstance(found, Mapping):
        raise FormatError(f"{path} holds a {type(found).__name__}, not a dictionary of tensors")
    for name, tensor in named_tensors(found):
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise FormatError(f"{name} in {path} claims shape {tuple(tensor.shape)}, more than the file holds")
    return dict(found)


def _two_faced(path: Path) -> FormatError:
    return FormatError(f"{path} shows different contents to different readers of archives; it is refused")


def _check_one_directory(path: Path) -> None:
    """Checks that an archive ends with exactly one directory: entries, 64-bit end record and its locator, end record.

    Readers of archives look for these in different ways, so with two directories they would find different ones.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - _END - _LOCATOR - _END_64))
        tail = file.read()
    end = tail[-_END:]
    if len(end) < _END or end[:4] != b"PK\5\6" or end[-2:] != b"\0\0":
        raise _two_faced(path)
    directory_size, directory = struct.unpack("<LL", end[12:20])
    stops = size - _END
    locator = tail[-_END - _LOCATOR : -_END]
    if locator[:4] == b"PK\6\7":
        record = tail[: -_END - _LOCATOR]
        stops -= _LOCATOR + _END_64
        if struct.unpack("<Q", locator[8:16])[0] != stops or record[:4] != b"PK\6\6":
            raise _two_faced(path)
        wide_size, wide = struct.unpack("<QQ", record[40:56])
        # The 32-bit fields repeat the 64-bit ones, or are marked as too small.
        if directory_size not in (wide_size, 0xFFFFFFFF) or directory not in (wide, 0xFFFFFFFF):
            raise _two_faced(path)
        directory_size, directory = wide_size, wide
    if directory + directory_size != stops:
        raise _two_faced(path)


def named_tensors(
    found: Mapping[Any, Any], prefix: str = "", depth: int = 0, left: list[int] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor of a nested dictionary with its dotted name."""
    left = [MAX_ENTRIES] if left is None else left
    if depth > _MAX_DEPTH:
        raise FormatError(f"{prefix[:60]}...: dictionaries nested more than {_MAX_DEPTH} deep are no checkpoint")
    for key, value in found.items():
        left[0] -= 1
        if left[0] < 0:  # a few bytes of pickle can nest one dictionary in itself ten times on every level
            raise FormatError(f"{prefix[:60]}...: more than {MAX_ENTRIES:,} entries are no checkpoint")
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from named_tensors(value, f"{prefix}{key}.", depth + 1, left)
