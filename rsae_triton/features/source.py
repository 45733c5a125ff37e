"""The data that features are inspected on: activations with their text, and the model's output layer."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsae_triton.activations import (
    ActivationStore,
    HostModel,
    extract,
    load_corpus,
    load_host,
    split_three_ways,
)
from rsae_triton.common.checks import check_integer
from rsae_triton.common.errors import ConfigError, RsaeError
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.making import making_of
from rsae_triton.sae.units import check_place

MOST_TOKENS = 10_000


@dataclass(frozen=True)
class Source:
    """Text to inspect features on.

    Attributes:
        store: the activations, with their text. rows: int [n], the rows that are looked at.
        host: the language model, or None if it could not be loaded; tokens are then shown as numbers, without a logit
            lens.
    """

    store: ActivationStore
    rows: np.ndarray
    host: HostModel | None

    @functools.cached_property
    def x(self) -> Tensor:
        """The rows' activations, [n, d_in], in the store's units."""
        return self.store.tensor()[torch.from_numpy(self.rows)]

    @property
    def tokenizer(self) -> Any:
        return _Numbers() if self.host is None else self.host.tokenizer


class _Numbers:
    """Replaces a tokenizer that is not available: shows token ids."""

    def decode(self, token_ids: list[int]) -> str:
        return "".join(f" {one}" for one in token_ids)


def open_source(
    sae: SparseAutoencoder, source: ActivationStore | HostModel, host: HostModel | None, n_tokens: int
) -> Source:
    """Opens the text of a store; for a host, reads the test part of the demo's text.

    Raises:
        ConfigError: neither a store nor a host, a store without text, or one of another place than the SAE's.
    """
    check_integer("n_tokens", n_tokens, 2)
    if isinstance(source, HostModel):
        documents = split_three_ways(load_corpus("demo"))[2]
        reads = making_of(sae.metadata).reading
        place = sae.metadata.get("hook_name")
        host, source = source, extract(source, documents, place, n_tokens, split="eval", **reads)
    if not isinstance(source, ActivationStore):
        raise ConfigError(f"source is a {type(source).__name__}; give an ActivationStore, or the host of load_host")
    if source.manifest["documents_file"] is None:
        raise ConfigError(f"{source.folder} was made from a tensor and has no text; read activations with `extract`")
    check_place(sae, source, stacklevel=4)
    rows = _rows(source, n_tokens)
    if host is None:
        try:
            host = _host(str(source.manifest["model"]))
        except (RsaeError, OSError) as error:
            warnings.warn(
                f"the model {source.manifest['model']!r} of the store cannot be loaded ({error}); tokens are shown as "
                "numbers, and without the logit lens. Pass host=load_host(...)",
                stacklevel=3,
            )
    return Source(source, rows, host)


def _rows(store: ActivationStore, n_tokens: int) -> np.ndarray:
    """Picks about n_tokens kept rows from whole contexts, at random (all rows if there are fewer)."""
    contexts = store.contexts.numpy()
    sizes = np.bincount(contexts[contexts < len(store.sequences.tokens)])
    order = np.random.default_rng(0).permutation(np.flatnonzero(sizes))
    enough = int(np.searchsorted(sizes[order].cumsum(), n_tokens)) + 1
    return np.flatnonzero(np.isin(contexts, order[:enough]))


@functools.lru_cache(maxsize=1)
def _host(name: str) -> HostModel:
    return load_host(name)


@torch.no_grad()
def logits_of(host: HostModel, directions: Tensor) -> Tensor | None:
    """Applies the last norm and the unembedding to directions [n, d_in]; returns [n, vocabulary].

    Returns None if the directions are not as wide as the residual stream.
    """
    unembed = host.model.get_output_embeddings()
    if unembed is None or directions.shape[1] != unembed.weight.shape[1]:
        return None
    weight = unembed.weight
    flat = directions.to(device=weight.device, dtype=torch.float32)
    flat = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-12) * flat.shape[1] ** 0.5
    norm = _last_norm(host.model)
    if norm is not None:  # without the norm's bias, which it adds to every direction
        one = next(iter(norm.parameters()), weight)
        flat = (norm(flat.to(one.dtype)) - norm(torch.zeros_like(flat[:1]).to(one.dtype))).float()
    return (flat.to(weight.dtype) @ weight.t()).float()


def _last_norm(model: Any) -> Any:
    base = getattr(model, model.base_model_prefix, model)
    for owner in (base, getattr(base, "decoder", None), getattr(base, "language_model", None)):
        for name in ("norm", "ln_f", "final_layer_norm", "final_layernorm"):
            if isinstance(found := getattr(owner, name, None), torch.nn.Module):
                return found
    return None
