"""Loops over entries in C++ (`entries.cpp`, `search.cpp`), compiled on this machine if there is a compiler.

The compiler is optional: without one, or with RSAE_CPU_ENGINE=tiled, PyTorch's own operations do the same, some two to
four times slower. Compiled code is kept in the cache folder, by source, compiler and processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsae_triton.common.errors import StorageError
from rsae_triton.common.files import make_folder, write_atomically

SOURCES = tuple(Path(__file__).with_name(name) for name in ("entries.cpp", "search.cpp"))
HEADER = Path(__file__).with_name("entries.h")
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_NATIVE = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())


def library() -> ctypes.CDLL | None:
    """The compiled loops; None if there is no compiler or it is not wanted."""
    if os.environ.get("RSAE_CPU_ENGINE") == "tiled":
        return None
    return _library(os.environ.get("CXX") or "g++")


@functools.cache
def _library(compiler: str) -> ctypes.CDLL | None:
    program = shutil.which(compiler)
    if program is None:
        return None
    try:
        loaded = _built(program)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        warnings.warn(
            f"{compiler} cannot build the sparse loops ({reason[0] if reason else error}); PyTorch's operations do "
            "the same, more slowly", stacklevel=3,
        )  # fmt: skip
        return None
    for name in ("find_float", "find_bfloat16", "screen"):
        getattr(loaded, name).restype = ctypes.c_int64
    return loaded


def _built(program: str) -> ctypes.CDLL:
    """Returns the library, after building it if necessary."""
    source = b"\0".join(one.read_bytes() for one in (HEADER, *SOURCES))
    version = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60).stdout
    key = hashlib.sha256(b"\0".join([source, version.encode(), _processor().encode(), repr(_FLAGS).encode()]))
    cache = os.environ.get("RSAE_CACHE")
    path = (Path(cache).expanduser() if cache else _cache()) / "native" / f"entries-{key.hexdigest()[:24]}.so"
    if not path.exists():
        try:
            make_folder(path.parent)
            write_atomically(path, lambda temporary: _compile(program, temporary))
        except StorageError:  # the cache is read-only: build for this process alone
            with tempfile.TemporaryDirectory(prefix="rsae-native-") as folder:
                _compile(program, Path(folder, path.name))
                return ctypes.CDLL(str(Path(folder, path.name)))
    return ctypes.CDLL(str(path))


def _compile(program: str, path: Path) -> None:
    for native in _NATIVE:
        command = [program, *_FLAGS, *native, *map(str, SOURCES), "-o", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode == 0:
            return
    raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)


def _cache() -> Path:
    try:
        from platformdirs import user_cache_dir
    except ImportError:  # on a machine without the dependencies (tools/gpu_check.py)
        return Path("~/.cache/rsae-triton").expanduser()
    return Path(user_cache_dir("rsae-triton"))


def _processor() -> str:
    """Identifies the processor, as far as -march=native depends on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.version()}"
    kinds = ("flags", "Features", "model name", "cpu family", "model\t")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))


def address(tensor: Tensor) -> ctypes.c_void_p:
    """A tensor's address as an argument for the loops."""
    return ctypes.c_void_p(tensor.data_ptr())


def integer(number: int) -> ctypes.c_int64:
    """A number as an argument for the loops."""
    return ctypes.c_int64(number)


def usable(*tensors: Tensor) -> bool:
    """Whether the loops can read these matrices: contiguous float32 rows on the CPU."""
    return library() is not None and all(
        one.dtype == torch.float32 and one.device.type == "cpu" and one.is_contiguous() for one in tensors
    )


def split(length: int, work: Callable[[int, int], Any], least: int) -> list[Any]:
    """Runs work(from, to) in parts of at least `least`, on as many threads as PyTorch has."""
    threads = max(1, min(torch.get_num_threads(), length // least))
    return each(threads, lambda k: work(length * k // threads, length * (k + 1) // threads))


def each(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Returns [work(0), ..., work(count - 1)], each run in its own thread; ctypes releases the GIL."""
    return [work(0)] if count == 1 else list(_pool(os.getpid(), count).map(work, range(count)))


@functools.lru_cache(maxsize=4)
def _pool(process: int, count: int) -> ThreadPoolExecutor:
    """Threads that wait for work; a forked process needs its own."""
    return ThreadPoolExecutor(count, thread_name_prefix="rsae-native")
