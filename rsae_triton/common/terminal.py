"""Output to a terminal or a pipe: text in names from others is shown and cannot control the terminal."""

from __future__ import annotations

import os
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


def printable(text: Any) -> str:
    """Writes out, as repr does, control characters, characters that change the direction of writing, and halves of
    characters in `text`, so that an escape sequence in a foreign file cannot move the cursor."""
    return "".join(one if _harmless(one) else ascii(one)[1:-1] for one in str(text))


def _harmless(one: str) -> bool:
    return one in "\n\t" or unicodedata.category(one) not in ("Cc", "Cf", "Cs", "Co")


def plain(text: Any) -> str:
    """Escapes `text` for a rich console or table, so that brackets are shown as they are."""
    from rich.markup import escape

    return escape(printable(text))


class Patient:
    """A stream whose reader may go away (head, a pager, a closed terminal) without ending the computation.

    What cannot be written from then on is dropped.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._gone = stream, False

    def write(self, text: str) -> int:
        try:
            return len(text) if self._gone else self._stream.write(text)
        except (BrokenPipeError, ValueError) as error:  # ValueError: the stream was closed
            self._leave(error)
            return len(text)

    def flush(self) -> None:
        try:
            if not self._gone:
                self._stream.flush()
        except (BrokenPipeError, ValueError) as error:
            self._leave(error)

    def _leave(self, error: Exception) -> None:
        if isinstance(error, ValueError) and not self._stream.closed:
            raise error
        self._gone = True
        with suppress(OSError, ValueError):  # so that the flush at exit neither fails nor complains
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def steady_output() -> Iterator[None]:
    """While a command runs, a reader that goes away or an encoding without some character does not end it; and warnings
    are `printable`."""
    before, form = (sys.stdout, sys.stderr), warnings.formatwarning
    for stream in before:
        if hasattr(stream, "reconfigure"):
            with suppress(ValueError, OSError):
                stream.reconfigure(errors="backslashreplace")
    if sys.stdout is not None:
        sys.stdout = Patient(sys.stdout)
    if sys.stderr is not None:
        sys.stderr = Patient(sys.stderr)
    warnings.formatwarning = lambda *args, **options: printable(form(*args, **options))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, Patient):
                stream.flush()
        sys.stdout, sys.stderr = before
        warnings.formatwarning = form
