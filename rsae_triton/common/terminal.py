"""Text on a terminal, or where there is none: what strangers put into names is shown and not obeyed."""

from __future__ import annotations

import os
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


def printable(text: Any) -> str:
    """`text` with control characters, characters that change the direction of writing, and halves of characters written
    out, as repr does: an escape sequence in a stranger's file moves no cursor."""
    return "".join(one if _harmless(one) else ascii(one)[1:-1] for one in str(text))


def _harmless(one: str) -> bool:
    return one in "\n\t" or unicodedata.category(one) not in ("Cc", "Cf", "Cs", "Co")


def plain(text: Any) -> str:
    """`text` for a rich console or table as it is, brackets too."""
    from rich.markup import escape

    return escape(printable(text))


class Patient:
    """A stream whose reader may go away (head, a pager, a closed terminal) without ending what is being computed.

    What cannot be written is dropped from then on.
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
        with suppress(OSError, ValueError):  # what Python flushes at exit goes nowhere, and complains to nobody
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def steady_output() -> Iterator[None]:
    """While a command runs: output whose reader goes away, or whose encoding lacks a character, ends nothing; warnings
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
