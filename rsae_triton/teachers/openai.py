"""OpenAI's sparse autoencoders of GPT-2: one .pt file per SAE.

The encode rule, from openai/sparse_autoencoder `model.py`: latents = activation((x - pre_bias) @ encoder +
latent_bias). Models with the TopK activation normalise their input first (layer norm with unbiased std, epsilon 1e-5 on
the std) and undo it on the reconstruction; ReLU models do not.
"""

from __future__ import annotations

import re
from typing import Any

from rsae_triton.common.archives import read_torch
from rsae_triton.common.errors import FormatError
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.teachers.parts import Files, Parts, require

NAME = "openai"
LOOKS_FOR = "a .pt file with pre_bias, encoder.weight, latent_bias, decoder.weight"
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_ACTIVATION = ("activation", "activation_state_dict", "activation.k", "activation.postact_fn")
_HOOKS = {
    "resid_post_mlp": "hook_resid_post",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_delta_attn": "hook_attn_out",
    "mlp_post_act": "mlp.hook_post",
}


def recognises(files: Files) -> bool:
    """Whether this is one of OpenAI's files."""
    return {"pre_bias", "latent_bias"} <= files.torch_keys()


def read(files: Files) -> SparseAutoencoder:
    """Reads a teacher from one .pt file."""
    path = files.torch_file()
    if path is None:
        raise FormatError(f"{files.name} is not one .pt file; OpenAI's autoencoders are one file each, name it")
    tensors = read_torch(path)
    names = ("pre_bias", "encoder.weight", "latent_bias", "decoder.weight")
    w = require(tensors, path, *names, optional=(*_STATISTICS, *_ACTIVATION))
    activation = tensors.get("activation", "ReLU")
    # The released files keep the activation's state in a dictionary; a state_dict spells it out ("activation.k").
    state: Any = {
        name: tensors[f"activation.{name}"] for name in ("k", "postact_fn") if f"activation.{name}" in tensors
    }
    for name, value in dict(tensors.get("activation_state_dict") or {}).items():
        if state.setdefault(name, value) != value:
            raise FormatError(f"{path} gives two different values of {name}: {state[name]!r} and {value!r}")
    parts = Parts(w["encoder.weight"].t(), w["decoder.weight"].t(), w["latent_bias"], w["pre_bias"])
    if activation == "TopK":
        after = state.get("postact_fn", "ReLU")
        if after not in ("ReLU", "Identity"):
            raise FormatError(f"{files.name} puts the k largest through {after!r}; ReLU and Identity are read")
        parts.k, parts.relu, parts.normalize_activations = state.get("k"), after == "ReLU", "layer_norm"
        if not isinstance(parts.k, int):
            raise FormatError(f"{path} has a TopK activation without k")
    elif activation != "ReLU":
        raise FormatError(f"{files.name} has the activation {activation!r}; TopK and ReLU are read")
    parts.metadata = _provenance(files)
    return parts.build(files, NAME)


def _provenance(files: Files) -> dict[str, Any]:
    """Model and hook, read from paths such as gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt."""
    place = re.search(rf"({'|'.join(_HOOKS)})\w*/autoencoders/(\d+)\.pt", files.named.replace("\\", "/"))
    return {
        "model_name": "gpt2" if "gpt2-small" in files.named else None,
        "hook_name": f"blocks.{place[2]}.{_HOOKS[place[1]]}" if place else None,
    }
