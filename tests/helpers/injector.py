"""A process that is killed, or whose call fails, at the n-th thing it asks of the file system below one folder.

Python tells an audit hook of every call that opens, makes, renames or removes; forcing to disk and the writing of
safetensors, which it does not tell of, are counted by wrappers. Hooks cannot be taken off: each run is a forked child.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate",
          "os.scandir", "os.listdir", "shutil.rmtree", "fcntl.flock"}  # fmt: skip
KINDS = ("kill", "ENOSPC", "EIO")


@dataclass
class Outcome:
    """calls: how many there were. said: "ok", "killed", or the type and text of what was raised. ours: an RsaeError."""

    calls: int
    said: str
    ours: bool


def run(action: Callable[[], Any], folder: Path, at: int = 0, kind: str = "kill") -> Outcome:
    """`action` in a child, where call number `at` below `folder` kills it or fails; 0: none does."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        code = 1
        try:
            torch.set_num_threads(1)
            signal.alarm(120)
            calls = _arm(str(folder), at, kind)
            try:
                action()
                said, ours = "ok", True
            except BaseException as error:
                from rsae_triton.common.errors import RsaeError

                said, ours = f"{type(error).__name__}: {error}", isinstance(error, RsaeError)
                if not ours:
                    said += f" ({traceback.format_exc()})"
            calls[1] = False
            os.write(writer, f"{calls[0]}\n{int(ours)}\n{said}".encode(errors="replace")[:60_000])
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        text = stream.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        killed = os.WTERMSIG(status)
        return Outcome(at, "killed" if killed == signal.SIGKILL else f"signal {killed}", killed == signal.SIGKILL)
    count, ours, said = text.split("\n", 2)
    return Outcome(int(count), said, ours == "1")


def _arm(folder: str, at: int, kind: str) -> list[Any]:
    """[calls so far, whether they are counted]."""
    state: list[Any] = [0, True]

    def call(inside: Callable[[], Any] | None = None, path: Any = None) -> None:
        """Counts one; the one that is asked for does half of what it has to, and fails."""
        if not state[1]:
            return
        state[0] += 1
        if state[0] != at:
            return
        state[1] = False
        if inside is not None:
            inside()
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        number = getattr(errno, kind)
        raise OSError(number, os.strerror(number), path)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or not state[1]:
            return
        paths = [str(one) for one in arguments if _is_path(one) and str(one).startswith(folder)]
        if event == "fcntl.flock" or paths:
            call(path=next(iter(paths), None))

    fsync = os.fsync

    def forced(handle: Any) -> None:
        call()
        fsync(handle)

    import safetensors.torch as library

    serialize = library.serialize_file

    def written(tensors: Any, path: Any, **options: Any) -> None:
        def half() -> None:
            serialize(tensors, path, **options)
            os.truncate(path, os.path.getsize(path) // 2)

        call(half)
        serialize(tensors, path, **options)

    os.fsync, library.serialize_file = forced, written
    sys.addaudithook(hook)
    return state


def _is_path(one: Any) -> bool:
    return isinstance(one, str | bytes | os.PathLike)
