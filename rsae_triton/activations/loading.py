"""Finds and loads a language model: its Hugging Face module and tokenizer, from a name, a folder or a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from rsae_triton.activations.dequantise import embedded_model, gguf_model
from rsae_triton.common.errors import ConfigError, FormatError, SourceError, first_line
from rsae_triton.common.hub import hub_reachable
from rsae_triton.common.install import advice
from rsae_triton.common.names import EMBEDDED, EMBEDDED_ID, EMBEDDED_NOTE, hub_model

_DTYPES = {
    "fp32": torch.float32, "float32": torch.float32,
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "fp16": torch.float16, "float16": torch.float16,
}  # fmt: skip


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Returns a torch dtype by name. Raises ConfigError for one that a host model cannot run in."""
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in _DTYPES.values():
        raise ConfigError(f"dtype {dtype!r} is not usable here; choose one of {', '.join(_DTYPES)}")
    return found


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 if the hardware multiplies it (on a CPU then 1.8 times as fast as float32), else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return torch.float32
    return torch.bfloat16 if {"avx512_bf16", "amx_bf16", "bf16"}.intersection(flags) else torch.float32


def find_model(name: str) -> tuple[str, bool]:
    """Returns `(where, is_hub)`: a local folder (dequantised first if `name` is a GGUF file), or a hub id."""
    path = Path(os.path.expanduser(name))  # Path.expanduser raises if there is no such user
    if name == EMBEDDED:
        return str(embedded_model()), False
    if path.suffix.lower() == ".gguf":
        return str(gguf_model(path)), False
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FormatError(f"the folder {path} holds no config.json; name a Hugging Face model folder")
        return str(path), False
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise SourceError(f"no model folder or .gguf file at {name!r}; check the path")
    return hub_model(name), True


def load_model(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Returns `(model, tokenizer)`: a causal language model in eval mode on `device`, without gradients.

    Raises:
        SourceError: it cannot be loaded (unknown, offline, transformers missing).
        FormatError: a local folder is damaged.
    """
    where, is_hub = find_model(name)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise SourceError(
            f"a host model needs the package `transformers`; install it with: {advice('host')}"
        ) from error
    offline = is_hub and not hub_reachable()
    # On a CPU with contexts of 128, eager attention is a tenth faster than sdpa; and TransformerLens uses it.
    options: dict[str, Any] = {"attn_implementation": "eager"} if device.type == "cpu" else {}
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, local_files_only=offline, **options)
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=offline)
    except Exception as error:  # OSError, ValueError, and whatever the parsers raise for a damaged file
        reason = first_line(error)
        if offline:
            known = f" (on the hub: {where})" if where != name else ""
            instead = f"'{EMBEDDED}'" + (f" ({EMBEDDED_NOTE})" if where == EMBEDDED_ID else "")
            raise SourceError(
                f"no model named {name!r}{known}: neither a path nor in the local hub cache, and the Hugging Face hub "
                f"is unreachable; check the name and the connection, or use {instead}"
            ) from error
        if is_hub:
            raise SourceError(f"cannot load the model {name!r} from the hub ({reason}); check its name") from error
        raise FormatError(f"cannot load the model in {where} ({reason}); check or fetch it again") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    return model.to(device).eval().requires_grad_(False), tokenizer
