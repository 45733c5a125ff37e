"""circuit-tracer: writes transcoders in its layout, one file per layer and a config.yaml.

    write_transcoders({0: first, 1: second}, "out/transcoders")

It supports ReLU and JumpReLU only, so a Rational transcoder must first be converted to the nearest JumpReLU one
(`to_jumprelu`, which says how much that loses). `load_teacher` reads the files back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from rsae_triton.common.checks import check_finite
from rsae_triton.common.errors import ConfigError
from rsae_triton.common.files import as_path, make_folder, write_together
from rsae_triton.sae.transcoder import JumpReluTranscoder, ReluTranscoder, Transcoder

CONFIG, THRESHOLD = "config.yaml", "activation_function.threshold"


def write_transcoders(
    transcoders: Mapping[int, Transcoder], folder: str | Path, *, scan: str | None = None, repo: str | None = None
) -> Path:
    """Writes layer_N.safetensors for every layer, for raw activations, and config.yaml.

    Args:
        transcoders: by layer. circuit-tracer itself needs every layer from 0 on, all with the same d_sae.
        scan: its name for a set of feature pictures. repo: the hub repository that the folder will be uploaded to; the
            paths in config.yaml are then paths in it, else paths in this folder.

    Returns:
        The folder.

    Raises:
        ConfigError: a kind that circuit-tracer does not have, or transcoders of different widths or places.
    """
    folder = as_path("folder", folder)
    if not isinstance(transcoders, Mapping) or not transcoders:
        raise ConfigError("transcoders is empty or no dictionary; give them by layer, {0: ..., 1: ...}")
    weights = {layer: tensors(one) for layer, one in transcoders.items()}
    places = {_places(layer, one) for layer, one in transcoders.items()}
    models = {str(one.metadata.get("model_name")) for one in transcoders.values()}
    if len(places) > 1 or len(models) > 1:
        raise ConfigError(
            f"the transcoders are of different places or models ({', '.join(map(str, sorted(places)))}; "
            f"{', '.join(sorted(models))}); write each set apart"
        )
    inside, outside = next(iter(places))
    names = {layer: f"layer_{layer}.safetensors" for layer in sorted(transcoders)}
    at = f"hf://{repo}" if repo else str(folder.absolute())
    lines = {
        "model_name": next(iter(models)),
        "model_kind": "transcoder_set",
        "feature_input_hook": inside,
        "feature_output_hook": outside,
        "scan": scan or "",
    }
    text = "".join(f"{name}: {json.dumps(value)}\n" for name, value in lines.items())
    text += "transcoders:\n" + "".join(f"  - {json.dumps(f'{at}/{name}')}\n" for name in names.values())
    make_folder(folder)
    files = {name: _writer(weights[layer]) for layer, name in names.items()}
    write_together(folder, {**files, CONFIG: lambda path: path.write_text(text, encoding="utf-8")})
    return folder


def tensors(transcoder: Transcoder) -> dict[str, Tensor]:
    """The weights of a transcoder in circuit-tracer's layout: W_enc and W_dec are [d_transcoder, d_model].

    Raises:
        ConfigError: a kind that circuit-tracer does not have.
    """
    if not isinstance(transcoder, ReluTranscoder | JumpReluTranscoder):
        hint = "; use to_jumprelu(inputs, targets=...) first" if hasattr(transcoder, "gate") else ""
        raise ConfigError(f"circuit-tracer knows ReLU and JumpReLU transcoders, not {type(transcoder).__name__}{hint}")
    if transcoder.d_out != transcoder.d_in:
        raise ConfigError(
            f"circuit-tracer's transcoders have one width, not d_in={transcoder.d_in}, d_out={transcoder.d_out}"
        )
    if transcoder.all_units not in (None, (1.0, 1.0)):
        raise ConfigError("the transcoder reads a store's units; use to_units_(1.0) for raw activations")
    found = {
        "W_enc": transcoder.W_enc.t(),
        "W_dec": transcoder.W_dec,
        "b_enc": transcoder.b_enc,
        "b_dec": transcoder.b_dec,
        **({} if transcoder.W_skip is None else {"W_skip": transcoder.W_skip}),
        **({THRESHOLD: transcoder.threshold} if isinstance(transcoder, JumpReluTranscoder) else {}),
    }
    found = {name: one.detach().cpu().contiguous() for name, one in found.items()}
    for name, one in found.items():
        check_finite(name, one, "nothing was written")
    return found


def _places(layer: int, transcoder: Transcoder) -> tuple[str, str]:
    """The names of its two hooks without the layer, after checking that they are in this layer."""
    names = []
    for key in ("hook_name", "hook_name_out"):
        found = re.fullmatch(r"blocks\.(\d+)\.(.+)", str(transcoder.metadata.get(key)))
        if found is None or int(found[1]) != layer:
            raise ConfigError(
                f"the transcoder for layer {layer} says {key}={transcoder.metadata.get(key)!r}; give one of that layer"
            )
        names.append(found[2])
    return names[0], names[1]


def _writer(weights: dict[str, Tensor]) -> Callable[[Path], Any]:
    return lambda path: save_file(weights, path)
