"""Loads a model by name as a `HostModel`: weights and tokenizer, and TransformerLens' bridge over the same weights."""

from __future__ import annotations

import warnings
from typing import Literal

import torch

from rsae_triton.activations.bridge import Bridge, Library
from rsae_triton.activations.centring import center_writing_weights_
from rsae_triton.activations.host import HostModel
from rsae_triton.activations.loading import default_dtype, load_model, parse_dtype
from rsae_triton.common.errors import ConfigError


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
        library: "transformers", "transformer_lens", or "auto": TransformerLens' bridge as well, made when it is
            first needed, if it can run the model.
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
    host = HostModel(model, tokenizer, str(name), Bridge.of(model, tokenizer, str(name), library), hook_name)
    host.centred = centred
    return host
