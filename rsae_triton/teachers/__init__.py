"""The SAEs being upgraded: to train, or to load from what people have (docs/formats.md)."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType

from rsae_triton.common.checks import check_integer, check_number
from rsae_triton.common.errors import ConfigError, FormatError, ResourceError, RsaeError, first_line
from rsae_triton.common.hub import local_path
from rsae_triton.sae.architectures import JumpReluSAE, ReluSAE, TopKSAE, keep_largest
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.batch_topk import BatchTopKSAE
from rsae_triton.teachers import (
    dictionary_learning,
    gemma_scope,
    goodfire,
    llama_scope,
    openai,
    qwen_scope,
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
    )
}


def load_teacher(
    source: str | Path,
    format: str = "auto",
    *,
    revision: str | None = None,
    k: int | None = None,
    activation_scale: float | None = None,
) -> SparseAutoencoder:
    """Loads a ReLU, JumpReLU or TopK SAE that any of the field's libraries has saved.

    Args:
        source: a folder or file, or a hub id: "owner/repository", with the SAE's folder or file in it where the
            repository holds several ("google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71").
        format: "auto", or a name of `FORMATS`.
        revision: branch, tag or commit of a hub id.
        k: active features per token, where the files do not say (Qwen Scope outside its repository).
        activation_scale: what the activations were multiplied by in training, where the files do not say.

    Returns:
        The teacher, reading the model's own activations, in the dtype of the file (float32 where something was
        folded into the weights). metadata: hook_name and model_name where known, and under "loaded_from" the
        format, the source and what was folded. Gated and BatchTopK SAEs become the JumpReLU SAEs they are.

    Raises:
        FormatError: no known format, corrupt or foreign files, or a setting whose code would not be reproduced
            exactly. SourceError: a hub id that cannot be fetched. ConfigError: an unknown format name.
        NumericsError: weights that are not finite.
    """
    if format not in ("auto", *FORMATS):
        raise ConfigError(f"format is {format!r}; choose auto or one of {', '.join(FORMATS)}")
    if k is not None:
        check_integer("k", k, 1)
    if activation_scale is not None:
        check_number("activation_scale", activation_scale, above=0)
    files = Files(local_path(source, revision), str(source), k, activation_scale)
    reader = _recognise(files) if format == "auto" else FORMATS[format]
    try:
        teacher: SparseAutoencoder = reader.read(files)
    except RsaeError:
        raise
    except MemoryError as error:
        raise ResourceError(f"no memory for {source}; it is too large for this machine, or claims to be") from error
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        # A reader asks a file for what its format has; what a stranger has put there instead can be anything.
        reason = first_line(error)
        raise FormatError(f"{source} does not hold what {reader.NAME} files hold ({reason}); fetch it again") from error
    if teacher.metadata.get("transcoder"):
        warnings.warn(
            f"{source} is a transcoder: what it decodes are activations at another place than those it encodes",
            stacklevel=2,
        )
    return teacher


def _recognise(files: Files) -> ModuleType:
    for module in FORMATS.values():
        if module.recognises(files):
            return module
    held = sorted(one.name for one in files.folder.iterdir())
    looked = "; ".join(f"{name}: {module.LOOKS_FOR}" for name, module in FORMATS.items())
    raise FormatError(
        f"{files.path} is in no format that is read here. It holds {', '.join(held[:8]) or 'nothing'}"
        f"{', ...' if len(held) > 8 else ''}. Looked for {looked}"
    )
