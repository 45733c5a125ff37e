"""Turns an SAE object of SAELens into a teacher, without writing a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rsae_triton.common.errors import ConfigError
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.pretrained import CONFIG_FILE
from rsae_triton.teachers import saelens
from rsae_triton.teachers.parts import Files


def is_saelens(value: Any) -> bool:
    """Whether `value` is an SAE, a training SAE or a transcoder of SAELens (checked without importing SAELens)."""
    return any(kind.__module__.startswith("sae_lens.") for kind in type(value).__mro__) and hasattr(value, "cfg")


def read(value: Any, activation_scale: float | None = None) -> SparseAutoencoder:
    """Returns a teacher that computes what the SAELens object computes, on its device, with its own copy of the
    weights.

    Raises:
        ConfigError: it is a Rational SAE already.
        FormatError: the architecture is not supported.
    """
    architecture = value.cfg.architecture()
    if architecture.startswith("rational"):
        raise ConfigError("this is a Rational SAE already; rsae_triton.integrations.saelens.from_saelens converts it")
    config = {**value.cfg.to_dict(), "architecture": architecture}
    metadata = config.get("metadata") or {}
    config["metadata"] = {**_plain(metadata), "sae_lens_version": metadata.get("sae_lens_version") or "6"}
    weights = {name: tensor.detach().clone() for name, tensor in value.state_dict().items()}
    name = f"the SAELens {type(value).__name__}"
    # An object has no folder: factors that would stand in other files of it are the object's own, or were folded in.
    files = Files(Path(f"<{name}>") / CONFIG_FILE, name, activation_scale=activation_scale)
    teacher = saelens.build(config, weights, files)
    return teacher.to(next(iter(weights.values())).device)


def _plain(metadata: Any) -> dict[str, Any]:
    """Returns the part of SAELens' metadata that JSON can hold."""
    items = dict(metadata).items()
    return {name: one for name, one in items if isinstance(one, str | int | float | bool | list | dict | None)}
