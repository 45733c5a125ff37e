"""Loads a model by name as a `HostModel`: weights and tokenizer, and TransformerLens' bridge over the same weights."""

from __future__ import annotations

import copy
import warnings
from typing import Any, Literal

import torch

from rsae_triton.activations.centring import center_writing_weights_
from rsae_triton.activations.host import HostModel, Library
from rsae_triton.activations.loading import default_dtype, load_model, parse_dtype
from rsae_triton.common.errors import ConfigError, SourceError, first_line
from rsae_triton.common.install import advice
from rsae_triton.common.names import hub_model


def load_host(
    name: str = "smollm2",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    library: Library = "auto",
    hook_name: str | None = None,
    center_writing_weights: bool | Literal["where possible"] = False,
) -> HostModel:
    """Loads a causal language model.

    Args:
        name: "smollm2" (the embedded default), a .gguf file, a model folder, or a hub id.
        device: CUDA by default, if there is one. dtype: bfloat16 by default, if the hardware multiplies it.
        library: "transformers", "transformer_lens", or "auto": TransformerLens' bridge if it can run the model.
        hook_name: the default place.
        center_writing_weights: give GPT-2 the residual stream of mean zero that SAEs trained on TransformerLens'
            default expect. "where possible": only warn for other models.

    Raises:
        SourceError: the model cannot be found or loaded.
        ConfigError: a bad option or place.
    """
    if library not in ("auto", "transformer_lens", "transformers"):
        raise ConfigError(f"library={library!r} is unknown; choose auto, transformer_lens or transformers")
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is unknown; choose cpu or cuda") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} is asked for, but torch sees no CUDA device; use device='cpu'")
    model, tokenizer = load_model(str(name), place, parse_dtype(dtype) if dtype else default_dtype(place))
    centred = bool(center_writing_weights)
    if center_writing_weights == "where possible" and model.config.model_type != "gpt2":
        warnings.warn(
            f"center_writing_weights is for GPT-2 and {name!r} is {model.config.model_type}: its activations are not "
            "centred, and an SAE that says they were reads them wrongly",
            stacklevel=2,
        )
        centred = False
    if centred:
        center_writing_weights_(model)
    bridge = None if library == "transformers" else _boot_bridge(model, tokenizer, str(name), library)
    host = HostModel(model, tokenizer, str(name), bridge, hook_name)
    host.centred = centred
    return host


def _boot_bridge(model: Any, tokenizer: Any, name: str, library: Library) -> Any:
    """A TransformerBridge over a second module with the same parameters, because the bridge changes the module it is
    given."""
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError as error:
        if library == "auto":
            return None
        raise SourceError(
            f"library='transformer_lens' needs that package; install it with: {advice('host')}"
        ) from error
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        return TransformerBridge.boot_transformers(
            hub_model(name),
            hf_model=copy.deepcopy(model, shared),
            tokenizer=tokenizer,
            device=str(next(model.parameters()).device),
            dtype=next(model.parameters()).dtype,
        )
    except Exception as error:  # it has no adapter for the architecture, and can fail in many ways
        reason = first_line(error)
        if library == "transformer_lens":
            raise SourceError(f"TransformerLens cannot run {name!r} ({reason}); use library='transformers'") from error
        warnings.warn(f"TransformerLens cannot run {name!r} ({reason}); using transformers alone", stacklevel=3)
        return None
