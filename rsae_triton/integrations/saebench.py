"""SAEBench: wraps an SAE with the attributes that its `BaseSAE` documents (`custom_saes/base_sae.py`, version 0.6).

SAEBench checks attributes, not classes, so it need not be installed here. It requires decoder rows of norm 1; the
wrapper's copy is rescaled to that without changing its reconstructions.
"""

from __future__ import annotations

import copy
import re
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from rsae_triton.common.errors import ConfigError
from rsae_triton.sae.base import SparseAutoencoder


@dataclass
class SAEBenchConfig:
    """The fields of SAEBench's `CustomSAEConfig`."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    context_size: int | None = None
    hook_head_index: int | None = None
    architecture: str = ""
    apply_b_dec_to_input: bool | None = None
    finetuning_scaling_factor: bool = False
    activation_fn_str: str = "relu"
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    prepend_bos: bool = True
    normalize_activations: str = "none"
    dtype: str = ""
    device: str = ""
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = True
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = -100_000
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class SAEBenchSAE(nn.Module):
    """An SAE with SAEBench's interface: W_enc, W_dec, b_enc, b_dec, device, dtype, cfg, encode, decode, forward, to.

    Args:
        sae: is copied; the copy's decoder norms are folded into its codes. model_name: TransformerLens' name of the
            model. hook_name: "blocks.L...". Both are taken from the SAE's metadata when None.

    Raises:
        ConfigError: no model or layer is known, or the SAE normalises every token (SAEBench decodes codes alone).
    """

    def __init__(self, sae: SparseAutoencoder, model_name: str | None = None, hook_name: str | None = None) -> None:
        super().__init__()
        model_name, hook_name = model_name or sae.metadata.get("model_name"), hook_name or sae.metadata.get("hook_name")
        layer = re.search(r"blocks\.(\d+)\.", hook_name or "")
        if not model_name or not hook_name or layer is None:
            raise ConfigError(
                f"SAEBench needs a model and a layer, but model_name is {model_name!r} and hook_name {hook_name!r}; "
                "pass both"
            )
        if sae.normalize_activations != "none":
            raise ConfigError(
                f"SAEBench decodes codes without their tokens, which an SAE with {sae.normalize_activations} cannot"
            )
        own = copy.deepcopy(sae)
        self.sae = (own if own.units is None else own.to_units_(1.0)).fold_decoder_norm_()
        self.device, self.dtype = sae.W_enc.device, sae.W_enc.dtype
        self.cfg = SAEBenchConfig(
            model_name,
            sae.d_in,
            sae.d_sae,
            int(layer[1]),
            hook_name,
            context_size=sae.metadata.get("context_size"),
            architecture=sae.architecture,
            apply_b_dec_to_input=sae.apply_b_dec_to_input,
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.device),
        )

    @property
    def W_enc(self) -> Tensor:  # noqa: N802
        return self.sae.W_enc

    @property
    def W_dec(self) -> Tensor:  # noqa: N802
        return self.sae.W_dec

    @property
    def b_enc(self) -> Tensor:
        return self.sae.b_enc

    @property
    def b_dec(self) -> Tensor:
        return self.sae.b_dec

    def encode(self, x: Tensor) -> Tensor:
        """Encodes activations [..., d_in] as codes [..., d_sae], with exact zeros."""
        return self.sae.encode(x)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Decodes codes [..., d_sae] to reconstructions [..., d_in]."""
        return self.sae.decode(feature_acts)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        super().to(*args, **kwargs)
        self.device, self.dtype = self.sae.W_enc.device, self.sae.W_enc.dtype
        self.cfg.device, self.cfg.dtype = str(self.device), str(self.dtype).removeprefix("torch.")
        return self

    @torch.no_grad()
    def check_decoder_norms(self) -> bool:
        """Whether every decoder row has norm 1, within SAEBench's tolerances (all-zero rows do not)."""
        norms = self.W_dec.float().norm(dim=1)
        tolerance = 1e-2 if self.dtype in (torch.bfloat16, torch.float16) else 1e-5
        return torch.allclose(norms, torch.ones_like(norms), atol=tolerance)
