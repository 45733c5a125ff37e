"""circuit-tracer: one layer_N.safetensors per transcoder, with config.yaml in the same folder.

The encode rule, from `transcoder/single_layer_transcoder.py`: h = x @ W_enc.T + b_enc, z = relu(h), or h where h >
threshold; y_hat = z @ W_dec + b_dec, and + x @ W_skip.T where there is one. W_enc and W_dec are both [d_transcoder,
d_model].
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rsae_triton.common.errors import FormatError
from rsae_triton.common.files import read_safetensors
from rsae_triton.common.names import hub_model
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.teachers.parts import Files, Parts, require

NAME = "circuit_tracer"
LOOKS_FOR = "layer_N.safetensors with W_enc, W_dec, b_enc, b_dec (a transcoder)"
CONFIG = "config.yaml"
THRESHOLD = "activation_function.threshold"
_FILE = re.compile(r"(?:.*[._-])?layer_(\d+)\.safetensors")


def recognises(files: Files) -> bool:
    """Whether this is a transcoder file of circuit-tracer."""
    return _file(files) is not None


def read(files: Files) -> SparseAutoencoder:
    """Reads the transcoder in one layer's file."""
    path = _file(files)
    if path is None:
        raise FormatError(f"{files.name} is not one layer_N.safetensors; name the layer's file")
    w = require(
        read_safetensors(path),
        path,
        "W_enc",
        "W_dec",
        "b_enc",
        "b_dec",
        optional=("W_skip", THRESHOLD, "log_thresholds"),
    )
    if "log_thresholds" in w:
        raise FormatError(
            f"{path} holds log_thresholds, which circuit-tracer refuses too; save it anew with thresholds"
        )
    parts = Parts(
        w["W_enc"].t(),
        w["W_dec"],
        w["b_enc"],
        w["b_dec"],
        threshold=w.get(THRESHOLD),
        transcoder=True,
        W_skip=w.get("W_skip"),
        metadata=_place(files, path),
    )
    return parts.build(files, NAME)


def _file(files: Files) -> Path | None:
    if files.path.is_file():
        return files.path if _FILE.fullmatch(files.path.name) else None
    found = sorted(one for one in files.folder.iterdir() if _FILE.fullmatch(one.name))
    return found[0] if len(found) == 1 else None


def _place(files: Files, path: Path) -> dict[str, Any]:
    """Model and hooks from config.yaml; without one, the hooks that the library's Llama and Qwen transcoders use."""
    layer = _FILE.fullmatch(path.name)
    assert layer is not None
    config = path.parent / CONFIG
    said = _lines(config) if config.is_file() else {}
    named = re.search(r"qwen3-([\d.]+)b", files.named)
    model = said.get("model_name") or (f"Qwen/Qwen3-{named[1]}B" if named else None)
    inside, outside = said.get("feature_input_hook", "mlp.hook_in"), said.get("feature_output_hook", "hook_mlp_out")
    return {
        "model_name": None if model is None else hub_model(model),
        "hook_name": f"blocks.{layer[1]}.{inside}",
        "hook_name_out": f"blocks.{layer[1]}.{outside}",
    }


def _lines(path: Path) -> dict[str, str]:
    """Reads the plain "name: value" lines of a YAML file."""
    text = path.read_text(encoding="utf-8", errors="replace")[: 1 << 16]
    found = re.findall(r"^(\w+):[ \t]*[\"']?([^\"'\n#]+?)[\"']?[ \t]*$", text, re.MULTILINE)
    return {name: value.strip() for name, value in found}
