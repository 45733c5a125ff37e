"""SAELens: cfg.json and sae_weights.safetensors, as saved by version 6, by earlier versions, and by this package.

The rules were read in, and the tests run against, sae_lens 6.54 (`saes/*.py`, `loading/pretrained_sae_loaders.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsae_triton.common.errors import FormatError
from rsae_triton.common.files import read_json, read_safetensors
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.normalization import MODES
from rsae_triton.sae.pretrained import CONFIG_FILE, NOT_KEPT, WEIGHTS_FILE, carries_config, parse_dtype, read_pair
from rsae_triton.teachers.parts import Files, Parts, require

NAME = "saelens"
LOOKS_FOR = f"{CONFIG_FILE} with an architecture + {WEIGHTS_FILE}"
ARCHITECTURES = ("standard", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk", "gated")
TRANSCODERS = (
    "transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder", "topk_transcoder",
    "topk_skip_transcoder",
)  # fmt: skip
_REFUSED = {
    "temporal": "it predicts a token's code from the tokens before, so that no gate of one token stands for it",
    "matching_pursuit": "it encodes by a search, not by one product and a gate; its decoder can be given to a ReluSAE",
    "abstopk": "it keeps the k largest by magnitude, of either sign, and a rational gate opens above a threshold",
}
_RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
_PROVENANCE = (
    "model_name", "hook_name", "hook_head_index", "hook_layer", "model_class_name", "model_from_pretrained_kwargs",
    "prepend_bos", "context_size", "dataset_path", "neuronpedia_id", "seqpos_slice", "exclude_special_tokens",
)  # fmt: skip


def recognises(files: Files) -> bool:
    """Whether this is a folder in SAELens' format."""
    if files.has(CONFIG_FILE, WEIGHTS_FILE):
        return True
    return files.path.is_dir() and files.has(WEIGHTS_FILE) and carries_config(files.folder / WEIGHTS_FILE)


def read(files: Files) -> SparseAutoencoder:
    """Reads a teacher from a SAELens folder; docs/formats.md says what is folded and what is refused."""
    config, tensors = read_pair(files.folder)
    return build({**config, **files.overrides}, tensors, files)


def build(config: dict[str, Any], tensors: dict[str, Any], files: Files) -> SparseAutoencoder:
    """Builds a teacher from a configuration and tensors, whether read from a folder or taken from an object."""
    config, path = settings(config, files), files.folder / WEIGHTS_FILE
    dtype = parse_dtype(config.get("dtype", "float32"))
    architecture = config["architecture"]

    def get(*names: str, optional: tuple[str, ...] = ()) -> dict[str, Tensor]:
        found = require(tensors, path, "W_enc", "W_dec", "b_dec", *names, optional=("scaling_factor", *optional))
        # SAELens computes in the configuration's dtype, so weights stored in a narrower one are converted to it.
        return {name: _at_least(one, dtype) for name, one in found.items()}

    options: dict[str, Any] = {
        "apply_b_dec_to_input": config.get("apply_b_dec_to_input", True),
        "metadata": config["metadata"],
    }
    if architecture in TRANSCODERS:
        return _transcoder(config, tensors, path, files)
    if architecture == "gated":
        w = get("r_mag", "b_gate", "b_mag", optional=("b_enc",))
        parts = Parts(w["W_enc"], w["W_dec"], None, w["b_dec"], **options).gated(w["r_mag"], w["b_gate"], w["b_mag"])
    elif architecture == "jumprelu":
        name = "log_threshold" if "log_threshold" in tensors else "threshold"
        w = get("b_enc", name)
        threshold = w[name].float().exp() if name == "log_threshold" else w[name]
        parts = Parts(w["W_enc"], w["W_dec"], w["b_enc"], w["b_dec"], threshold=threshold, **options)
    elif architecture in ("batchtopk", "matryoshka_batchtopk"):
        # Written by TrainingSAE.save_model; save_inference_model converts it to a JumpReLU in the same way.
        w = get("b_enc", "topk_threshold")
        parts = Parts(w["W_enc"], w["W_dec"], w["b_enc"], w["b_dec"], **options)
        if config.get("rescale_acts_by_decoder_norm", False):
            parts.fold_decoder_norm("rescale_acts_by_decoder_norm")
        parts.threshold = w["topk_threshold"].float().expand(parts.d_sae).clone()
        parts.metadata["k"] = config.get("k")
    else:
        w = get("b_enc")
        k = config.get("k") if architecture == "topk" else None
        if architecture == "topk" and k is None:
            raise FormatError(f"{files.folder / CONFIG_FILE} describes a TopK SAE without k")
        relu = config.get("relu", True)  # a setting of ours: SAELens always applies the ReLU
        parts = Parts(w["W_enc"], w["W_dec"], w["b_enc"], w["b_dec"], k=k, relu=relu, **options)
        if architecture == "topk" and config.get("rescale_acts_by_decoder_norm", False):
            parts.fold_decoder_norm("rescale_acts_by_decoder_norm")
    _finetuning(parts, config, w, files)
    _normalization(parts, config, files)
    return parts.build(files, NAME)


def _transcoder(config: dict[str, Any], tensors: dict[str, Any], path: Path, files: Files) -> SparseAutoencoder:
    """Builds a transcoder: SAELens' four kinds, and this package's TopK ones."""
    architecture = str(config["architecture"])
    dtype = parse_dtype(config.get("dtype", "float32"))
    names = ["W_enc", "W_dec", "b_enc", "b_dec"]
    names += ["threshold"] * architecture.startswith("jumprelu") + ["W_skip"] * ("skip" in architecture)
    w = {name: _at_least(one, dtype) for name, one in require(tensors, path, *names).items()}
    if config.get("normalize_activations") not in (None, False, "none"):
        raise FormatError(
            f"{files.name} is a transcoder with normalize_activations={config['normalize_activations']!r}; its "
            "effect on the output is not defined"
        )
    k = config.get("k")
    if architecture.startswith("topk") and k is None:
        raise FormatError(f"{files.folder / CONFIG_FILE} describes a TopK transcoder without k")
    parts = Parts(
        w["W_enc"],
        w["W_dec"],
        w["b_enc"],
        w["b_dec"],
        threshold=w.get("threshold"),
        k=k if architecture.startswith("topk") else None,
        relu=config.get("relu", True),
        transcoder=True,
        W_skip=w.get("W_skip"),
        metadata=config["metadata"],
    )
    return parts.build(files, NAME)


def settings(config: dict[str, Any], files: Files) -> dict[str, Any]:
    """Returns the configuration in SAELens 6's fields, from that layout or the flat one of earlier versions.

    Raises:
        FormatError: an unsupported architecture, or a setting that cannot be reproduced.
    """
    metadata = config.get("metadata")
    metadata = {name: value for name, value in metadata.items() if name not in NOT_KEPT} if metadata else {}
    version = str(config.get("sae_lens_version") or (config.get("metadata") or {}).get("sae_lens_version") or "0")
    if not version.split(".")[0].isdigit() or int(version.split(".")[0]) < 6:
        config = {_RENAMED.get(name, name): value for name, value in config.items()}
        config.setdefault("architecture", "standard")
        metadata = {**{name: config.get(name) for name in _PROVENANCE}, **metadata}
        activation = config.get("activation_fn") or "relu"
        arguments = config.get("activation_fn_kwargs") or {}
        if activation == "topk" and arguments.get("k") is not None:
            config.update(architecture="topk", k=arguments["k"])
        elif activation not in ("relu", "topk"):
            raise FormatError(f"{files.name} has activation_fn={activation!r}; relu and topk are read")
        if arguments.get("signed"):
            raise FormatError(f"{files.name} keeps the k largest by magnitude (signed); there is no such teacher")
    if config.get("architecture") not in (*ARCHITECTURES, *TRANSCODERS):
        name = str(config.get("architecture"))
        loads = "RationalTranscoder" if "transcoder" in name else "FusedRationalSAE"
        known = f"teachers are {', '.join((*ARCHITECTURES, *TRANSCODERS))}"
        hint = _REFUSED.get(name, known)
        if name.startswith("rational"):
            hint = f"load a rational one with {loads}.from_pretrained"
        raise FormatError(f"{files.name} holds an SAE of architecture {config.get('architecture')!r}; {hint}")
    return {**config, "metadata": metadata}


def _finetuning(parts: Parts, config: dict[str, Any], tensors: dict[str, Tensor], files: Files) -> None:
    """Absorbs the trained factor on the codes that SAELens had before version 6."""
    factor = tensors.get("scaling_factor")
    if factor is None or torch.allclose(factor, torch.ones_like(factor)):
        return
    if not config.get("finetuning_scaling_factor"):
        raise FormatError(
            f"{files.name} holds a scaling_factor that is not 1 while finetuning_scaling_factor is off; whether "
            "it belongs to the code is not known"
        )
    parts.fold_code_scale(factor, "finetuning_scaling_factor into W_dec")


def _normalization(parts: Parts, config: dict[str, Any], files: Files) -> None:
    mode = config.get("normalize_activations")
    mode = {None: "none", False: "none", True: "expected_average_only_in"}.get(mode, mode)
    if mode in MODES:
        parts.normalize_activations = mode
    elif mode == "constant_scalar_rescale":
        factor = files.scale(config.get("activation_normalization_factor"))
        if factor is None:
            raise FormatError(
                f"{files.name} multiplies activations by a constant that its {CONFIG_FILE} does not give "
                "(activation_normalization_factor); pass it as activation_scale"
            )
        parts.fold_input_scale(float(factor), mode)
    elif mode == "expected_average_only_in":
        scaler = files.folder / "activation_scaler.json"
        scale = files.scale(read_json(scaler).get("scaling_factor") if scaler.is_file() else None)
        if scale is None:
            raise FormatError(
                f"{files.name} was trained on activations scaled to a mean norm of sqrt(d_in) and the factor is not in "
                "its files (activation_scaler.json); pass it as activation_scale=sqrt(d_in)/mean norm, or 1.0 if it "
                "has been folded into the weights"
            )
        parts.fold_input_scale(float(scale), mode)
    elif mode == "covariance_whitening":
        path = files.folder / "activation_whitening.safetensors"
        if not path.is_file():
            raise FormatError(f"{files.name} was trained on whitened activations, and {path.name} is not beside it")
        w = require(read_safetensors(path), path, "mean", "matrix", "inverse_matrix")
        parts.fold_whitening(w["mean"], w["matrix"], w["inverse_matrix"])
    else:
        raise FormatError(f"{files.name} has normalize_activations={mode!r}, which is not a mode of SAELens 6")


def _at_least(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In this dtype, if its own is narrower; integers are left as they are, and refused as weights."""
    return tensor.to(torch.promote_types(tensor.dtype, dtype)) if tensor.is_floating_point() else tensor
