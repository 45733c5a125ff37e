"""Settings of the process for a run: notice of SIGTERM, determinism, precision of products, a folder of its own."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from rsae_triton.common.errors import ConfigError, StorageError, first_line


@contextmanager
def stop_signal(wanted: bool = True) -> Iterator[list[bool]]:
    """Yields a list that is not empty once a SIGTERM has arrived; works in the main thread only."""
    came: list[bool] = []
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield came
        return

    def remember(*_: Any) -> None:
        came.append(True)

    before = signal.signal(signal.SIGTERM, remember)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Allows only algorithms that give the same bits every time; restores the previous state afterwards.

    Raises:
        ConfigError: cuBLAS is already in use, with a workspace that does not allow it.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    memory = torch.utils.deterministic
    # The switches belong to the process: with several threads, the first one saves their state and the last one
    # restores it.
    with _LOCK:
        if not _INSIDE:
            _FOUND[:] = [
                torch.are_deterministic_algorithms_enabled(),
                torch.backends.cudnn.benchmark,
                memory.fill_uninitialized_memory,  # type: ignore[attr-defined]
            ]
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
            memory.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        _INSIDE.append(True)
    try:
        if torch.cuda.is_initialized():
            _check_cublas()
        yield
    finally:
        with _LOCK:
            _INSIDE.pop()
            if not _INSIDE:
                torch.use_deterministic_algorithms(_FOUND[0])
                torch.backends.cudnn.benchmark = _FOUND[1]
                memory.fill_uninitialized_memory = _FOUND[2]  # type: ignore[attr-defined]


_LOCK = threading.Lock()
_INSIDE: list[bool] = []
_FOUND: list[bool] = []


def _check_cublas() -> None:
    """Checks cuBLAS' variable: torch reads it only at the process's first product, and refuses all later ones if it is
    wrong."""
    one = torch.ones(1, 1, device="cuda")
    try:
        one @ one
    except RuntimeError as error:
        raise ConfigError(
            f"deterministic=True came after products without it ({first_line(error)}); set the environment variable "
            "CUBLAS_WORKSPACE_CONFIG=:4096:8 before Python starts"
        ) from error


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Within the context, float32 products are as after torch.set_float32_matmul_precision(name)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Creates the folder and locks it, because two runs in one folder would delete each other's checkpoints.

    Raises:
        ConfigError: another process has locked it.
        StorageError: it cannot be created.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"the folder {out} cannot be made ({error}); choose another") from error
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, Timeout):
            raise ConfigError(f"another process is training into {out}; choose another folder, or stop it") from error
        raise StorageError(f"{out / '.lock'} cannot be locked ({first_line(error)}); choose another folder") from error
    try:
        yield
    finally:
        with suppress(OSError):  # otherwise it is released when the process ends
            lock.release()
