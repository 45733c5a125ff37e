"""Gemma Scope (params.npz) and Gemma Scope 2 (params.safetensors + config.json): JumpReLU SAEs by Google DeepMind.

Rule of both tutorials: h = x @ W_enc + b_enc, z = relu(h) where h > threshold, x_hat = z @ W_dec + b_dec; b_dec is
not subtracted from the input.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from rsae_triton.common.archives import read_npz
from rsae_triton.common.errors import FormatError
from rsae_triton.common.files import read_json, read_safetensors
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.teachers.parts import Files, Parts, layer_of, require

NAME = "gemma_scope"
NPZ, SAFETENSORS = "params.npz", "params.safetensors"
LOOKS_FOR = f"{NPZ}, or {SAFETENSORS} (Gemma Scope 2)"
_HOOKS = {
    "self_attn.o_proj.input": "attn.hook_z",
    "post_feedforward_layernorm.output": "hook_mlp_out",
    "output": "hook_resid_post",
}


def recognises(files: Files) -> bool:
    return files.has(NPZ) or files.has(SAFETENSORS)


def read(files: Files) -> SparseAutoencoder:
    """A teacher from either generation."""
    names = ("b_enc", "b_dec", "threshold")
    if files.has(NPZ):
        path = files.folder / NPZ
        arrays = {"W_" + name[2:] if name.startswith("w_") else name: one for name, one in read_npz(path).items()}
        w = require(arrays, path, "W_enc", "W_dec", *names)
        return _build(w, w["W_enc"], w["W_dec"], _provenance(files), files)
    path = files.folder / SAFETENSORS
    tensors = read_safetensors(path)
    if "affine_skip_connection" in tensors:
        raise FormatError(f"{files.name} is a transcoder with an affine skip connection, which an SAE has not")
    w = require(tensors, path, "w_enc", "w_dec", *names)
    return _build(w, w["w_enc"], w["w_dec"], _provenance_2(files), files)


def _build(
    w: dict[str, Tensor], W_enc: Tensor, W_dec: Tensor, metadata: dict[str, Any], files: Files
) -> SparseAutoencoder:
    parts = Parts(
        W_enc,
        W_dec,
        w["b_enc"],
        w["b_dec"],
        threshold=w["threshold"],
        apply_b_dec_to_input=False,
        metadata=metadata,
    )
    return parts.build(files, NAME)


def _provenance(files: Files) -> dict[str, Any]:
    """From names such as google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71."""
    repo = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)", files.named)
    layer = layer_of(files.named, r"layer_(\d+)")
    if repo is None:
        return {"layer": layer}
    size, tuned, site = repo.groups()
    place = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z", "transcoders": None}[site]
    return {
        "model_name": f"google/gemma-2-{size}{'-it' if tuned == 'it' else ''}",
        "hook_name": f"blocks.{layer}.{place}" if place and layer is not None else None,
        "transcoder": True if site == "transcoders" else None,
    }


def _provenance_2(files: Files) -> dict[str, Any]:
    path = files.folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise FormatError(f"{path} has architecture={config['architecture']!r}; Gemma Scope 2 is jump_relu")
    inside, outside = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    place = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", str(inside))
    name = f"blocks.{place[1]}.{_HOOKS[place[2]]}" if place and place[2] in _HOOKS else None
    transcoder = outside is not None and outside != inside
    return {
        "model_name": config.get("model_name"),
        "hook_name": None if transcoder else name,
        "hf_hook_point_in": inside,
        "transcoder": transcoder or None,
    }
