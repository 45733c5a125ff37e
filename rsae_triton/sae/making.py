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
from dataclasses import dataclass
from typing import Any

from rsae_triton.common.checks import shown

_RESIDUAL = re.compile(r"blocks\.\d+\.(hook_resid_(pre|mid|post)|hook_(mlp|attn)_out)|hook_embed")


@dataclass(frozen=True)
class Making:
    """How an SAE's activations were made.

    centred: `center_writing_weights`. dtype: of the model; None if not stated or not usable here. context: tokens per
    context; None if not stated. other: the statements that are not followed here, by name.
    """

    centred: bool
    dtype: str | None
    context: int | None
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
    if metadata.get("prepend_bos") is False:
        other.append("prepend_bos=False (every context begins with BOS here)")
    positions = metadata.get("seqpos_slice")
    if isinstance(positions, list | tuple) and any(one is not None for one in positions):
        other.append(f"seqpos_slice={shown(tuple(positions))} (all positions are read)")
    special = metadata.get("exclude_special_tokens")
    if special is True or (isinstance(special, list | tuple) and special):
        other.append("exclude_special_tokens (BOS alone is left out)")
    context = metadata.get("context_size")
    usable = isinstance(context, int) and not isinstance(context, bool) and context >= 2
    return Making(loaded.get("center_writing_weights") is True, dtype, context if usable else None, tuple(other))


def warn_of_making(metadata: Mapping[str, Any], name: str, extra: tuple[str, ...] = (), stacklevel: int = 3) -> None:
    """Warns about the statements on an SAE's activations that are not followed here."""
    other = (*making_of(metadata).other, *extra)
    if other:
        warnings.warn(
            f"{name} was trained on activations made otherwise than here: {'; '.join(other)}. Its scores may be worse "
            "than it is",
            stacklevel=stacklevel + 1,
        )
