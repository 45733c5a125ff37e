"""The SAEs being upgraded: to train, or to load from what people have."""

from __future__ import annotations

from pathlib import Path

from ..base import CONFIG_FILE, SparseAutoencoder, read_folder
from ..errors import ConfigError, FormatError
from .architectures import JumpReluSAE, ReluSAE, TopKSAE, keep_largest

__all__ = [
    "ARCHITECTURES",
    "JumpReluSAE",
    "ReluSAE",
    "SparseAutoencoder",
    "TopKSAE",
    "keep_largest",
    "load_teacher",
]

ARCHITECTURES: dict[str, type[SparseAutoencoder]] = {
    kind.architecture: kind for kind in (ReluSAE, JumpReluSAE, TopKSAE)
}
# What SAELens writes about its own training, and what changes nothing in how codes are computed when it has
# the value here; any other value would make our codes differ from the original's, so it is refused.
_NEUTRAL = {
    "normalize_activations": ("none", None),
    "reshape_activations": ("none", None),
    "rescale_acts_by_decoder_norm": (False, None),
}


def load_teacher(source: str | Path, format: str = "auto") -> SparseAutoencoder:
    """Loads a ReLU, JumpReLU or TopK SAE.

    Args:
        source: a folder with cfg.json and sae_weights.safetensors (SAELens 6, or our `save_pretrained`).
        format: "auto" or "saelens".

    Raises:
        FormatError: not such a folder, corrupt files, or a setting whose codes we would not reproduce exactly.
        ConfigError: an unknown format.
    """
    if format not in ("auto", "saelens"):
        raise ConfigError(f"format is {format!r}; this version reads 'saelens' ({CONFIG_FILE} + safetensors)")
    config, weights = read_folder(source)
    kind = ARCHITECTURES.get(config["architecture"])
    if kind is None:
        hint = (
            " (load a rational SAE with FusedRationalSAE.from_pretrained)"
            if config["architecture"] == "rational"
            else ""
        )
        raise FormatError(
            f"{source} holds an SAE of architecture {config['architecture']!r}{hint}; teachers are "
            f"{', '.join(ARCHITECTURES)}"
        )
    for name, neutral in _NEUTRAL.items():
        if config.get(name) not in neutral:
            raise FormatError(
                f"{source} was saved with {name}={config[name]!r}, which this version does not reproduce; "
                f"fold it into the weights first (SAELens: fold_activation_norm_scaling_factor, fold_W_dec_norm)"
            )
    return kind.from_files(config, weights, source)
