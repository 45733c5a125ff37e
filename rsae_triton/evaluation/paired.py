"""Means with 95 % intervals, also of paired differences, for values whose items fall into dependent groups."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rsae_triton.common.errors import NumericsError, ShapeError

Z95 = 1.959964


class Interval(NamedTuple):
    """A mean and its 95 % interval (normal approximation)."""

    mean: float
    low: float
    high: float


def mean_interval(values: Tensor, clusters: Tensor | None = None) -> Interval:
    """Returns the mean of `values` [n] and its interval. For a paired comparison pass the differences.

    Args:
        values: one per item. clusters: int [n], which items belong together (the tokens of one context, say);
            items of one cluster are not independent, so the interval comes from the clusters' sums of deviations:
            variance = m / (m - 1) * sum_c (sum_{i in c} (v_i - mean))^2 / n^2 with m clusters (the cluster-robust
            variance of a mean; Liang & Zeger 1986). None: each item is its own cluster.

    Raises:
        ShapeError: sizes that do not fit. NumericsError: fewer than two clusters (no interval).
    """
    values = values.detach().double().flatten().cpu()
    if clusters is None:
        sums = values - values.mean()
    else:
        if clusters.shape != values.shape:
            raise ShapeError(f"{len(values)} values but clusters of shape {tuple(clusters.shape)}; give one per value")
        names, inverse = clusters.cpu().unique(return_inverse=True)
        sums = torch.zeros(len(names), dtype=torch.float64).index_add_(0, inverse, values - values.mean())
    count = len(sums)
    if count < 2:
        raise NumericsError(f"{count} independent item(s) give no interval; use at least 2, better 100")
    half = Z95 * float((count / (count - 1) * sums.square().sum()).sqrt()) / len(values)
    mean = float(values.mean())
    return Interval(mean, mean - half, mean + half)
