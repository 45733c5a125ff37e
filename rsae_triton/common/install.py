"""What to install for an optional part, in a line that works wherever this package came from."""

from __future__ import annotations

import re
from importlib import metadata


def advice(extra: str) -> str:
    """The pip command for the packages of an extra, by their own names: no index need know this package.

    extra: "host", "probe", ...
    """
    try:
        wanted = metadata.requires("rsae-triton") or []
    except metadata.PackageNotFoundError:
        wanted = []
    chosen = [one.split(";")[0].strip() for one in wanted if re.search(rf"extra\s*==\s*[\"']{extra}[\"']", one)]
    return "pip install " + " ".join(f"'{one}'" for one in chosen or [f"rsae-triton[{extra}]"])
