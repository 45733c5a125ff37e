"""Scores several SAEs on the same held-out text, as shipped and at equal l0: the content of metrics.json."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from itertools import combinations
from typing import Any

from torch import Tensor

from rsae_triton.activations import ActivationStore, PairedStore
from rsae_triton.common.checks import check_integer, check_number
from rsae_triton.common.errors import ConfigError, ShapeError
from rsae_triton.evaluation.downstream import Splice, Spliced, downstream, splice_of, splice_sequences
from rsae_triton.evaluation.paired import mean_interval
from rsae_triton.evaluation.reconstruction import Codec, Measured, Thresholded, cut_to, measure
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.sides import side_by_side
from rsae_triton.sae.units import check_place, check_same_units, reading, warn_of_units


class Scores(dict[str, Any]):
    """Scores by name; printed, the important ones in a line each."""

    def __str__(self) -> str:
        def shown(*names: str) -> str:
            return ", ".join(f"{name} {self[name]:.4g}" for name in names if name in self)

        lines = [
            f"error     {shown('mse', 'fvu', 'cosine')}  ({self['n_tokens']:,} tokens)",
            f"sparsity  {shown('l0', 'l1')}, {100 * self['alive_fraction']:.1f} % of the features alive",
        ]
        if "delta_ce" in self:
            low, high = (self[f"delta_ce_{end}"] for end in ("low", "high"))
            recovered = f"loss recovered {100 * self['loss_recovered']:.1f} %"
            lines += [
                f"model     delta CE {self['delta_ce']:.4g} nats (95 %: {low:.4g} to {high:.4g})",
                f"          {shown('kl')}, {recovered}  ({self['n_sequences']} sequences)",
            ]
        return "\n".join(lines)


def compare(
    saes: Mapping[str, SparseAutoencoder],
    x: Tensor | ActivationStore | PairedStore,
    *,
    l0: float | None = None,
    measured: Mapping[str, Measured] | None = None,
    contexts: Tensor | None = None,
    host: Any = None,
    tokens: Tensor | None = None,
    counted: Tensor | None = None,
    splice: Splice | None = None,
    mean: Tensor | None = None,
    spliced_names: Collection[str] | None = None,
    shipped: bool = True,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Scores each SAE as it is, and under "matched_l0" at the l0 of the first one (or at `l0`).

    Args:
        saes: by name; the first sets the matched l0 (the teacher).
        x: held-out activations: an `ActivationStore` (whose contexts are then used too), or [n_tokens, d_in] in the
            units that all of `saes` read. For transcoders a `PairedStore`, or the two sides beside each other in one
            tensor.
        measured: the results of `measure` for the SAEs on x; measured here when None.
        contexts: int [n_tokens], the context each row of x was read in (`ActivationStore.contexts`), for the paired
            intervals of mse. Without it there are none, because the tokens of one context are not independent.
        host, tokens, counted, splice, mean: for the downstream scores, see `splice_sequences`; left out without host.
        spliced_names: which SAEs are spliced in; all when None. shipped: whether to splice in the shipped code as well
            as the one at equal l0.
        progress: called with the number of sequences spliced.

    Returns:
        {name: {mse, fvu, cosine, l0, l1, alive_fraction, ..., and with a host delta_ce, kl, ...}, "matched_l0": {name:
        the same, with the threshold `tau` that it took}, "paired": {"shipped": differences, "matched_l0": differences}}
        with `differences[b][a]` = {mse, delta_ce, kl: [b - a, low, high]} for every a before b. Each SAE's scores are a
        `Scores`, a dictionary that prints its important numbers in a line each.

    Raises:
        ConfigError: no SAEs, a bad l0, `measured` or `contexts`, or a host without tokens, splice and mean.
        ShapeError, NumericsError: activations that do not fit or are not finite.
    """
    if not isinstance(saes, Mapping) or not saes:
        raise ConfigError("saes is empty or no dictionary; give at least one SAE by name")
    if not isinstance(measured, Mapping | None):
        raise ConfigError(f"measured is a {type(measured).__name__}; give a dictionary of what measure returned")
    if measured is not None and set(measured) != set(saes):
        raise ConfigError(f"measured is of {', '.join(measured) or 'nothing'}, not of {', '.join(saes)}")
    if isinstance(x, ActivationStore | PairedStore):
        given: dict[str, Any] = {"l0": l0, "measured": measured, "host": host, "tokens": tokens, "counted": counted}
        given |= {"spliced_names": spliced_names, "shipped": shipped}
        with ExitStack() as stack:
            for name, sae in saes.items():
                check_place(sae, x, name)
                side_by_side(sae, x, None)
                stack.enter_context(reading(sae, x))
            if contexts is None and x.manifest["documents_file"] is not None:
                contexts = x.contexts
            given["contexts"] = contexts
            if host is not None:
                given |= {"splice": splice or splice_of(x), "mean": x.mean if mean is None else mean}
            return _compare(saes, x, progress=progress, **given)
    return _compare(
        saes, x, l0=l0, measured=measured, contexts=contexts, host=host, tokens=tokens, counted=counted,
        splice=splice, mean=mean, progress=progress, spliced_names=spliced_names, shipped=shipped,
    )  # fmt: skip


def _compare(
    saes: Mapping[str, SparseAutoencoder],
    x: Tensor | ActivationStore | PairedStore,
    *,
    l0: float | None,
    measured: Mapping[str, Measured] | None,
    contexts: Tensor | None,
    host: Any,
    tokens: Tensor | None,
    counted: Tensor | None,
    progress: Callable[[int], None] | None,
    spliced_names: Collection[str] | None,
    shipped: bool,
    splice: Splice | None = None,
    mean: Tensor | None = None,
) -> dict[str, Any]:
    """`compare`, for SAEs that read x in the units it is in."""
    if not isinstance(contexts, Tensor | None):
        raise ShapeError(f"contexts is a {type(contexts).__name__}; give a torch.Tensor")
    if contexts is not None and len(contexts) != len(x):
        raise ShapeError(f"contexts has {len(contexts)} entries for {len(x)} activations; give one each")
    if measured is None:
        if isinstance(x, Tensor):
            check_same_units(saes)
        measured = {name: measure(sae, x) for name, sae in saes.items()}
    for name, found in measured.items():
        if found.scores.fvu > 1:
            warn_of_units(saes[name], x if isinstance(x, Tensor) else next(x.chunks(64)), name)
    target = next(iter(measured.values())).scores.l0 if l0 is None else l0
    if l0 is not None:
        check_number("l0", l0, above=0)
    matched: dict[str, Thresholded] = {
        # Known from the first pass: no second one over the activations, and no memory for all their codes.
        name: Thresholded(sae, 0.0, cut=False) if measured[name].scores.l0 <= target else cut_to(sae, x, target)
        for name, sae in saes.items()
    }
    # A code that was not thresholded is the shipped one: it need not be measured and spliced a second time.
    measured_at = {name: measure(one, x) if one.cut else measured[name] for name, one in matched.items()}
    scores: dict[str, Any] = {name: Scores(asdict(one.scores)) for name, one in measured.items()}
    at_target = {name: Scores(asdict(one.scores), tau=matched[name].tau) for name, one in measured_at.items()}
    spliced: dict[str, Spliced] = {}
    if host is not None:
        if tokens is None or splice is None or mean is None:
            raise ConfigError("with a host, compare needs tokens, splice and mean as well (see splice_sequences)")
        chosen = [name for name in saes if spliced_names is None or name in spliced_names]
        codecs: dict[str, Codec] = {name: saes[name] for name in chosen if shipped or not matched[name].cut}
        codecs.update({f"matched {name}": matched[name] for name in chosen if matched[name].cut})
        spliced = splice_sequences(host, codecs, tokens, splice, mean, counted=counted, progress=progress)
        for name in chosen:
            if name in codecs:
                scores[name].update(asdict(downstream(spliced, f"sae:{name}")))
            key = f"sae:matched {name}" if matched[name].cut else f"sae:{name}"
            spliced[f"at:{name}"] = spliced[key]
            at_target[name].update(asdict(downstream(spliced, key)))
    return {
        **scores,
        "matched_l0": at_target,
        "paired": {
            "shipped": differences(measured, spliced, "sae:", contexts),
            "matched_l0": differences(measured_at, spliced, "at:", contexts),
        },
    }


def differences(
    measured: Mapping[str, Measured], spliced: Mapping[str, Spliced], prefix: str, contexts: Tensor | None
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """The `differences[b][a]` that `compare` returns: b - a on the same tokens and sequences, with a 95 % interval."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for a, b in combinations(measured, 2):
        here = found.setdefault(b, {}).setdefault(a, {})
        if contexts is not None:
            here["mse"] = [*mean_interval(measured[b].squared_error - measured[a].squared_error, contexts)]
        if prefix + a in spliced and prefix + b in spliced:
            ours, theirs = spliced[prefix + b], spliced[prefix + a]
            here["delta_ce"] = [*mean_interval(ours.ce - theirs.ce)]
            here["kl"] = [*mean_interval(ours.kl - theirs.kl)]
    return found


def evaluate(
    sae: SparseAutoencoder, host: Any, activations: ActivationStore | PairedStore, *, n_sequences: int = 32
) -> Scores:
    """Scores one SAE on a store of held-out text, and with its host model.

    Args:
        sae: any SAE of the package; scores are in the store's units.
        host: a `HostModel`, or None for reconstruction only.
        activations: a store of text that was not trained on; for a transcoder a `PairedStore`.
        n_sequences: how many of its contexts to splice into.

    Returns:
        The fields of `Reconstruction` (mse, fvu, cosine, l0, l1, alive_fraction, dead_features, ...) and with a host
        those of `Downstream` (ce, delta_ce with its interval, loss_recovered, kl, ...). Printed, the important ones in
        a line each.

    Raises:
        ConfigError: `activations` is not a store.
        ShapeError, NumericsError: the SAE does not fit the store, or a value is not finite.
    """
    if not isinstance(activations, ActivationStore | PairedStore):
        raise ConfigError(
            f"activations is a {type(activations).__name__}; give an ActivationStore (of a tensor: reconstruction)"
        )
    check_integer("n_sequences", n_sequences, 1)
    options: dict[str, Any] = {}
    if host is not None:
        sequences = activations.sequences
        options = {
            "host": host,
            "tokens": sequences.tokens[:n_sequences],
            "counted": sequences.counted[:n_sequences],
        }
    return Scores(compare({"sae": sae}, activations, **options)["sae"])
