"""Teachers: the SAEs and transcoders that are upgraded. One module reads each file format (docs/formats.md)."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from rsae_triton.common.checks import check_integer, check_number
from rsae_triton.common.errors import ConfigError, FormatError, ResourceError, RsaeError, first_line
from rsae_triton.common.files import check_inside
from rsae_triton.common.hub import local_path
from rsae_triton.common.names import hub_model
from rsae_triton.sae.architectures import JumpReluSAE, ReluSAE, TopKSAE, keep_largest
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.batch_topk import BatchTopKSAE
from rsae_triton.sae.transcoder import Transcoder
from rsae_triton.teachers import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    goodfire,
    llama_scope,
    objects,
    openai,
    plain_pt,
    qwen_scope,
    refused,
    registry,
    saelens,
    sparsify,
)
from rsae_triton.teachers.parts import Files

__all__ = [
    "FORMATS",
    "BatchTopKSAE",
    "JumpReluSAE",
    "ReluSAE",
    "SparseAutoencoder",
    "TopKSAE",
    "Transcoder",
    "keep_largest",
    "load_teacher",
]

FORMATS: dict[str, ModuleType] = {
    module.NAME: module
    for module in (
        saelens,
        dictionary_learning,
        sparsify,
        gemma_scope,
        llama_scope,
        openai,
        qwen_scope,
        goodfire,
        circuit_tracer,
        plain_pt,
    )
}


def load_teacher(
    source: Any = None,
    format: str = "auto",
    *,
    release: str | None = None,
    sae_id: str | None = None,
    revision: str | None = None,
    k: int | None = None,
    activation_scale: float | None = None,
    kind: Literal["sae", "transcoder"] | None = None,
) -> SparseAutoencoder:
    """Loads a ReLU, JumpReLU or TopK SAE or a transcoder, in any of the formats of docs/formats.md.

    Args:
        source: a folder or file; a hub id: "owner/repository", followed by the SAE's folder or file where the
            repository holds several ("google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"), also as an
            address (https://huggingface.co/..., hf://owner/repository@revision/folder); "release/sae_id" from SAELens'
            registry, where SAELens is installed; or an SAE object of SAELens.
        format: "auto", or a name in `FORMATS`.
        release, sae_id: an entry of SAELens' registry, instead of source.
        revision: branch, tag or commit of a hub id.
        k: active features per token, for files that do not say (Qwen Scope outside its repository).
        activation_scale: the factor that activations were multiplied by in training, for files that do not say.
        kind: "sae" or "transcoder", for Gemma Scope files where neither a configuration nor the folder's name says
            which.

    Returns:
        The teacher: a `Transcoder` if it reads at one place and writes at another, else an SAE. It reads the model's
            own
        activations and has the dtype of the file (float32 where something was folded into the weights). Its metadata
        holds
        hook_name and model_name where known, and under "loaded_from" the format, the source and what was folded. Gated
        and
        BatchTopK SAEs are returned as the JumpReLU SAEs that they are equal to.

    Raises:
        FormatError: the format is unknown, the files are damaged, or a setting cannot be reproduced exactly.
        SourceError: a hub id cannot be fetched.
        ConfigError: the format name is unknown, SAELens' registry has no such release, or an argument had no effect.
        NumericsError: a weight is NaN or infinite.
    """
    if format not in ("auto", *FORMATS):
        raise ConfigError(f"format is {format!r}; choose auto or one of {', '.join(FORMATS)}")
    if k is not None:
        check_integer("k", k, 1)
    if activation_scale is not None:
        check_number("activation_scale", activation_scale, above=0)
    entry = _entry(source, release, sae_id)
    if entry is None and objects.is_saelens(source):
        teacher = objects.read(source, activation_scale)
        _check_used(teacher, "the object", k, None if format == "auto" else format, revision, activation_scale)
        return teacher
    if entry is not None:
        source = entry.source
    if kind not in (None, "sae", "transcoder"):
        raise ConfigError(f"kind is {kind!r}; choose sae or transcoder, or leave it out")
    files = Files(local_path(source, revision), str(source), k, activation_scale, kind=kind)
    if entry is not None:
        files = replace(files, registry_scale=entry.scale, overrides=entry.overrides)
    for one in files.path.iterdir() if files.path.is_dir() else ():
        if one.suffix in (".json", ".safetensors", ".npz", ".pt", ".pth"):
            check_inside(files.path, one.name)
    reader = _recognise(files) if format == "auto" else FORMATS[format]
    try:
        teacher = reader.read(files)
    except RsaeError:
        raise
    except MemoryError as error:
        raise ResourceError(f"no memory for {source}; it is too large for this machine, or claims to be") from error
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        # A reader indexes the file as its format prescribes; a damaged or foreign file can make that fail in any of
        # these ways.
        reason = first_line(error)
        raise FormatError(f"{source} does not hold what {reader.NAME} files hold ({reason}); fetch it again") from error
    if entry is not None:
        teacher.metadata["loaded_from"].update(release=entry.release, sae_id=entry.sae_id)
        teacher.metadata.setdefault("model_name", hub_model(entry.model))
    _check_used(teacher, str(source), k, None, None, activation_scale)
    if kind is not None and (kind == "transcoder") != isinstance(teacher, Transcoder):
        raise ConfigError(f"{source} is a {type(teacher).__name__}, and kind={kind!r} was given; leave it out")
    teacher.units = 1.0
    return teacher


def _entry(source: Any, release: str | None, sae_id: str | None) -> registry.Entry | None:
    """Returns the registry entry that the arguments name, or None if they name something else."""
    if (release is None) != (sae_id is None) or (source is None) == (release is None):
        raise ConfigError("name an SAE by source, or by release= and sae_id= together")
    if release is not None and sae_id is not None:
        return registry.entry(release, sae_id)
    if not isinstance(source, str | Path) or not str(source) or os.path.exists(source):
        return None
    return registry.find(str(source))


def _check_used(
    teacher: SparseAutoencoder,
    name: str,
    k: int | None,
    format: str | None,
    revision: str | None,
    activation_scale: float | None,
) -> None:
    """Raises ConfigError for an argument that had no effect: whoever gave it expects another teacher."""
    if format is not None or revision is not None:
        raise ConfigError(f"format and revision are for files; {name} is in memory")
    if k is not None and not isinstance(teacher, TopKSAE):
        raise ConfigError(
            f"k={k} is for TopK SAEs; {name} is of the architecture {teacher.architecture!r}: leave it out"
        )
    if k is not None and isinstance(teacher, TopKSAE) and teacher.k != k:
        raise ConfigError(f"{name} says k={teacher.k}, and k={k} was given; leave it out")
    folded = " ".join(teacher.metadata.get("loaded_from", {}).get("folded", []))
    if activation_scale is not None and activation_scale != 1 and "activations *" not in folded:
        raise ConfigError(
            f"activation_scale={activation_scale:g} was given, but nothing in {name} says that its activations were "
            "scaled in training; leave it out, or use fold_activation_scale_ on what is loaded"
        )


def _recognise(files: Files) -> ModuleType:
    if (why := refused.reason(files)) is not None:
        raise FormatError(why)
    for module in FORMATS.values():
        if module.recognises(files):
            return module
    held = sorted(one.name for one in files.folder.iterdir())
    looked = "; ".join(f"{name}: {module.LOOKS_FOR}" for name, module in FORMATS.items())
    raise FormatError(
        f"{files.path} is in no format that is read here. It holds {', '.join(held[:8]) or 'nothing'}"
        f"{', ...' if len(held) > 8 else ''}. Looked for {looked}"
    )
