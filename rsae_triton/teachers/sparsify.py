"""EleutherAI sparsify: cfg.json and sae.safetensors, one folder per hookpoint.

The rules were read in, and the tests run against, eai-sparsify 1.3.3 (`sparse_coder.py`, `fused_encoder.py`). SAELens
6.54 reads this format wrongly: it transposes W_dec and takes b_dec to be subtracted only where the decoder is not
normalised.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

from rsae_triton.common.checks import shown
from rsae_triton.common.errors import FormatError
from rsae_triton.common.files import read_json, read_safetensors
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.pretrained import CONFIG_FILE
from rsae_triton.teachers.parts import Files, Parts, require

NAME = "sparsify"
WEIGHTS = "sae.safetensors"
LOOKS_FOR = f"{CONFIG_FILE} with d_in and k + {WEIGHTS}"


def recognises(files: Files) -> bool:
    """Whether this is a folder of sparsify."""
    return files.has(CONFIG_FILE, WEIGHTS)


def read(files: Files) -> SparseAutoencoder:
    """Reads a teacher from the folder of one hookpoint."""
    config_path, path = files.folder / CONFIG_FILE, files.folder / WEIGHTS
    config = read_json(config_path)
    if config.get("activation", "topk") != "topk" or config.get("signed"):
        raise FormatError(
            f"{files.name} selects with activation={config.get('activation', 'topk')!r}, "
            f"signed={config.get('signed', False)}; only the k largest are read"
        )
    k = config.get("k")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise FormatError(f"{config_path} gives k={k!r}; it must be a positive integer")
    tensors = read_safetensors(path)
    transcode, skip = bool(config.get("transcode", False)), bool(config.get("skip_connection", False))
    if skip and not transcode:
        raise FormatError(f"{files.name} has a linear skip connection from its input, which an SAE has not")
    w = require(tensors, path, "encoder.weight", "encoder.bias", "W_dec", "b_dec", *["W_skip"] * skip)
    parts = Parts(
        w["encoder.weight"].t(),
        w["W_dec"],
        w["encoder.bias"],
        w["b_dec"],
        apply_b_dec_to_input=not transcode,
        k=k,
        transcoder=transcode,
        W_skip=w.get("W_skip"),
        metadata=_provenance(files, transcode),
    )
    sizes: dict[str, Any] = {"d_in": config.get("d_in"), "num_latents": config.get("num_latents") or 0}
    sizes["expansion_factor"] = config.get("expansion_factor", 32)
    for name, size in sizes.items():  # checked here because a text or a list can be multiplied too
        # the expansion factor need not be a whole number
        kinds = (int, float) if name == "expansion_factor" else (int,)
        if type(size) not in kinds or not 0 <= size < 2**31:
            raise FormatError(f"{config_path} gives {name}={shown(size)}; it must be a positive integer")
    d_in, expected = sizes["d_in"], sizes["num_latents"] or sizes["d_in"] * sizes["expansion_factor"]
    if (parts.d_in, parts.d_sae) != (d_in, expected):
        raise FormatError(
            f"{config_path} makes it d_in={d_in}, {expected} latents, but {path.name} holds {parts.d_in} and "
            f"{parts.d_sae}; the files do not belong together"
        )
    return parts.build(files, NAME)


def _provenance(files: Files, transcode: bool) -> dict[str, Any]:
    """Model and hook: the folder's name is the hookpoint, and the run's config.json is in the folder above."""
    run = files.folder.parent / "config.json"
    model = read_json(run).get("model") if run.is_file() else None
    named = PurePosixPath(files.named)
    hookpoint = (named if files.path.is_dir() else named.parent).name
    place = re.fullmatch(r"(?:layers|h)\.(\d+)(\.mlp|\.attention|\.attn)?", hookpoint)
    name = None
    if place:
        kind = {None: "hook_resid_post", ".mlp": "hook_mlp_out"}.get(place[2], "hook_attn_out")
        name = f"blocks.{place[1]}.{kind}"
    elif hookpoint in ("embed_tokens", "embed_in", "wte"):
        name = "hook_embed"
    known = {"model_name": model if isinstance(model, str) else None, "hookpoint": hookpoint}
    if transcode and place and place[2] == ".mlp":
        # The transcoder of a module reads the module's input and writes its output.
        inside, outside = (f"blocks.{place[1]}.mlp.hook_{side}" for side in ("in", "out"))
        return {**known, "hook_name": inside, "hook_name_out": outside}
    return {**known, "hook_name": None if transcode else name}
