"""Asks a language model which rounds are best: plain ones, or rounds that weigh dimensions by what it listens to."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from rsae_triton.evaluation.listening import dimension_weights, spliced_losses
from rsae_triton.evaluation.paired import mean_interval
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.rational import FusedRationalSAE


class Asked(NamedTuple):
    """The better SAE, its weights of dimensions (None: plain), and the model's loss with it less that with the teacher,
    in nats."""

    sae: FusedRationalSAE
    weights: Tensor | None
    gain: float


def ask(
    host: Any,
    store: Any,
    teacher: SparseAutoencoder,
    make: Callable[[Tensor | None], FusedRationalSAE],
    scale: float | None = None,
) -> Asked:
    """Makes the SAE with and without weights, and compares the model's loss on the store's first 16 sequences.

    Weighed rounds win if they are better beyond the paired 95 % interval over sequences.

    Args:
        host: the model that the activations were read from. store: of activations, best of validation text.
        make: adds rounds to an SAE, given weights or None. scale: see `spliced_losses`.

    Raises:
        ConfigError, ShapeError, NumericsError: see `dimension_weights`.
    """
    weights = dimension_weights(host, store)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="a round changes the mse")  # the model itself is asked here
        plain, weighed = make(None), make(weights)
    loss = spliced_losses(host, {"teacher": teacher, "plain": plain, "weighed": weighed}, store, scale=scale)
    of_teacher, of_plain, of_weighed = (loss[f"sae:{name}"].ce for name in ("teacher", "plain", "weighed"))
    if mean_interval(of_weighed - of_plain).high < 0:
        return Asked(weighed, weights, mean_interval(of_weighed - of_teacher).mean)
    return Asked(plain, None, mean_interval(of_plain - of_teacher).mean)
