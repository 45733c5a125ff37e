"""Is the Hugging Face hub there? Asked before its client is, which retries an unreachable host for 23 seconds."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

from rsae_triton.errors import SourceError

_TIMEOUT_S = 5


def hub_reachable() -> bool:
    """Whether a connection to the hub's host opens (assumed where a proxy does the connecting)."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        with socket.create_connection((endpoint.hostname or "", port), timeout=_TIMEOUT_S):
            return True
    except OSError:
        return False


def require_hub(what: str) -> None:
    """Raise SourceError, beginning with `what`, when the hub cannot be reached."""
    if not hub_reachable():
        raise SourceError(
            f"{what} cannot be fetched: the Hugging Face hub is unreachable; "
            "check the name and the connection, or give a local path"
        )
