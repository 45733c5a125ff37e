"""Qwen Scope: TopK SAEs of residual streams, one layerN.sae.pt per layer.

The encode rule, from its model cards: h = x @ W_enc.T + b_enc, z the k largest of h (no ReLU is written there), and the
decoder's W_dec.T with b_dec. b_dec is not subtracted from the input. Only the repository's name (...-L0_50) says what k
is.
"""

from __future__ import annotations

import re
from typing import Any

from rsae_triton.common.archives import read_torch
from rsae_triton.common.errors import FormatError
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.teachers.parts import Files, Parts, layer_of, require

NAME = "qwen_scope"
LOOKS_FOR = "layerN.sae.pt with W_enc, W_dec, b_enc, b_dec"
_NAMES = ("W_enc", "W_dec", "b_enc", "b_dec")


def recognises(files: Files) -> bool:
    """Whether this is a file of Qwen Scope."""
    path = files.torch_file()
    return path is not None and path.name.endswith(".sae.pt") and files.torch_keys() == set(_NAMES)


def read(files: Files) -> SparseAutoencoder:
    """Reads a teacher from one layer's file."""
    path = files.torch_file()
    if path is None:
        raise FormatError(f"{files.name} is not one layerN.sae.pt; name the layer's file")
    w = require(read_torch(path), path, *_NAMES)
    k = files.k if files.k is not None else layer_of(files.named, r"-L0_(\d+)")
    if k is None:
        raise FormatError(
            f"{path} does not say how many features are active; pass k= (the L0 of the repository's name)"
        )
    parts = Parts(
        w["W_enc"].t(),
        w["W_dec"].t(),
        w["b_enc"],
        w["b_dec"],
        apply_b_dec_to_input=False,
        k=k,
        relu=False,
        metadata=_provenance(files),
    )
    return parts.build(files, NAME)


def _provenance(files: Files) -> dict[str, Any]:
    model = re.search(r"SAE-Res-(.+)-W\d+K-L0_\d+", files.named)
    layer = layer_of(files.named, r"layer(\d+)\.sae\.pt")
    return {
        "model_name": f"Qwen/{model[1]}" if model else None,
        "hook_name": None if layer is None else f"blocks.{layer}.hook_resid_post",
    }
