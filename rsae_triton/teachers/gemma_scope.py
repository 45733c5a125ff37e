"""Gemma Scope (params.npz) and Gemma Scope 2 (params.safetensors + config.json): JumpReLU SAEs by Google DeepMind.

The encode rule, from both tutorials: h = x @ W_enc + b_enc, z = relu(h) where h > threshold, x_hat = z @ W_dec + b_dec;
b_dec is not subtracted from the input.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from rsae_triton.common.archives import read_npz
from rsae_triton.common.errors import FormatError
from rsae_triton.common.files import read_json, read_safetensors
from rsae_triton.common.names import hub_model
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.teachers.parts import Files, Parts, layer_of, require

NAME = "gemma_scope"
NPZ, SAFETENSORS = "params.npz", "params.safetensors"
LOOKS_FOR = f"{NPZ}, or {SAFETENSORS} (Gemma Scope 2)"
NO_CLT = "only transcoders of one layer and SAEs are read (circuit-tracer takes such sets as they are)"
_HOOKS = {
    "pre_feedforward_layernorm.output": "mlp.hook_in",
    "self_attn.o_proj.input": "attn.hook_z",
    "post_feedforward_layernorm.output": "hook_mlp_out",
    "output": "hook_resid_post",
}


def recognises(files: Files) -> bool:
    """Whether this is a file of Gemma Scope or Gemma Scope 2."""
    return files.has(NPZ) or files.has(SAFETENSORS)


def read(files: Files) -> SparseAutoencoder:
    """Reads a teacher of either generation.

    Raises:
        FormatError: a cross-layer transcoder, or a folder where nothing says whether it holds an SAE or a transcoder
            (both have the same tensors).
    """
    names = ("b_enc", "b_dec", "threshold")
    if files.has(NPZ):
        path = files.folder / NPZ
        arrays = {"W_" + name[2:] if name.startswith("w_") else name: one for name, one in read_npz(path).items()}
        return _build(require(arrays, path, "W_enc", "W_dec", *names), _place(files), files)
    path = files.folder / SAFETENSORS
    tensors = read_safetensors(path)
    if getattr(tensors.get("w_dec"), "ndim", 2) != 2:
        raise FormatError(f"{files.name} is a cross-layer transcoder, whose features write to many layers; {NO_CLT}")
    w = require(tensors, path, "w_enc", "w_dec", *names, optional=("affine_skip_connection",))
    weights = {{"w_enc": "W_enc", "w_dec": "W_dec"}.get(name, name): one for name, one in w.items()}
    return _build(weights, _place_2(files), files)


def _build(w: dict[str, Tensor], place: dict[str, Any], files: Files) -> SparseAutoencoder:
    transcoder = place.get("hook_name_out") is not None or files.kind == "transcoder"
    skip = w.get("affine_skip_connection")
    if skip is not None and not transcoder:
        raise FormatError(f"{files.name} has an affine skip connection, which an SAE has not; pass kind='transcoder'")
    parts = Parts(
        w["W_enc"],
        w["W_dec"],
        w["b_enc"],
        w["b_dec"],
        threshold=w["threshold"],
        apply_b_dec_to_input=False,
        transcoder=transcoder,
        W_skip=None if skip is None else skip.t(),
        metadata=place,
    )
    if place.get("hook_name") == "hook_embed":
        # These were trained on embeddings before Gemma multiplies them by sqrt(d_model); hook_embed is read after that.
        parts.fold_input_scale(parts.d_in**-0.5, "embeddings are multiplied by sqrt(d_model) after it")
    return parts.build(files, NAME)


def _unknown(files: Files) -> dict[str, Any]:
    """Metadata for a folder whose name says nothing: the kind that the caller gave."""
    if files.kind is None:
        raise FormatError(
            f"nothing says whether {files.name} holds an SAE or a transcoder, which have the same tensors: keep the "
            "repository's name in the path, as in gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71, or pass "
            "kind='sae' or kind='transcoder'"
        )
    return {"layer": layer_of(files.named, r"layer_(\d+)")}


def _place(files: Files) -> dict[str, Any]:
    """Model and hook, read from names such as google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71."""
    repo = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)", files.named)
    layer = layer_of(files.named, r"layer_(\d+)")
    if repo is None:
        return _unknown(files)
    size, tuned, site = repo.groups()
    model = {"model_name": f"google/gemma-2-{size}{'-it' if tuned == 'it' else ''}"}
    if site == "res" and "embedding/" in files.named:
        return {**model, "hook_name": "hook_embed"}
    place = {
        "res": "hook_resid_post",
        "mlp": "hook_mlp_out",
        "att": "attn.hook_z",
        "transcoders": "ln2.hook_normalized",
    }
    names = {"hook_name": None if layer is None else f"blocks.{layer}.{place[site]}"}
    if site == "transcoders":
        names["hook_name_out"] = f"blocks.{layer}.hook_mlp_out"
    return {**model, **names}


def _place_2(files: Files) -> dict[str, Any]:
    """Model and hook from config.json; if there is none, from names such as
    gemma-scope-2-1b-pt/transcoder/layer_13_width_16k."""
    path = files.folder / "config.json"
    config = read_json(path) if path.is_file() else _inferred(files)
    if config is None:
        return _unknown(files)
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise FormatError(f"{path} has architecture={config['architecture']!r}; Gemma Scope 2 is jump_relu")
    inside, outside = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    transcoder = (outside is not None and outside != inside) or files.kind == "transcoder"
    names = {"hook_name": _hook(inside), "hook_name_out": (_hook(outside) or str(outside)) if transcoder else None}
    model = config.get("model_name")
    return {
        "model_name": hub_model(model if "/" in model else f"google/{model}") if isinstance(model, str) else None,
        **names,
        "hf_hook_point_in": inside,
        "hf_hook_point_out": outside,
    }


def _inferred(files: Files) -> dict[str, Any] | None:
    """Rebuilds config.json of Gemma Scope 2 from the folder's name, since some folders of the release lack it."""
    found = re.search(
        r"gemma-scope-2-(\w+-\w+)/(transcoder|clt|resid_post|attn_out|mlp_out)\w*/layer_(\d+)", files.named
    )
    if found is None:
        return None
    model, site, layer = found.groups()
    at = f"model.layers.{layer}."
    inside = {
        "resid_post": "output",
        "attn_out": "self_attn.o_proj.input",
        "mlp_out": "post_feedforward_layernorm.output",
    }
    if site in ("transcoder", "clt"):
        places = {"hf_hook_point_in": f"{at}pre_feedforward_layernorm.output"}
        places["hf_hook_point_out"] = f"{at}post_feedforward_layernorm.output"
    else:
        places = {"hf_hook_point_in": at + inside[site]}
    return {"model_name": f"gemma-3-{model}", **places}


def _hook(place: Any) -> str | None:
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", str(place))
    return f"blocks.{found[1]}.{_HOOKS[found[2]]}" if found and found[2] in _HOOKS else None
