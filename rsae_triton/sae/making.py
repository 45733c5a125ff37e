"""How an SAE's metadata says its activations were made: followed when a host is loaded or text is read, or warned
about.

SAELens writes it into cfg.json's metadata: `model_from_pretrained_kwargs` (center_writing_weights, fold_ln, dtype),
prepend_bos, context_size, seqpos_slice, exclude_special_tokens. With other activations an SAE gives meaningless
numbers: one of GPT-2's centred stream has fvu 390 on the plain one.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rsae_triton.common.checks import shown

_RESIDUAL = re.compile(r"blocks\.\d+\.(hook_resid_(pre|mid|post)|hook_(mlp|attn)_out)|hook_embed")


@dataclass(frozen=True)
class Making:
    """How an SAE's activations were made.

    centred: `center_writing_weights`. dtype: of the model; None if not stated or not usable here. context: tokens per
    context; None if not stated. reading: arguments of `extract` that differ from the usual ones (prepend_bos,
    seqpos_slice, exclude_special_tokens). other: the statements that are not followed here, by name.
    """

    centred: bool
    dtype: str | None
    context: int | None
    reading: dict[str, Any]
    other: tuple[str, ...]


def making_of(metadata: Mapping[str, Any]) -> Making:
    """Reads an SAE's `metadata`."""
    loaded = metadata.get("model_from_pretrained_kwargs")
    loaded = loaded if isinstance(loaded, Mapping) else {}
    other = []
    if loaded.get("fold_ln") is True and not _RESIDUAL.fullmatch(str(metadata.get("hook_name"))):
        other.append("fold_ln=True (the norms' weights are not folded into what they feed)")
    dtype = str(loaded.get("dtype") or loaded.get("torch_dtype") or "").removeprefix("torch.") or None
    if dtype is not None and dtype not in ("float32", "bfloat16"):
        other.append(f"dtype={shown(dtype)} of the model")
        dtype = None
    reading: dict[str, Any] = {"prepend_bos": False} if metadata.get("prepend_bos") is False else {}
    positions = metadata.get("seqpos_slice")
    if isinstance(positions, list | tuple) and any(one is not None for one in positions):
        if len(positions) <= 3 and all(one is None or type(one) is int for one in positions) and 0 not in positions[2:]:
            reading["seqpos_slice"] = list(positions)
        else:
            other.append(f"seqpos_slice={shown(tuple(positions))} (which is no slice)")
    special = metadata.get("exclude_special_tokens")
    if special is True or (isinstance(special, list | tuple) and special):
        if special is True or all(type(one) is int and one >= 0 for one in special):
            reading["exclude_special_tokens"] = special if special is True else sorted(set(special))
        else:
            other.append(f"exclude_special_tokens={shown(special)} (which are no tokens)")
    context = metadata.get("context_size")
    usable = isinstance(context, int) and not isinstance(context, bool) and context >= 2
    return Making(
        loaded.get("center_writing_weights") is True, dtype, context if usable else None, reading, tuple(other)
    )


def warn_of_making(metadata: Mapping[str, Any], name: str, extra: tuple[str, ...] = (), stacklevel: int = 3) -> None:
    """Warns about the statements on an SAE's activations that are not followed here."""
    other = (*making_of(metadata).other, *extra)
    if other:
        warnings.warn(
            f"{name} was trained on activations made otherwise than here: {'; '.join(other)}. Its scores may be worse "
            "than it is",
            stacklevel=stacklevel + 1,
        )


def reading_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """`Making.reading` for a store, with the ids of the tokens that it leaves out."""
    names = {"prepend_bos": "prepend_bos", "seqpos_slice": "seqpos_slice", "exclude_tokens": "exclude_special_tokens"}
    return {ours: manifest[theirs] for theirs, ours in names.items() if theirs in manifest}


def warn_of_reading(metadata: Mapping[str, Any], manifest: Mapping[str, Any], name: str, stacklevel: int = 3) -> None:
    """Warns if a store was read at other positions than those that the SAE says it was trained on."""
    ours, theirs, context = making_of(metadata).reading, reading_of(manifest), manifest.get("context")
    other = []
    for key, usual in (("prepend_bos", True), ("seqpos_slice", None), ("exclude_special_tokens", False)):
        said, held = ours.get(key, usual), theirs.get(key, usual)
        alike = said == held or (said is True and isinstance(held, list))
        if key == "seqpos_slice" and isinstance(context, int) and not alike:
            with suppress(TypeError, ValueError, OverflowError):
                alike = range(context)[slice(*(said or [None]))] == range(context)[slice(*(held or [None]))]
        if metadata.get(key) is not None and not alike:
            other.append(f"{key}={shown(said)}")
    if other:
        warnings.warn(
            f"{name} was trained with {', '.join(other)}, but these activations were read with other settings; read "
            "them again with extract(..., **making_of(sae.metadata).reading), from rsae_triton.sae.making",
            stacklevel=stacklevel + 1,
        )
