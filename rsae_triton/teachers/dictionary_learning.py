"""dictionary_learning: ae.pt and config.json, for each of its seven dictionary classes.

The rules were read in, and the tests run against, dictionary_learning 0.1.0 (`dictionary.py`, `trainers/*.py`,
`utils.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsae_triton.common.archives import read_torch
from rsae_triton.common.errors import FormatError
from rsae_triton.common.files import read_json
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.teachers.parts import Files, Parts, require

NAME = "dictionary_learning"
LOOKS_FOR = "ae.pt + config.json with trainer.dict_class"


def recognises(files: Files) -> bool:
    """Whether this is an ae.pt of dictionary_learning."""
    return files.has("ae.pt") and files.path.name != "config.json"


def read(files: Files) -> SparseAutoencoder:
    """Reads a teacher from a dictionary_learning folder, or from the ae.pt in it."""
    path, config_path = files.folder / "ae.pt", files.folder / "config.json"
    config = read_json(config_path)
    trainer = config.get("trainer")
    kind = trainer.get("dict_class") if isinstance(trainer, dict) else None
    if kind in ("CrossCoder", "BatchTopKCrossCoder"):
        raise FormatError(f"{files.name} is a crosscoder, which reads several places at once; take an SAE of one place")
    if kind not in _CLASSES:
        raise FormatError(f"{config_path} names dict_class={kind!r}; known are {', '.join(_CLASSES)}")
    assert isinstance(trainer, dict)
    tensors = read_torch(path)
    if kind == "AutoEncoderTopK" and "k" not in tensors:
        # Before December 2024 the class held k as a number; the library takes it from config.json, as we do.
        tensors["k"] = _k(trainer, files, config_path)
    parts = _CLASSES[kind](tensors, path)
    parts.metadata = _provenance(trainer, kind)
    return parts.build(files, NAME)


def _k(trainer: dict[str, Any], files: Files, config_path: Path) -> Tensor:
    said = trainer.get("k")
    if said is not None and files.k is not None and said != files.k:
        raise FormatError(f"{config_path} says k={said!r}, and k={files.k} was given; leave it out")
    k = files.k if said is None else said
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise FormatError(f"{config_path} gives k={k!r}, and ae.pt holds none; pass k=, the active features per token")
    return torch.tensor(k)


def _provenance(trainer: dict[str, Any], kind: str) -> dict[str, Any]:
    layer, submodule = trainer.get("layer"), trainer.get("submodule_name")
    residual = submodule is None or str(submodule).startswith("resid_post")
    return {
        "model_name": trainer.get("lm_name"),
        "hook_name": f"blocks.{layer}.hook_resid_post" if residual and isinstance(layer, int) else None,
        "submodule_name": submodule,
        "dict_class": kind,
        "k": trainer.get("k"),
        "group_fractions": trainer.get("group_fractions"),
    }


def _standard(tensors: dict[str, Any], path: Path) -> Parts:
    w = require(tensors, path, "bias", "encoder.weight", "encoder.bias", "decoder.weight")
    parts = Parts(w["encoder.weight"].t(), w["decoder.weight"].t(), w["encoder.bias"], w["bias"])
    # As AutoEncoder.from_pretrained does by default, so that codes of differently trained SAEs can be compared.
    return parts.fold_decoder_norm("AutoEncoder.normalize_decoder")


def _new(tensors: dict[str, Any], path: Path) -> Parts:
    w = require(tensors, path, "encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
    return Parts(
        w["encoder.weight"].t(),
        w["decoder.weight"].t(),
        w["encoder.bias"],
        w["decoder.bias"],
        apply_b_dec_to_input=False,
    )


def _gated(tensors: dict[str, Any], path: Path) -> Parts:
    names = ("decoder_bias", "encoder.weight", "decoder.weight", "r_mag", "gate_bias", "mag_bias")
    w = require(tensors, path, *names)
    parts = Parts(w["encoder.weight"].t(), w["decoder.weight"].t(), None, w["decoder_bias"])
    return parts.gated(w["r_mag"], w["gate_bias"], w["mag_bias"])


def _jumprelu(tensors: dict[str, Any], path: Path) -> Parts:
    w = require(tensors, path, "W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    return Parts(w["W_enc"], w["W_dec"], w["b_enc"], w["b_dec"], threshold=w["threshold"], apply_b_dec_to_input=False)


def _topk(tensors: dict[str, Any], path: Path) -> Parts:
    names = ("k", "b_dec", "encoder.weight", "encoder.bias", "decoder.weight")
    w = require(tensors, path, *names, optional=("threshold",))
    return Parts(w["encoder.weight"].t(), w["decoder.weight"].t(), w["encoder.bias"], w["b_dec"], k=int(w["k"]))


def _batchtopk(tensors: dict[str, Any], path: Path) -> Parts:
    names = ("threshold", "b_dec", "encoder.weight", "encoder.bias", "decoder.weight")
    w = require(tensors, path, *names, optional=("k",))
    return Parts(
        w["encoder.weight"].t(), w["decoder.weight"].t(), w["encoder.bias"], w["b_dec"], threshold=w["threshold"]
    )


def _matryoshka(tensors: dict[str, Any], path: Path) -> Parts:
    w = require(tensors, path, "threshold", "W_enc", "b_enc", "W_dec", "b_dec", optional=("k", "group_sizes"))
    return Parts(w["W_enc"], w["W_dec"], w["b_enc"], w["b_dec"], threshold=w["threshold"])


_CLASSES: dict[str, Callable[[dict[str, Any], Path], Parts]] = {
    "AutoEncoder": _standard,
    "AutoEncoderNew": _new,
    "GatedAutoEncoder": _gated,
    "JumpReluAutoEncoder": _jumprelu,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batchtopk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
}
