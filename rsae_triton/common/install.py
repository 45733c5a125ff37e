"""Says how to install an optional part, wherever this package came from."""

from __future__ import annotations

import re
from importlib import metadata


def advice(extra: str) -> str:
    """Returns the pip command for an extra ("host", "probe", ...), with the packages' own names.

    So the command works even if no index has this package.
    """
    try:
        wanted = metadata.requires("rsae-triton") or []
    except metadata.PackageNotFoundError:
        wanted = []
    chosen = [one.split(";")[0].strip() for one in wanted if re.search(rf"extra\s*==\s*[\"']{extra}[\"']", one)]
    return "pip install " + " ".join(f"'{one}'" for one in chosen or [f"rsae-triton[{extra}]"])
