"""Sparse probing: how well a few features of a code tell two labels apart (arXiv:2305.01610, SAEBench)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rsae_triton.common.errors import ConfigError, NumericsError, ShapeError, SourceError
from rsae_triton.common.install import advice

KS = (1, 2, 5, 16)
METRICS = ("accuracy", "f1")
_Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Probed:
    """Probes of several representations of the same items, on the same splits.

    Attributes:
        predictions: (representation, k) -> bool [n_items]: the prediction for each item by the probe that was not
            trained on its group.
        features: (representation, k) -> per fold, the features chosen, strongest first.
        labels, groups: int [n_items], the true labels, and which items belong together.
        draws: (representation, k) -> [n_resamples, 2]: accuracy and f1 on resampled groups, for the intervals.
        folds: how many splits.
    """

    predictions: dict[tuple[str, int], _Array]
    features: dict[tuple[str, int], list[list[int]]]
    labels: _Array
    groups: _Array
    draws: dict[tuple[str, int], _Array]
    folds: int

    @property
    def chance(self) -> float:
        """The accuracy of always predicting the more frequent label."""
        return float(max(self.labels.mean(), 1 - self.labels.mean()))

    def score(self, name: str, k: int) -> dict[str, list[float]]:
        """Returns {"accuracy": [value, low, high], "f1": the same}, with 95 % percentile intervals over the groups."""
        values = _metrics(_counts(self.predictions[name, k], self.labels, self.groups), None)[0]
        return _with_interval(values, self.draws[name, k])

    def difference(self, ours: str, theirs: str, k: int) -> dict[str, list[float]]:
        """Returns the same for ours - theirs, paired: both are scored on the same resampled groups."""
        one, other = (
            _metrics(_counts(self.predictions[name, k], self.labels, self.groups), None)[0] for name in (ours, theirs)
        )
        return _with_interval(one - other, self.draws[ours, k] - self.draws[theirs, k])


def sparse_probe(
    representations: Mapping[str, _Array],
    labels: _Array,
    groups: _Array,
    *,
    ks: Sequence[int] = KS,
    folds: int = 5,
    resamples: int = 2000,
    seed: int = 0,
) -> Probed:
    """Fits logistic regressions on the k features whose means differ most between the labels.

    Items are split into folds by whole groups, the same way for every representation. On the training folds the k
    features with the largest |mean difference| / standard deviation are chosen and standardised, and a logistic
    regression on them predicts the items of the fold left out. So each item is predicted once, by a probe whose weights
    and features were chosen without its group. Intervals resample whole groups.

    Args:
        representations: by name, [n_items, width]. labels: [n_items], 0 or 1. groups: int [n_items].
        ks: numbers of features; one above a representation's width means all of them.

    Raises:
        ShapeError, NumericsError: representations that do not fit or are not finite.
        ConfigError: a label with fewer than two groups.
        SourceError: scikit-learn is not installed.
    """
    try:
        from sklearn.model_selection import StratifiedGroupKFold
    except ImportError as error:
        raise SourceError(f"probing needs the package scikit-learn; install it with: {advice('probe')}") from error
    labels, groups = np.asarray(labels).astype(bool), np.unique(np.asarray(groups), return_inverse=True)[1]
    _check(representations, labels, groups, ks)
    per_label = [len(np.unique(groups[labels == label])) for label in (False, True)]
    if min(per_label) < 2:
        raise ConfigError(
            f"the labels have {per_label[0]} and {per_label[1]} groups of text; a split needs 2 of each, better 10"
        )
    folds = min(folds, *per_label)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    splits = list(splitter.split(np.zeros(len(labels)), labels, groups))
    if any(len(np.unique(labels[train])) < 2 for train, _ in splits):
        raise ConfigError("the groups of text are so uneven that a split trains on one label only; give more groups")
    predictions: dict[tuple[str, int], _Array] = {}
    features: dict[tuple[str, int], list[list[int]]] = {}
    for name, x in representations.items():
        for k in ks:
            predictions[name, k], features[name, k] = np.zeros(len(labels), dtype=bool), []
        for train, test in splits:
            order, mean, std = _ranked(x[train], labels[train])
            for k in ks:
                chosen = order[:k]
                inputs = (x[:, chosen] - mean[chosen]) / std[chosen]
                predictions[name, k][test] = _fit_predict(inputs[train], labels[train], inputs[test])
                features[name, k].append(chosen.tolist())
    generator = np.random.default_rng(seed)
    n_groups = groups.max() + 1
    weights = generator.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=resamples)
    draws = {key: _metrics(_counts(found, labels, groups), weights) for key, found in predictions.items()}
    return Probed(predictions, features, labels.astype(int), groups, draws, folds)


def average(probed: Sequence[Probed], ours: str, k: int, theirs: str | None = None) -> dict[str, list[float]]:
    """The mean over tasks of a representation's scores (or of ours - theirs), with its interval.

    Resampling is within each task, independently. So the interval is for the mean over these tasks, not over all
    possible tasks.
    """
    parts = [one.score(ours, k) if theirs is None else one.difference(ours, theirs, k) for one in probed]
    draws = [one.draws[ours, k] - (0 if theirs is None else one.draws[theirs, k]) for one in probed]
    values = np.array([[part[metric][0] for metric in METRICS] for part in parts]).mean(0)
    return _with_interval(values, np.mean(draws, axis=0))


def _ranked(x: _Array, labels: _Array) -> tuple[_Array, _Array, _Array]:
    """Returns the features, those whose means differ most first, with the mean and the standard deviation of each."""
    mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    std[std == 0] = 1.0  # the difference of a dead feature is 0, so it comes last
    difference = x[labels].mean(0, dtype=np.float64) - x[~labels].mean(0, dtype=np.float64)
    return np.argsort(-np.abs(difference) / std, kind="stable"), mean, std


def _fit_predict(x: _Array, labels: _Array, test: _Array) -> _Array:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=2000).fit(x, labels).predict(test)


def _counts(predicted: _Array, labels: _Array, groups: _Array) -> _Array:
    """Counts true positives, false positives, false negatives and true negatives in every group, [n_groups, 4]."""
    labels = labels.astype(bool)
    cells = (predicted & labels, predicted & ~labels, ~predicted & labels, ~predicted & ~labels)
    return np.stack([np.bincount(groups, cell, groups.max() + 1) for cell in cells], axis=1)


def _metrics(counts: _Array, weights: _Array | None) -> _Array:
    """Accuracy and macro f1 (the mean over both labels) for each row of group weights, [rows, 2]."""
    total = counts.sum(0, keepdims=True) if weights is None else weights @ counts
    tp, fp, fn, tn = total.T
    f1 = [2 * hits / np.maximum(2 * hits + fp + fn, 1) for hits in (tp, tn)]
    return np.stack([(tp + tn) / (tp + fp + fn + tn), (f1[0] + f1[1]) / 2], axis=1)


def _with_interval(values: _Array, draws: _Array) -> dict[str, list[float]]:
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    return {metric: [float(values[i]), float(low[i]), float(high[i])] for i, metric in enumerate(METRICS)}


def _check(representations: Mapping[str, _Array], labels: _Array, groups: _Array, ks: Sequence[int]) -> None:
    if not ks or min(ks) < 1:
        raise ConfigError(f"k is {list(ks)}; give numbers of features of at least 1")
    if len(labels) != len(groups):
        raise ShapeError(f"{len(labels)} labels but {len(groups)} groups; give one of each per item")
    for name, x in representations.items():
        if x.ndim != 2 or len(x) != len(labels):
            raise ShapeError(f"{name} has shape {x.shape} for {len(labels)} labels; give [n_items, width]")
        if not np.isfinite(x).all():
            raise NumericsError(f"{name} holds NaN or infinity; drop such items before probing")
