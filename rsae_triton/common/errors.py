"""All errors that a user can meet. Each message says what was wrong and what to do about it.

The command line prints the message of any `RsaeError` on one line and exits with 2. It does the same for errors of the
system (disk, permissions, memory). Anything else is a bug and shows its traceback.
"""


class RsaeError(Exception):
    """Base of every error raised on purpose by rsae_triton."""


class ShapeError(RsaeError, ValueError):
    """A tensor or a size does not fit the others."""


class ConfigError(RsaeError, ValueError):
    """An option has a value that cannot be used, alone or with the others."""


class FormatError(RsaeError, ValueError):
    """A file or folder is missing, foreign, truncated or corrupt."""


class NumericsError(RsaeError, ValueError):
    """A value is NaN, infinite, or outside the range in which the result has a meaning."""


class SourceError(RsaeError):
    """Something external is unavailable: a model, a text, a download, an optional library."""


class ResourceError(RsaeError, OSError):
    """The machine lacks a resource: memory, or (`StorageError`) space or permission to write."""


class ConvergenceError(NumericsError):
    """A solver stopped before its result was certified; the message contains the best bounds it had."""


class StorageError(ResourceError):
    """A file could not be written: the disk is full or refuses."""


class Stopped(RsaeError):  # noqa: N818  (nothing went wrong)
    """A run was asked to stop and has saved itself; the message says how to resume."""


def first_line(error: BaseException, most: int = 160) -> str:
    """The message of another library's error, shortened for a line of ours; its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]
