"""Makes batches in the background while earlier ones are in use."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def prefetched(make: Callable[[], Iterator[T]], depth: int) -> Iterator[T]:
    """Yields the items of `make()`, which a thread makes at most `depth` items ahead; its errors are raised here.

    The thread ends with the iterator: when it is closed, exhausted or collected.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    ended = threading.Event()

    def put(kind: str, value: Any = None) -> bool:
        while not ended.is_set():
            try:
                ready.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in make():
                if not put("item", item):
                    return
            put("end")
        except BaseException as error:
            put("error", error)

    worker = threading.Thread(target=work, name="rsae-prefetch", daemon=True)
    worker.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        ended.set()
        worker.join()
