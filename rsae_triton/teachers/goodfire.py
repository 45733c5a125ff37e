"""Goodfire's SAEs of Llama 3: one .pt or .pth file with two linear layers.

The encode rule, from its model cards: z = relu(encoder_linear(x)), x_hat = decoder_linear(z); nothing is subtracted
from the input.
"""

from __future__ import annotations

import re
from typing import Any

from rsae_triton.common.archives import read_torch
from rsae_triton.common.errors import FormatError
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.teachers.parts import Files, Parts, require

NAME = "goodfire"
LOOKS_FOR = "a .pt or .pth file with encoder_linear.weight and decoder_linear.weight"


def recognises(files: Files) -> bool:
    """Whether this is one of Goodfire's files."""
    return {"encoder_linear.weight", "decoder_linear.weight"} <= files.torch_keys()


def read(files: Files) -> SparseAutoencoder:
    """Reads a teacher from one file."""
    path = files.torch_file()
    if path is None:
        raise FormatError(f"{files.name} is not one .pt or .pth file; name it")
    layers = ("encoder_linear", "decoder_linear")
    w = require(read_torch(path), path, *(f"{layer}.{part}" for layer in layers for part in ("weight", "bias")))
    parts = Parts(
        w["encoder_linear.weight"].t(),
        w["decoder_linear.weight"].t(),
        w["encoder_linear.bias"],
        w["decoder_linear.bias"],
        apply_b_dec_to_input=False,
        metadata=_provenance(files),
    )
    return parts.build(files, NAME)


def _provenance(files: Files) -> dict[str, Any]:
    """Model and hook, from the name that the caller gave or else the file's own name; never from a cache's folder
    names."""
    file = files.torch_file()
    found = re.search(r"([\w.-]+)-SAE-l(\d+)", files.named) or re.search(
        r"([\w.-]+)-SAE-l(\d+)", file.name if file else ""
    )
    layer = int(found[2]) if found else None
    return {
        "model_name": f"meta-llama/{found[1]}" if found else None,
        "hook_name": None if layer is None else f"blocks.{layer}.hook_resid_post",
    }
