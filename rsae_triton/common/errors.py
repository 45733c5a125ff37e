"""The errors a user can meet. Each message says what was wrong and what to do about it.

The command line prints the message of any `RsaeError` on one line and exits with 2, and so that of the system's own
errors (disk, permissions, memory); anything else is a bug and shows its traceback.
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
    """A value is NaN, infinite or out of the range where the result would mean anything."""


class SourceError(RsaeError):
    """Something outside could not be had: a model, a text, a download, an optional library."""


class ResourceError(RsaeError, OSError):
    """The machine does not have what it takes: memory, or (`StorageError`) room and permission to write."""


class ConvergenceError(NumericsError):
    """A solver stopped before its certificate held; the message carries the best bracket it had."""


class StorageError(ResourceError):
    """A file could not be written: the disk is full, or refuses."""


class Stopped(RsaeError):  # noqa: N818  (nothing went wrong)
    """A run was asked to stop, and saved itself; the message says how to go on."""


def first_line(error: BaseException, most: int = 160) -> str:
    """What another library's error says, short enough for a line of ours; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]
