"""Several SAEs on the same held-out text, as shipped and at one l0: what metrics.json holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from ..activations import ActivationStore
from ..base import SparseAutoencoder
from .downstream import Splice, splice_loss
from .reconstruction import Codec, Thresholded, at_l0, reconstruction


def compare(
    saes: Mapping[str, SparseAutoencoder],
    x: Tensor,
    *,
    l0: float | None = None,
    host: Any = None,
    tokens: Tensor | None = None,
    counted: Tensor | None = None,
    splice: Splice | None = None,
    mean: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Scores each SAE, and under "matched_l0" each at the l0 of the first one (or at `l0`).

    Args:
        saes: by name; the first sets the matched l0 (the teacher). x: held-out activations [n_tokens, d_in].
        host, tokens, counted, splice, mean: for the downstream scores, see `splice_loss`; left out without host.

    Returns:
        {name: {mse, fvu, cosine, l0, l1, alive_fraction, n_tokens, and with a host delta_ce, ...}, "matched_l0":
        {name: the same, with the threshold `tau` that it took}}.
    """
    scores: dict[str, Any] = {name: asdict(reconstruction(sae, x)) for name, sae in saes.items()}
    target = next(iter(scores.values()))["l0"] if l0 is None else l0
    matched: dict[str, Thresholded] = {name: at_l0(sae, x, target) for name, sae in saes.items()}
    at_target = {
        name: {**(asdict(reconstruction(one, x)) if one.tau > 0 else scores[name]), "tau": one.tau}
        for name, one in matched.items()
    }
    if host is not None:
        assert tokens is not None
        assert splice is not None
        assert mean is not None
        codecs: dict[str, Codec] = dict(saes)
        # A code that was not thresholded is the shipped one: splicing it twice would tell nothing.
        codecs.update({f"matched {name}": one for name, one in matched.items() if one.tau > 0})
        downstream = splice_loss(host, codecs, tokens, splice, mean, counted=counted, progress=progress)
        for name in saes:
            scores[name].update(asdict(downstream[name]))
            at_target[name].update(asdict(downstream.get(f"matched {name}", downstream[name])))
    return {**scores, "matched_l0": at_target}


def evaluate(
    sae: SparseAutoencoder, host: Any, activations: ActivationStore, *, n_sequences: int = 32
) -> dict[str, Any]:
    """Scores one SAE on a store of held-out text and its host model.

    Args:
        sae: any SAE of the package, in the store's units. host: a `HostModel`, or None for reconstruction only.
        activations: a store of text no training has seen. n_sequences: how many of its contexts to splice into.

    Returns:
        mse, fvu, cosine, l0, l1, alive_fraction, and with a host ce, delta_ce with its interval, loss_recovered.
    """
    options: dict[str, Any] = {}
    if host is not None:
        sequences = activations.sequences
        options = {
            "host": host,
            "tokens": sequences.tokens[:n_sequences],
            "counted": sequences.counted[:n_sequences],
            "splice": splice_of(activations),
            "mean": activations.mean,
        }
    return compare({"sae": sae}, activations.tensor(), **options)["sae"]


def splice_of(activations: ActivationStore) -> Splice:
    """The hook, scale and outlier limit that a store was made with."""
    manifest = activations.manifest
    return Splice(manifest["hook_name"], activations.scale, manifest.get("norm_limit"))
