"""Llama Scope, and files saved by OpenMOSS' library (lm_saes, llamascopium).

The encode rule, from its `models/sae.py`: the activations are scaled (dataset-wise: by sqrt(d_model) / their average
norm; token-wise: to the norm sqrt(d_model)), h = x @ W_E + b_E, and z is h where it is active. What is active is
decided on h * ||W_D row|| if `sparsity_include_decoder_norm` (the library's default), on h otherwise. Reconstructions
are scaled back. SAELens 6.54 leaves the decoder norm out and multiplies the threshold by the input's scale.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsae_triton.common.errors import FormatError
from rsae_triton.common.files import read_json, read_safetensors
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.pretrained import WEIGHTS_FILE
from rsae_triton.teachers.parts import Files, Parts, require

NAME = "llama_scope"
WEIGHTS = (WEIGHTS_FILE, "checkpoints/pruned.safetensors", "checkpoints/final.safetensors")
LOOKS_FOR = (
    "hyperparams.json + checkpoints/final.safetensors, or config.json with d_model and act_fn + sae_weights.safetensors"
)
_OLD = {"encoder.weight": "W_E", "encoder.bias": "b_E", "decoder.weight": "W_D", "decoder.bias": "b_D"}
_NORM = "dataset_average_activation_norm."


def recognises(files: Files) -> bool:
    """Whether this is a folder of Llama Scope or of OpenMOSS' library."""
    if not any((files.folder / name).is_file() for name in WEIGHTS):
        return False
    if (files.folder / "hyperparams.json").is_file():
        return True
    path = files.folder / "config.json"
    return path.is_file() and {"d_model", "act_fn"} <= read_json(path).keys()


def read(files: Files) -> SparseAutoencoder:
    """Reads a teacher from one SAE's folder."""
    old = files.folder / "hyperparams.json"
    config_path = old if old.is_file() else files.folder / "config.json"
    config = read_json(config_path)
    path = next((files.folder / name for name in WEIGHTS if (files.folder / name).is_file()), None)
    if path is None:
        raise FormatError(f"{files.folder} holds none of {', '.join(WEIGHTS)}")
    if config.get("sae_type", "sae") != "sae" or config.get("use_glu_encoder"):
        raise FormatError(
            f"{config_path} describes a {config.get('sae_type', 'sae')} with "
            f"use_glu_encoder={config.get('use_glu_encoder', False)}; plain SAEs and transcoders are read"
        )
    w, norms, log_threshold = _tensors(read_safetensors(path), path)
    act_fn = str(config.get("act_fn", "relu")).lower()
    inside, outside = config.get("hook_point_in"), config.get("hook_point_out")
    transcoder = outside is not None and outside != inside
    parts = Parts(
        w["W_E"],
        w["W_D"],
        w["b_E"],
        w.get("b_D") if config.get("use_decoder_bias", True) else None,
        # Files of the first release have this field; the library has since dropped it, together with the bias it
        # controls.
        apply_b_dec_to_input=bool(config.get("apply_decoder_bias_to_pre_encoder", False)),
        transcoder=transcoder,
        metadata={
            "model_name": _model(files),
            "hook_name": inside,
            "hook_name_out": outside if transcoder else None,
        },
    )
    if act_fn == "jumprelu":
        parts.threshold = _threshold(config, log_threshold, parts.d_sae, config_path)
        if config.get("sparsity_include_decoder_norm", True):
            norm = parts.W_dec.float().norm(dim=1)
            # A feature whose decoder row is zero is never active in the original: its score is 0.
            parts.threshold = torch.where(norm > 0, parts.threshold / norm, torch.finfo(torch.float32).max)
            parts.folded.append("sparsity_include_decoder_norm: threshold / decoder norm")
    elif act_fn == "topk":
        parts.k = config.get("top_k")
        if config.get("sparsity_include_decoder_norm", True):
            parts.fold_decoder_norm("sparsity_include_decoder_norm")
    elif act_fn != "relu":
        raise FormatError(f"{config_path} has act_fn={act_fn!r}, which looks at a whole batch; convert it to jumprelu")
    _normalization(parts, config, norms, (inside, outside), files)
    return parts.build(files, NAME)


def _model(files: Files) -> str | None:
    if "Llama-Scope-R1-Distill" in files.named:
        return "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    return "meta-llama/Llama-3.1-8B" if "Llama3_1-8B" in files.named else None


def _tensors(tensors: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, float], Tensor | None]:
    """Returns the weights under the library's present names ([d_model, d_sae] and [d_sae, d_model]), the norms, and the
    log threshold."""
    norms = {name.removeprefix(_NORM): float(one) for name, one in tensors.items() if name.startswith(_NORM)}
    log_threshold = None
    weights = {}
    for name, one in tensors.items():
        if name.startswith(_NORM):
            continue
        if name.endswith("log_jumprelu_threshold"):
            log_threshold = one
        else:
            weights[_OLD.get(name, name)] = one.t() if name.endswith(".weight") else one
    return require(weights, path, "W_E", "b_E", "W_D", optional=("b_D",)), norms, log_threshold


def _threshold(config: dict[str, Any], log_threshold: Tensor | None, d_sae: int, path: Path) -> Tensor:
    if log_threshold is not None:
        return log_threshold.float().exp().expand(d_sae).clone()
    if not isinstance(config.get("jump_relu_threshold"), int | float):
        raise FormatError(f"{path} describes a JumpReLU, but neither it nor the weights hold a threshold")
    return torch.full((d_sae,), float(config["jump_relu_threshold"]))


def _normalization(
    parts: Parts, config: dict[str, Any], norms: dict[str, float], hooks: tuple[Any, Any], files: Files
) -> None:
    mode = config.get("norm_activation", "dataset-wise")
    if mode == "inference":
        return
    if mode == "token-wise":
        parts.normalize_activations = "constant_norm_rescale"
        return
    if mode != "dataset-wise":
        raise FormatError(
            f"{files.name} has norm_activation={mode!r}, whose code depends on the other tokens of a batch"
        )
    norms = norms or dict(config.get("dataset_average_activation_norm") or {})
    inside, outside = (hook if hook in norms else end for hook, end in zip(hooks, ("in", "out"), strict=True))
    own = None
    if parts.transcoder:
        if inside not in norms or outside not in norms:
            raise FormatError(f"{files.name} is a transcoder, and its files do not hold the norms it was trained with")
        widths = (parts.d_in, parts.d_out)
        scales = [
            width**0.5 / norms[end] if norms[end] > 0 else math.nan
            for width, end in zip(widths, (inside, outside), strict=True)
        ]
        parts.fold_scales(scales[0], scales[1], "dataset-wise norms")
        return
    if inside in norms:
        if abs(norms.get(outside, norms[inside]) - norms[inside]) > 1e-3 * abs(norms[inside]):
            raise FormatError(f"{files.name} scales its input and output by different norms: it is a transcoder")
        own = parts.d_in**0.5 / norms[inside] if norms[inside] > 0 else float("nan")
    scale = files.scale(own)
    if scale is None:
        raise FormatError(
            f"{files.name} was trained on activations scaled dataset-wise, and no average norm is in its files; "
            "pass activation_scale=sqrt(d_in)/average norm"
        )
    parts.fold_input_scale(scale, "dataset-wise norm")
