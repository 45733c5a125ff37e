"""Reads files from unknown sources safely, and writes files completely or not at all.

Every reader takes memory in proportion to the file on disk, whatever the file claims about itself. For a truncated,
foreign or dangerous file it raises a `FormatError` that names the file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from rsae_triton.common.checks import shown
from rsae_triton.common.errors import ConfigError, FormatError, RsaeError, StorageError, first_line

_MAX_TEXT = 16 << 20


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file of at most 16 MiB."""
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
    """Reads the tensors of a safetensors file, mapped from it."""
    return read_with_metadata(path)[0]


def read_with_metadata(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors of a safetensors file, mapped from it, and the text in its header; both from the same open
    file."""
    if not path.is_file():
        raise FormatError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            tensors, metadata = file.get_tensors(), file.metadata() or {}
    except Exception as error:  # SafetensorError, or OSError from the mapping
        raise FormatError(f"{path} is truncated or not a safetensors file ({error}); fetch it again") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype.itemsize < 2:
            raise FormatError(
                f"{shown(name)} in {path} is {tensor.dtype}, which means nothing without its scales; save the weights "
                "as float32, bfloat16 or float16"
            )
    return tensors, metadata


def check_inside(folder: Path, name: str) -> None:
    """Raises FormatError if `name` in `folder` is a link to another place: the author of a folder must not choose what
    is read on this machine. The hub's cache, which links its snapshots to blobs beside them, is allowed."""
    path = folder / name
    if not path.is_symlink():
        return
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    blobs = next((one.parent / "blobs" for one in (home, *home.parents) if one.name == "snapshots"), None)
    if not target.is_relative_to(home) and not (blobs is not None and target.is_relative_to(blobs)):
        raise FormatError(f"{path} is a link to {target}, outside its folder; copy the file there to read it")


def write_text(path: Path, text: str) -> None:
    """Writes a text file as `write_atomically` does. Raises ConfigError for text that UTF-8 cannot hold."""
    data = as_utf8(path.name, text)
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def as_utf8(name: str, text: str) -> bytes:
    """Encodes text. Raises ConfigError for half a character (a lone surrogate), which JSON can hold but a file
    cannot."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 20) : error.end + 20]
        raise ConfigError(f"{name} would hold half a character, in {shown(near)}; nothing was written") from error


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as handle:
        digest = hashlib.sha256()
        while block := handle.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def as_path(name: str, value: Any) -> Path:
    """Returns a path from text. Raises ConfigError for impossible file names, and for names that are not UTF-8, since
    safetensors can write to these but not read from them."""
    try:
        path = Path(value)
        if (
            b"\0" in str(path).encode()
            or value == ""
            or max((len(one.encode()) for one in path.parts), default=0) > 255
        ):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} is {shown(value)}; give a path, in UTF-8 and of names up to 255 bytes") from error
    return path


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Within the context, other processes and threads that replace files of the folder wait. Leaves no file behind.

    Has no effect if the system has no such locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder that can be written but not listed
        yield
        return
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Creates a folder and its parents. Raises StorageError if that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"the folder {folder} cannot be made ({error.strerror}); choose another place") from error


def check_ordinary(path: Path) -> None:
    """Raises StorageError for a device, a pipe or a socket, which a renamed file would replace: where root writes to
    /dev/null, the machine would have none any more."""
    try:
        mode = path.stat().st_mode
    except OSError:  # not there, or a link to nowhere
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise StorageError(f"{path} is a device or a pipe and no ordinary file; choose another name")


def check_folder(folder: Path) -> None:
    """Raises StorageError unless files can be written into the folder, or into its nearest existing parent. Leaves
    nothing behind. To be called before hours of work whose result goes there."""
    as_path("the folder", folder)
    try:
        with scratch(_nearest(folder)):
            pass
    except OSError as error:
        raise StorageError(f"{folder} cannot be written to ({error.strerror}); choose another place") from error


def check_room(folder: Path, need: int, what: str) -> None:
    """Raises StorageError unless `need` bytes are free in the folder (which need not exist yet); to be called before
    `what` is made."""
    try:
        free = shutil.disk_usage(_nearest(folder)).free
    except OSError:  # a file system that does not report its free space
        return
    if free < need:
        raise StorageError(
            f"{what} takes {need:,} bytes, and {folder} has {free:,} free; make room, or choose another place"
        )


def _nearest(folder: Path) -> Path:
    """The folder, or its nearest existing parent; a link to nowhere counts as existing."""
    return next((one for one in (folder, *folder.absolute().parents) if os.path.lexists(one)), Path("/"))


FIGURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp", ".eps", ".ps", ".tif", ".tiff")
"""File name suffixes of pictures that matplotlib can write."""


def check_figure(name: str, path: Path) -> None:
    """Raises ConfigError or StorageError unless a picture can be written to `path`; to be called before it is made."""
    if path.suffix.lower() not in FIGURES:
        ends = f"ends in {path.suffix}" if path.suffix else "has no suffix"
        raise ConfigError(f"{name} is {shown(str(path))}, which {ends}; give one of the suffixes {', '.join(FIGURES)}")
    if path.is_dir():
        raise ConfigError(f"{name} is the folder {path}; give a file in it")
    check_folder(path.parent)


def read_finished(path: Path, *keys: str) -> dict[str, Any] | None:
    """Reads the result of a finished part of a study; None if there is none, or (with a warning) if it is
    incomplete."""
    if not path.is_file():
        return None
    try:
        found = read_json(path)
    except FormatError as error:
        warnings.warn(f"{error}; it is computed again", stacklevel=2)
        return None
    missing = [key for key in keys if key not in found]
    if missing:
        warnings.warn(f"{path} lacks {', '.join(missing)}; it is computed again", stacklevel=2)
        return None
    return found


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes to a temporary file and renames it: a killed run leaves the old file or the new one, never half of one.

    Raises:
        StorageError: the disk is full, or the folder cannot be written; the old file is unchanged.
    """
    write_together(path.parent, {path.name: write})


def write_together(folder: Path, files: Mapping[str, Callable[[Path], Any]]) -> None:
    """`write_atomically` for files that belong together: none is replaced before all are written and on the disk.

    They are replaced in the given order; if the process is killed in between, the first of them are new.

    Raises:
        StorageError: see `write_atomically`; the message says which files are new, if any are.
    """
    done: list[str] = []
    name = next(iter(files))
    for name in files:
        check_ordinary(folder / name)
    try:
        with scratch(folder) as place:
            for name, write in files.items():
                path = place / name
                path.touch()
                mode = path.stat().st_mode  # the mode by the user's umask; safetensors creates its files with 0600
                write(path)
                path.chmod(mode)
                to_disk(path)
            with alone_in(folder):
                for name in files:
                    os.replace(place / name, folder / name)
                    done.append(name)
            to_disk(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        before = "what was there before is untouched"
        if done:
            before = f"{', '.join(done)} in {folder} {'is' if len(done) == 1 else 'are'} the new one already"
        raise StorageError(f"{folder / name} cannot be written ({reason}); {before}") from error


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Yields a new folder to fill. It gets the name `final` if the block succeeds, and is removed otherwise.

    Raises:
        ConfigError: `final` exists already, or another process was first.
        StorageError: the files cannot be written.
    """
    taken = f"{final} is there already; choose another folder"
    if os.path.lexists(final):
        raise ConfigError(taken)
    make_folder(final.parent)
    with refusals(final), scratch(final.parent) as place:
        partial = place / final.name
        partial.mkdir()
        yield partial
        try:
            publish(partial, final)
        except OSError as error:
            if os.path.lexists(final):
                raise ConfigError(taken) from error
            raise


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Turns refusals of the system while `path` is written into a StorageError that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, RsaeError):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise StorageError(f"{path} cannot be written ({reason}); choose another place, or make room") from error


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Yields a new folder within `folder`, which is locked while in use and removed afterwards.

    Folders that killed processes left, which are not locked, are removed first.
    """
    for left in folder.glob(".rsae-*.tmp"):
        with suppress(OSError):
            _remove_unheld(left)
    while True:
        made = folder / f".rsae-{secrets.token_hex(4)}.tmp"
        os.mkdir(made)
        held = _hold(made, wait=True)
        if made.is_dir():
            break
        _release(held)  # another process cleaned up in between
    try:
        yield made
    finally:
        with suppress(OSError):
            shutil.rmtree(made)
        _release(held)


def _remove_unheld(path: Path) -> None:
    held = _hold(path, wait=False)
    if held is not None:
        try:
            shutil.rmtree(path)
        finally:
            _release(held)


def _hold(path: Path, *, wait: bool) -> int | None:
    """Locks a file or folder for this process and thread; returns None if another holds it or the system has no
    locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    handle = None
    try:
        handle = os.open(path, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        _release(handle)
        return None
    return handle


def _release(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def to_disk(path: Path) -> None:
    """Forces a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # a file system that cannot do it
            raise
    finally:
        os.close(handle)


def publish(partial: Path, final: Path) -> None:
    """Gives a filled folder its name: forces it to the disk and sets the access rights of its files by the umask."""
    for left in partial.glob(".rsae-*.tmp"):  # that could not be removed after use
        shutil.rmtree(left, ignore_errors=True)
    probe = partial / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in partial.rglob("*"):
        if path.is_file():
            path.chmod(mode)
    for path in (*partial.rglob("*"), partial):
        to_disk(path)
    os.rename(partial, final)
    to_disk(final.parent)
