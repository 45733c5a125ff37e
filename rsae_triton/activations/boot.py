"""A model by its name as a `HostModel`: weights and tokenizer, and TransformerLens' bridge over the same weights."""

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
    """Load a causal language model: "smollm2" (embedded default), a .gguf file, a model folder, or a hub id.

    `device` defaults to CUDA where it is, `dtype` to bfloat16 where the hardware multiplies it. `hook_name`
    becomes the default place. `center_writing_weights` gives GPT-2 the residual stream of mean zero that SAEs
    trained on TransformerLens' default expect ("where possible": a warning for other models, not an error). Raises
    SourceError for a model that cannot be had, ConfigError for a bad option or place.
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
    """A TransformerBridge over a twin of `model`: the bridge rewires the module it is given, so it gets its own,
    with the same parameters."""
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
    except Exception as error:  # an architecture it has no adapter for, in one of many ways
        reason = first_line(error)
        if library == "transformer_lens":
            raise SourceError(f"TransformerLens cannot run {name!r} ({reason}); use library='transformers'") from error
        warnings.warn(f"TransformerLens cannot run {name!r} ({reason}); using transformers alone", stacklevel=3)
        return None
