"""Licence terms for passing an SAE on: those of the SAE it was made from, and those of the model it reads.

Only what is known for certain is stated; otherwise the card refers to the source.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SUITES = (
    (
        r"gemma-scope",
        "cc-by-4.0",
        "made from Gemma Scope by Google DeepMind, licensed under CC-BY-4.0 "
        "(https://creativecommons.org/licenses/by/4.0/), and changed: keep this notice, and say what you change",
    ),
)
_MODELS = (
    (
        r"(^|/)(Meta-)?Llama-",
        'of a Llama model, whose community licence asks for the words "Built with Llama" and for a copy of the licence '
        "beside what is passed on (https://www.llama.com/llama-downloads/)",
    ),
    (
        r"(^|/)gemma-",
        "of a Gemma model, whose terms of use go with what is made of it (https://ai.google.dev/gemma/terms)",
    ),
)


def licence_of(metadata: Mapping[str, Any]) -> str | None:
    """The licence's name on the hub: the one in the metadata, else that of a suite whose licence is known; None
    otherwise."""
    if metadata.get("license"):
        return str(metadata["license"])
    source = _source(metadata)
    return next((name for pattern, name, _ in _SUITES if re.search(pattern, source)), None)


def notices(metadata: Mapping[str, Any]) -> list[str]:
    """Sentences for the card: attributions that are required, or where to look."""
    source, model = _source(metadata), str(metadata.get("model_name") or "")
    found = [text for pattern, _, text in _SUITES if re.search(pattern, source)]
    if source and not found and not metadata.get("license"):
        found.append(f"made from {source}, whose licence is not known here: look at its source")
    found += [text for pattern, text in _MODELS if re.search(pattern, model)]
    return [f"This SAE is {text}." for text in found]


def _source(metadata: Mapping[str, Any]) -> str:
    loaded = metadata.get("loaded_from")
    return str(loaded.get("source") or "") if isinstance(loaded, Mapping) else ""
