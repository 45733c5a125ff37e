"""Two releases that are a single plain .pt file: GPT-2's attention SAEs (hook_z), and qresearch's SAE of DeepSeek R1.

ckkissane/attn-saes-gpt2-small-all-layers: NAME.pt with W_enc [d, F], W_dec [F, d], b_enc, b_dec, and NAME_cfg.json
beside it; z = relu((x - b_dec) @ W_enc + b_enc). qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19: encoder.weight [F, d],
encoder.bias, decoder.weight [d, F], decoder.bias; z = relu(x @ encoder.T + bias), nothing subtracted.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rsae_triton.common.archives import read_torch
from rsae_triton.common.errors import FormatError
from rsae_triton.common.files import read_json
from rsae_triton.common.names import hub_model
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.teachers.parts import Files, Parts, require

NAME = "plain_pt"
LOOKS_FOR = "NAME.pt with W_enc, W_dec, b_enc, b_dec and NAME_cfg.json, or with encoder and decoder layers"
_MATRICES = ("W_enc", "W_dec", "b_enc", "b_dec")
_LAYERS = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")


def recognises(files: Files) -> bool:
    """Whether this is a file of one of the two releases."""
    keys = files.torch_keys()
    return keys == set(_LAYERS) or (keys == set(_MATRICES) and _config(files) is not None)


def read(files: Files) -> SparseAutoencoder:
    """Reads a teacher from one file."""
    path = files.torch_file()
    if path is None:
        raise FormatError(f"{files.name} is not one .pt file; name it")
    if files.torch_keys() == set(_LAYERS):
        w = require(read_torch(path), path, *_LAYERS)
        parts = Parts(w["encoder.weight"].t(), w["decoder.weight"].t(), w["encoder.bias"], w["decoder.bias"])
        parts.apply_b_dec_to_input = False
        found = re.search(r"([\w.-]+)-SAE-l(\d+)", files.named) or re.search(r"([\w.-]+)-SAE-l(\d+)", path.name)
        if found:
            owner = "deepseek-ai/" if found[1].startswith("DeepSeek") else ""
            parts.metadata = {"model_name": owner + found[1], "hook_name": f"blocks.{found[2]}.hook_resid_post"}
        return parts.build(files, NAME)
    beside = _config(files)
    if beside is None:
        raise FormatError(f"{path} has no {path.stem}_cfg.json beside it, which says what it was trained on")
    w = require(read_torch(path), path, *_MATRICES)
    return Parts(w["W_enc"], w["W_dec"], w["b_enc"], w["b_dec"], metadata=_place(read_json(beside))).build(files, NAME)


def _config(files: Files) -> Path | None:
    path = files.torch_file()
    beside = None if path is None else path.with_name(f"{path.name.removesuffix('.pt')}_cfg.json")
    return beside if beside is not None and beside.is_file() else None


def _place(config: dict[str, Any]) -> dict[str, Any]:
    model, hook = config.get("model_name", "gpt2-small"), config.get("act_name")
    return {"model_name": hub_model(str(model)), "hook_name": hook if isinstance(hook, str) else None}
