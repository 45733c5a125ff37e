"""Reading files that strangers made, and writing ours whole or not at all.

Every reader takes memory in proportion to the file on disk, whatever the file claims about itself, and answers
a truncated, foreign or dangerous one with a `FormatError` that names it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickletools
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rsae_triton.common.checks import shown
from rsae_triton.common.errors import ConfigError, FormatError, StorageError, first_line

_MAX_TEXT = 16 << 20
_MAX_PICKLE = 4 << 20  # the structure of a checkpoint without its tensors
_MAX_DEPTH = 16
_MAX_ENTRIES = 100_000
_BUILDERS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch Size",
    "torch device",
    *(f"torch {name}" for name in vars(torch) if name.endswith("Storage")),
    *(f"torch {name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of at most 16 MiB."""
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        raise FormatError(f"{path} does not exist")
    if size > _MAX_TEXT:
        raise FormatError(f"{path} has {size:,} bytes; a configuration has at most {_MAX_TEXT:,}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise FormatError(f"{path} is not JSON ({error}); fetch or save it again") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path} holds a {type(found).__name__}, not a JSON object; it is not a configuration")
    return found


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped from it."""
    if not path.is_file():
        raise FormatError(f"{path} does not exist")
    try:
        return load_file(path)
    except Exception as error:  # SafetensorError, or OSError from the mapping
        raise FormatError(f"{path} is truncated or not a safetensors file ({error}); fetch it again") from error


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of a .npz file; pickled objects in it are refused, and so is one that swells when unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = path.stat().st_size
            swollen = sum(member.file_size for member in archive.infolist())
            # Weights do not compress; zeros do, a thousandfold, which is what a bomb is made of.
            if swollen > 8 * packed + (1 << 20):
                raise FormatError(f"{path} unpacks from {packed:,} to {swollen:,} bytes; weights do not, it is refused")
            for member in archive.infolist():
                with archive.open(member) as stream:
                    _check_npy(path, member, stream)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in arrays.files}
    except FormatError:
        raise
    except Exception as error:  # a damaged header makes zipfile, zlib, ast and tokenize raise, each its own
        raise FormatError(
            f"{path} is truncated or not a .npz file of plain arrays ({error}); fetch it again"
        ) from error


def _check_npy(path: Path, member: zipfile.ZipInfo, stream: Any) -> None:
    """What the header of an array claims must be what the archive holds."""
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
    """A dictionary saved by torch.save, nested or not, of tensors and plain values; tensors are mapped from the file.

    Nothing but tensors and plain containers is ever built: the pickle is inspected before it is read, and
    `weights_only` guards the reading.
    """
    if not path.is_file():
        raise FormatError(f"{path} does not exist")
    try:
        if not zipfile.is_zipfile(path):
            raise FormatError(
                f"{path} is truncated, or was saved by torch before 1.6; fetch it again, or load and save it with torch"
            )
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise FormatError(f"{path} is compressed; torch does not save so, and it is refused")
            pickles = [member for member in members if member.filename.endswith("data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE:
                raise FormatError(f"{path} is a zip archive, but not one of torch.save with tensors in it")
            _check_pickle(path, archive.read(pickles[0]))
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FormatError:
        raise
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError and more for damaged files
        reason = first_line(error)
        raise FormatError(f"{path} is damaged or holds more than tensors ({reason}); fetch it again") from error
    if not isinstance(found, Mapping):
        raise FormatError(f"{path} holds a {type(found).__name__}, not a dictionary of tensors")
    for name, tensor in named_tensors(found):
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise FormatError(f"{name} in {path} claims shape {tuple(tensor.shape)}, more than the file holds")
    return dict(found)


def _check_pickle(path: Path, data: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("GLOBAL", "INST") and argument not in _BUILDERS:
            raise FormatError(
                f"{path} needs {str(argument).replace(' ', '.')} to be read; a pickle of more than tensors can run "
                "any code and is refused. Load it where you trust it and save its state_dict"
            )
        if opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "OBJ"):
            raise FormatError(f"{path} was not written by torch.save ({opcode.name} in its pickle); it is refused")


def named_tensors(
    found: Mapping[Any, Any], prefix: str = "", depth: int = 0, left: list[int] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a nested dictionary with its dotted name."""
    left = [_MAX_ENTRIES] if left is None else left
    if depth > _MAX_DEPTH:
        raise FormatError(f"{prefix[:60]}...: dictionaries nested more than {_MAX_DEPTH} deep are no checkpoint")
    for key, value in found.items():
        left[0] -= 1
        if left[0] < 0:  # a few bytes of pickle can put one dictionary into itself ten times, and that ten times
            raise FormatError(f"{prefix[:60]}...: more than {_MAX_ENTRIES:,} entries are no checkpoint")
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from named_tensors(value, f"{prefix}{key}.", depth + 1, left)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as handle:
        digest = hashlib.sha256()
        while block := handle.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def as_path(name: str, value: Any) -> Path:
    """A path from text. Raises ConfigError for what no file can be called, and for names that are not UTF-8, which
    safetensors writes to and does not read from."""
    try:
        path = Path(value)
        if b"\0" in str(path).encode() or value == "":
            raise ValueError
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} is {shown(value)}; give a path, in UTF-8") from error
    return path


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps other processes and threads that replace files of the folder waiting; leaves no file behind.

    Nothing is kept where the system has no such locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it. Raises StorageError where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"the folder {folder} cannot be made ({error.strerror}); choose another place") from error


def check_folder(folder: Path) -> None:
    """Raises StorageError unless files can be written into the folder, or into the nearest above it that is there;
    leaves nothing behind. Asked before hours of work whose result goes there."""
    as_path("the folder", folder)
    # A link to nowhere is there too, and nothing can be written into it.
    above = next((one for one in (folder, *folder.absolute().parents) if os.path.lexists(one)), Path("/"))
    try:
        with tempfile.TemporaryDirectory(dir=above):
            pass
    except OSError as error:
        raise StorageError(f"{folder} cannot be written to ({error.strerror}); choose another place") from error


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes beside `path` and renames: a killed run leaves the old file or the new one, never half of one.

    Raises:
        StorageError: the disk is full, or the folder cannot be written; what was there before is untouched.
    """
    write_together(path.parent, {path.name: write})


def write_together(folder: Path, files: Mapping[str, Callable[[Path], Any]]) -> None:
    """As `write_atomically` for files that belong together: none is replaced before all are written.

    Raises:
        StorageError: as there; every old file is still there.
    """
    temporary: dict[str, Path] = {}
    name = ""
    try:
        for name, write in files.items():
            handle, made = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
            os.close(handle)
            temporary[name] = Path(made)
            write(temporary[name])
            temporary[name].chmod(0o644)
        with alone_in(folder):
            for name, path in temporary.items():
                os.replace(path, folder / name)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise StorageError(
            f"{folder / name} cannot be written ({reason}); what was there before is untouched"
        ) from error
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
