"""The Hugging Face hub: checks whether it can be reached, fetches files of a repository, and uploads a folder.

Its client is only called after a connection has been opened, because it retries an unreachable host for 23 seconds.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from rsae_triton.common.errors import ConfigError, FormatError, SourceError, first_line

_TIMEOUT_S = 5
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w .,:=@+-]+)*")
# Path("hf://a/b") has one slash less, and commands pass addresses as paths.
_URL = re.compile(r"https?:/{1,2}([\w.:-]+)/(.+)")
_DATA = (".json", ".safetensors", ".npz", ".pt", ".pth")
_NEAR = (".json", "config.yaml")
_PICKLED = (".pt", ".pth")


def hub_reachable() -> bool:
    """Whether a connection to the hub's host can be opened (assumed if a proxy makes the connections)."""
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
    """Raises SourceError, beginning with `what`, if the hub cannot be reached."""
    if not hub_reachable():
        raise SourceError(
            f"{what} cannot be fetched: the Hugging Face hub is unreachable; "
            "check the name and the connection, or give a local path"
        )


def local_path(source: str | Path, revision: str | None = None) -> Path:
    """Returns a local file or folder as it is; fetches a hub id into the hub's cache.

    Args:
        source: a path, or a text that `address` understands. What exists locally is never looked up on the hub.
        revision: branch, tag or commit of a hub id.

    Raises:
        FormatError: neither a path nor a hub id, or a repository of several SAEs without a choice among them.
        SourceError: the hub, the repository or the revision cannot be reached.
        ConfigError: two revisions are given.
    """
    if not isinstance(source, str | Path) or not str(source):
        raise FormatError(f"source is {source!r}; give a folder, a file, or a hub id such as owner/repository/folder")
    path, name = Path(os.path.expanduser(source)), str(source)  # Path.expanduser raises if there is no such user
    try:
        if path.exists():
            return path
    except OSError as error:  # an impossible file name
        raise FormatError(f"{name[:60]}... cannot be a path ({error.strerror}); check it") from error
    there = address(name, revision)
    if there is None:
        raise FormatError(f"{name} does not exist; give a folder, a file, or a hub id such as owner/repository/folder")
    return _fetch(there.repo, there.inside, there.revision)


class Address(NamedTuple):
    """A place on the hub: repository "owner/name", the folder or file in it ("" for all), and a revision."""

    repo: str
    inside: str
    revision: str | None

    @property
    def name(self) -> str:
        """The usual notation, without the revision."""
        return f"{self.repo}/{self.inside}" if self.inside else self.repo


def address(name: str, revision: str | None = None) -> Address | None:
    """Returns the place on the hub that a text names; None if it names none.

    Understood are "owner/repository/folder", "owner/repository@revision/folder", "hf://" before either, and addresses
    of the hub's pages (https://huggingface.co/owner/repository/tree/main/folder), with or without a slash at the end.

    Raises:
        FormatError: an address of another host, or of something other than a model.
        ConfigError: two revisions are given.
    """
    given, name = name, name.strip().split("#")[0]
    said = None
    if found := re.fullmatch(r"hf:/{1,2}(.+)", name):
        name, _, query = found[1].partition("?")
        said = next((part[9:] for part in query.split("&") if part.startswith("revision=")), None)
        name = name.removeprefix("models/")
    elif found := _URL.fullmatch(name.split("?")[0]):
        hosts = {"huggingface.co", "www.huggingface.co", "hf.co"}
        if found[1] not in hosts | {urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc}:
            raise FormatError(f"{given} is an address at {found[1]}; only those of the Hugging Face hub are read")
        name = unquote(found[2])
        if paged := re.fullmatch(r"([^/]+/[^/]+)/(?:tree|blob|resolve)/([^/]+)(/.*)?", name.rstrip("/")):
            name, said = paged[1] + (paged[3] or ""), paged[2]
    name = name.rstrip("/")
    if name.startswith((".", "/", "~")) or ".." in name or name.startswith(("datasets/", "spaces/")):
        if found:
            raise FormatError(f"{given} is no address of a model on the hub; give owner/repository/folder")
        return None
    owner, _, rest = name.partition("/")
    repository, _, inside = rest.partition("/")
    repository, _, at = repository.partition("@")
    if not _HUB_ID.fullmatch("/".join(part for part in (owner, repository, inside) if part)) or not repository:
        return None
    revisions = {one for one in (said, at or None, revision) if one}
    if len(revisions) > 1:
        raise ConfigError(f"{given} names the revision {said or at}, and revision={revision!r} was given; give one")
    return Address(f"{owner}/{repository}", inside, next(iter(revisions), None))


def _client(what: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise SourceError(f"{what} needs huggingface_hub; install it with: pip install huggingface_hub") from error
    return huggingface_hub


def _fetch(repo: str, inside: str, revision: str | None) -> Path:
    hub = _client(f"{repo} is no local path, and a hub id")
    if not hub_reachable():
        try:
            folder = hub.snapshot_download(repo, revision=revision, local_files_only=True)
        except Exception as error:  # of various types, depending on the version; all mean that it is not cached
            raise SourceError(
                f"no local path named {repo!r}, and as a hub id it cannot be fetched: the Hugging Face hub is "
                "unreachable and its cache does not hold it; check the name and the connection"
            ) from error
        cached = Path(folder) / inside
        if not cached.exists():
            raise SourceError(f"the hub's cache holds {repo}, but not {inside!r} in it, and the hub is unreachable")
        return cached
    try:
        names = hub.HfApi().list_repo_files(repo, revision=revision)
        files = _wanted(repo, names, inside)
        for name in files:
            fetched = Path(hub.hf_hub_download(repo, name, revision=revision))
            root = fetched.parents[len(PurePosixPath(name).parts) - 1]
    except (FormatError, SourceError):
        raise
    except Exception as error:
        reason = first_line(error)
        at = f" at revision {revision!r}" if revision else ""
        raise SourceError(f"cannot fetch {repo}{at} from the Hugging Face hub ({reason}); check the name") from error
    return root / inside


def _wanted(repo: str, names: list[str], inside: str) -> list[str]:
    """Chooses among a repository's files: the one that `inside` names, or those in that folder and nearby
    configurations."""
    folder = PurePosixPath(inside)
    if inside in names:
        near = [name for name in names if PurePosixPath(name).parent == folder.parent and name.endswith(_NEAR)]
        return [*near, inside] if inside not in near else near
    here = [
        name
        for name in names
        if name.endswith((*_DATA, "config.yaml")) and PurePosixPath(name).parent in (folder, folder / "checkpoints")
    ]
    weights = [name for name in here if not name.endswith(_NEAR)]
    pickled = [name for name in here if name.endswith(_PICKLED)]
    if weights and len(pickled) <= 1:
        beside = str(folder.parent / "config.json") if inside else "config.json"
        return here + [name for name in names if name == beside and name not in here]
    inner = sorted(name for name in names if folder in PurePosixPath(name).parents and not name.endswith(_NEAR))
    choices = pickled or sorted({str(PurePosixPath(n).parent) for n in inner if PurePosixPath(n).suffix in _DATA})
    if not choices:
        raise FormatError(f"{repo} holds no weights{f' in {inside!r}' if inside else ''}; check the name")
    shown = ", ".join(f"{repo}/{one}" for one in choices[:4])
    raise FormatError(
        f"{repo} holds {len(choices)} SAEs{f' in {inside!r}' if inside else ''}; name one, such as {shown}"
    )


def upload(folder: Path, repo: str, *, private: bool, revision: str | None, message: str, token: str | None) -> str:
    """Creates the repository if necessary and commits the folder's files to it; returns the commit's address.

    Raises:
        SourceError: the hub cannot be reached, or refuses.
    """
    require_hub(f"{repo} (to be written)")
    hub = _client("writing to the hub")
    api = hub.HfApi(token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=str(folder), revision=revision, commit_message=message)
    except Exception as error:
        reason = first_line(error)
        raise SourceError(f"cannot write to {repo} on the Hugging Face hub ({reason}); check name and token") from error
    return str(commit)
