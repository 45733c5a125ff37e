"""Looks SAEs up in SAELens' registry of pretrained SAEs, as it stands in the installed package.

SAELens itself is not imported: its registry is a file of 44,000 lines, from which one release is read.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rsae_triton.common.errors import ConfigError, FormatError, SourceError

_RELEASE = re.compile(r"^([^\s#:][^:]*):\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Entry:
    """One SAE of a release.

    repo, path: its place on the hub. layout: SAELens' name for its file layout ("sae_lens" is its own format).
    scale: the factor on the activations, where the registry gives one. overrides: configuration values to replace.
    """

    release: str
    sae_id: str
    repo: str
    path: str
    model: str
    layout: str
    scale: float | None = None
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> str:
        return f"{self.repo}/{self.path}" if self.path not in ("", ".") else self.repo


def find(source: str) -> Entry | None:
    """Returns the entry that "release/sae_id" names, or None if the text does not begin with a known release.

    Raises:
        ConfigError: the release has no such SAE.
    """
    release, _, sae_id = source.rstrip("/").partition("/")
    if not sae_id or registry_file() is None or release not in releases():
        return None
    return entry(release, sae_id)


def entry(release: str, sae_id: str) -> Entry:
    """Returns one SAE of the registry.

    Raises:
        SourceError: SAELens is not installed.
        ConfigError: no such release, or no such SAE in it; the message suggests similar names.
    """
    if registry_file() is None:
        raise SourceError(
            f"release={release!r} is looked up in SAELens' registry; install it with: pip install sae-lens, or give "
            "the hub id of the repository and the folder in it"
        )
    if release not in releases():
        raise ConfigError(f"SAELens' registry has no release {release!r}{_near(release, releases())}")
    value = _parsed(release)
    held = {str(one["id"]): one for one in value["saes"]}
    if sae_id not in held:
        raise ConfigError(
            f"the release {release} has no SAE {sae_id!r}{_near(sae_id, tuple(held))} (it has {len(held)})"
        )
    return _entry(release, value, held[sae_id])


def entries() -> list[Entry]:
    """Returns every SAE of the installed registry. Raises SourceError if SAELens is not installed."""
    path = registry_file()
    if path is None:
        raise SourceError("SAELens' registry is read from the installed package; install it with: pip install sae-lens")
    parsed = _yaml(path.read_text(encoding="utf-8"), path)
    return [_entry(release, value, one) for release, value in parsed.items() for one in value["saes"]]


@lru_cache(maxsize=1)
def registry_file() -> Path | None:
    """The registry file of the installed SAELens, or None."""
    spec = find_spec("sae_lens")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "pretrained_saes.yaml"
        if path.is_file():
            return path
    return None


@lru_cache(maxsize=1)
def releases() -> tuple[str, ...]:
    """The names of all releases in the registry."""
    path = registry_file()
    return tuple(_RELEASE.findall(path.read_text(encoding="utf-8"))) if path else ()


def _parsed(release: str) -> dict[str, Any]:
    path = registry_file()
    assert path is not None
    text = path.read_text(encoding="utf-8")
    start = re.search(rf"^{re.escape(release)}:\s*$", text, re.MULTILINE)
    assert start is not None
    end = _RELEASE.search(text, start.end())
    value: dict[str, Any] = _yaml(text[start.start() : end.start() if end else len(text)], path)[release]
    return value


def _yaml(text: str, path: Path) -> dict[str, Any]:
    try:
        import yaml  # type: ignore[import-untyped]  # SAELens needs it
    except ImportError as error:
        raise SourceError(f"{path} is read with PyYAML; install it with: pip install pyyaml") from error
    try:
        found = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise FormatError(f"{path} is no registry of SAELens 6; install sae-lens again") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path} is no registry of SAELens 6; install sae-lens again")
    return found


def _entry(release: str, value: dict[str, Any], one: dict[str, Any]) -> Entry:
    return Entry(
        release,
        str(one["id"]),
        str(value["repo_id"]),
        str(one["path"]),
        str(value.get("model") or ""),
        str(value.get("conversion_func") or "sae_lens"),
        one.get("norm_scaling_factor"),
        dict(value.get("config_overrides") or {}),
    )


def _near(name: str, names: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else f"; it has {', '.join(names[:3])}, ..."
