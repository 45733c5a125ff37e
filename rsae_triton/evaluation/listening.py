"""How much a language model listens to each dimension of its activations, and which encoder it prefers.

Some models have dimensions of huge variance that they hardly read, because a norm's weight makes them small again. The
mse is mostly about these. The root mean square of the loss's gradient says what an error in a dimension costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rsae_triton.activations import ActivationStore, HostModel
from rsae_triton.common.checks import check_integer
from rsae_triton.common.errors import ConfigError, NumericsError, ShapeError
from rsae_triton.evaluation.downstream import Spliced, splice_of, splice_sequences
from rsae_triton.evaluation.reconstruction import Codec
from rsae_triton.sae.units import same_model

LEAST = 1e-3
"""The smallest weight, as a share of the mean one: a dimension that nothing reads still counts a little."""


def dimension_weights(host: HostModel, activations: ActivationStore, *, n_sequences: int = 16) -> Tensor:
    """Returns how much an error in each dimension of the activations costs the language model, for `with_rounds`.

    It is the root mean square, over tokens, of the gradient of the model's loss (nats, of all later predictions) with
    respect to the activation; tokens whose norm exceeds the store's limit count too. One backward pass through the
    layers above; nothing is trained.

    Args:
        host: the model that the activations were read from. activations: their store; its first sequences are read.

    Returns:
        [d_in] float32 on the CPU, with mean 1; none below a thousandth.

    Raises:
        ConfigError: not a store, one without sequences, or one of another model. ShapeError: a host of another width.
        NumericsError: the gradient is zero or not finite.
    """
    tokens, counted = _sequences(host, activations, n_sequences)
    splice, total, n = splice_of(activations), torch.zeros(activations.d_in, dtype=torch.float64), 0
    for one, use in zip(tokens.split(1), counted.split(1), strict=True):
        gradient = host.loss_gradient(one, splice.hook_name, use)[~splice.left(one, host.bos_token_id)]
        total += gradient.double().square().sum(0).cpu()
        n += len(gradient)
    weights = (total / max(n, 1)).sqrt().float()
    if not bool(weights.isfinite().all()) or not bool(weights.any()):
        raise NumericsError("the gradient of the model's loss is zero or not finite; load the model in float32")
    weights = weights / weights.mean()
    return weights.clamp_min(LEAST) / weights.clamp_min(LEAST).mean()


def spliced_losses(
    host: HostModel,
    codecs: Mapping[str, Codec],
    activations: ActivationStore,
    *,
    scale: float | None = None,
    n_sequences: int = 16,
) -> dict[str, Spliced]:
    """Splices every codec into the host on the store's first sequences; see `splice_sequences`. Errors are those of
    `dimension_weights`.

    scale: the factor on the model's activations that the codecs read; the store's when None.
    """
    tokens, counted = _sequences(host, activations, n_sequences)
    splice, mean = splice_of(activations), activations.mean
    if scale is not None:
        splice, mean = replace(splice, scale=scale), mean * (scale / splice.scale)
    return splice_sequences(host, codecs, tokens, splice, mean, counted=counted)


def check_host(host: HostModel, activations: ActivationStore) -> None:
    """Raises ConfigError if the store was read from a model of another name, ShapeError for a host of another width."""
    model, hook_name = activations.manifest.get("model"), splice_of(activations).hook_name
    if isinstance(model, str) and same_model(host.name, model) is False:
        raise ConfigError(f"the host is {host.name}, and the activations were read from {model}; give that model")
    if (width := host.hook_width(hook_name)) != activations.d_in:
        raise ShapeError(f"the host has width {width} at {hook_name}, the activations {activations.d_in}")


def _sequences(host: Any, activations: Any, n_sequences: int) -> tuple[Tensor, Tensor]:
    check_integer("n_sequences", n_sequences, 2)
    if not isinstance(host, HostModel):
        raise ConfigError(f"host is a {type(host).__name__}; give what load_host returns")
    if not isinstance(activations, ActivationStore):
        raise ConfigError("a language model reads whole sequences; give an ActivationStore as activations")
    check_host(host, activations)
    sequences = activations.sequences
    keep = sequences.counted.any(1)
    tokens, counted = sequences.tokens[keep][:n_sequences], sequences.counted[keep][:n_sequences]
    if len(tokens) < 2:
        raise ConfigError("the activations' store has fewer than two sequences with a token to predict; extract more")
    return tokens, counted
