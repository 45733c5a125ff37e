"""How well a code detects the known features of synthetic data: MCC, F1, precision and recall.

A lower error does not mean better features; data with known features measures both. The definitions are SAELens'
(`sae_lens.synthetic.evals`, compared in the tests), so that the numbers can be read beside its SynthSAEBench.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rsae_triton.common.checks import check_data, check_integer, check_number
from rsae_triton.common.errors import ConfigError, ShapeError, SourceError
from rsae_triton.evaluation.reconstruction import CHUNK, Codec, check_activations


class KnownFeatures(NamedTuple):
    """Synthetic activations x [n_tokens, d_in], the directions [n_features, d_in] they are sums of, and active, bool
    [n_tokens, n_features]: which of the features each token has."""

    x: Tensor
    directions: Tensor
    active: Tensor

    @property
    def l0(self) -> float:
        """Mean number of features per token."""
        return float(self.active.sum(1).double().mean())


@dataclass(frozen=True)
class Detection:
    """How well an SAE's features detect known ones.

    mcc: the mean |cosine| of decoder rows and true directions under the best one-to-one assignment (arXiv:2505.20254).
    f1, precision, recall: each SAE feature is scored as a detector of the true feature whose direction is most like its
    decoder row; means over the SAE's features, with 0 for one that is never active. uniqueness: the number of different
    true features detected in this way, divided by the SAE's features. dead: features that are never active on this
    data; alive_fraction: the share of the others. l0: of the code. true_l0: of the data.
    """

    mcc: float
    f1: float
    precision: float
    recall: float
    uniqueness: float
    dead: int
    alive_fraction: float
    l0: float
    true_l0: float
    mse: float


@torch.no_grad()
def detect(sae: Codec, known: KnownFeatures, *, chunk: int = CHUNK) -> Detection:
    """Scores the code of `known.x` as a detector of the features the data is made of.

    Raises:
        ShapeError, NumericsError: an SAE of another width, or tensors that do not fit each other.
        SourceError: SciPy is not installed.
    """
    x, directions, active = check_activations(sae, known.x), known.directions, known.active
    check_data("known.directions", directions)
    if directions.shape != (active.shape[-1], x.shape[1]) or len(active) != len(x):
        raise ShapeError(
            f"directions {tuple(directions.shape)} and active {tuple(active.shape)} do not fit activations "
            f"{tuple(x.shape)}; give [n_features, d_in], [n_tokens, n_features], [n_tokens, d_in]"
        )
    weights = sae.W_dec.detach()
    cosine = _unit(weights).cpu() @ _unit(directions).cpu().t()
    partner = cosine.abs().argmax(1)
    both, fires, there = (torch.zeros(len(weights), dtype=torch.float64) for _ in range(3))
    error = 0.0
    for rows, truth in zip(x.split(chunk), active.split(chunk), strict=True):
        own = rows.to(device=weights.device, dtype=weights.dtype)
        z = sae.encode(own)
        error += float((own - sae.decode(z, own)).double().square().sum())
        on, true = (z != 0).cpu(), truth.cpu()[:, partner]
        both += (on & true).sum(0)
        fires += on.sum(0)
        there += true.sum(0)
    precision, recall = both / fires.clamp_min(1), both / there.clamp_min(1)
    return Detection(
        mcc=assigned_cosine(cosine.abs()),
        # 2 PR / (P + R) in terms of counts; 0 where nothing was right.
        f1=float((2 * both / (fires + there).clamp_min(1)).mean()),
        precision=float(precision.mean()),
        recall=float(recall.mean()),
        uniqueness=len(partner.unique()) / len(partner),
        dead=int((fires == 0).sum()),
        alive_fraction=float((fires > 0).double().mean()),
        l0=float(fires.sum()) / len(x),
        true_l0=known.l0,
        mse=error / len(x),
    )


def assigned_cosine(cosine: Tensor) -> float:
    """The mean |cosine| over the min(n, m) pairs of the best one-to-one assignment, for cosine [n, m]."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise SourceError("matching known features needs SciPy; install it with: pip install scipy") from error
    rows, columns = linear_sum_assignment(cosine.double().numpy(), maximize=True)
    return float(cosine[torch.as_tensor(rows), torch.as_tensor(columns)].double().mean())


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.float(), dim=1)


# -- data


def planted_features(
    n_tokens: int,
    *,
    d_in: int = 64,
    n_features: int = 512,
    l0: float = 5.0,
    correlation: float = 0.0,
    seed: int = 0,
    model_seed: int = 0,
) -> KnownFeatures:
    """Makes synthetic data: directions in superposition, Zipf-distributed frequencies, magnitudes 1 + |N| / 3.

    Args:
        l0: mean number of features per token. correlation: 0 (independent features) up to below 1; features in groups
            of eight share this much of what makes them active (a Gaussian copula).
        seed: of the tokens. model_seed: of directions and frequencies; the same seed gives the same model.

    Raises:
        ConfigError: l0 above n_features / 2, or a correlation outside [0, 1).
    """
    for name, value in (("n_tokens", n_tokens), ("d_in", d_in), ("n_features", n_features)):
        check_integer(name, value, 1)
    check_number("l0", l0, above=0)
    check_number("correlation", correlation, least=0)
    if l0 > n_features / 2 or correlation >= 1:
        raise ConfigError(f"l0={l0:g}, correlation={correlation:g}: give at most n_features / 2, and less than 1")
    fixed, drawn = (torch.Generator().manual_seed(one) for one in (model_seed, 2**20 + seed))
    directions = _unit(torch.randn(n_features, d_in, generator=fixed))
    frequency = 1 / (torch.arange(n_features) + 8.0) ** 0.5
    frequency = (frequency * l0 / frequency.sum())[torch.randperm(n_features, generator=fixed)].clamp(max=0.5)
    groups = torch.arange(n_features) // 8
    shared = torch.randn(n_tokens, int(groups[-1]) + 1, generator=drawn)[:, groups]
    own = torch.randn(n_tokens, n_features, generator=drawn)
    score = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
    active = score > torch.special.ndtri(1 - frequency.double()).float()
    sizes = 1 + torch.randn(n_tokens, n_features, generator=drawn).abs() / 3
    return KnownFeatures((active * sizes) @ directions, directions, active)


def saelens_features(model: Any, n_tokens: int, *, seed: int = 0, chunk: int = 8192) -> KnownFeatures:
    """Draws tokens from a `sae_lens.synthetic.SyntheticModel`, such as those published with SynthSAEBench.

    Raises:
        ConfigError: `model` is something else.
    """
    check_integer("n_tokens", n_tokens, 1)
    if not callable(getattr(model, "sample_with_features", None)) or not hasattr(model, "feature_dict"):
        raise ConfigError(f"model is a {type(model).__name__}; give a sae_lens.synthetic.SyntheticModel")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        x, active = [], []
        for at in range(0, n_tokens, chunk):
            rows, acts = model.sample_with_features(min(chunk, n_tokens - at))
            x.append(rows.to_dense().float().cpu())
            active.append((acts.to_dense() > 0).cpu())  # a quarter of the memory
    directions = model.feature_dict.feature_vectors.detach().float().cpu()
    return KnownFeatures(torch.cat(x), directions, torch.cat(active))


def saelens_model(
    *, d_in: int = 64, n_features: int = 512, l0: float = 5.0, correlation: float = 0.0, seed: int = 0
) -> Callable[[int, int], KnownFeatures]:
    """Makes a `sae_lens.synthetic.SyntheticModel` of this size and returns a function (n_tokens, seed) that draws from
    it.

    Firing frequencies are SAELens' Zipf distribution, scaled to `l0`; magnitudes are 1 +- 0.15; correlation: the scale
    of SAELens' low-rank correlation matrix.

    Raises:
        SourceError: SAELens 6.54 or later is not installed.
    """
    synthetic = _saelens()
    related = synthetic.LowRankCorrelationConfig(correlation_scale=correlation, seed=seed) if correlation else None
    config = synthetic.SyntheticModelConfig(
        num_features=n_features, hidden_dim=d_in, std_firing_magnitudes=0.15, bias=False, seed=seed, correlation=related
    )
    model = synthetic.SyntheticModel(config)
    generator = model.activation_generator
    probabilities = generator.firing_probabilities * (l0 / float(generator.firing_probabilities.sum()))
    model = synthetic.SyntheticModel(
        config, activation_generator=_with_probabilities(generator, probabilities.clamp(max=0.9))
    )
    return lambda n_tokens, draw: saelens_features(model, n_tokens, seed=draw)


def synthsaebench_model(
    *, d_in: int = 96, n_features: int = 2048, seed: int = 0
) -> Callable[[int, int], KnownFeatures]:
    """Makes a smaller SynthSAEBench-16k (arXiv:2602.14687) and returns a function (n_tokens, seed) that draws from it.

    The settings are the published ones: Zipf-distributed frequencies (exponent 0.5, 0.4 to 5e-4), trees of features
    (depth 3, four children each, which exclude each other, are active with their parent only and scale with it),
    correlations of rank 25 and scale 0.1, directions moved apart in 100 steps, a bias. The published model has 16,384
    features in 768 dimensions, 128 trees and 34 active features per token. Here the number of trees is that of features
    divided by 128, so that the same share of the features is in trees. With the default sizes, 11 features are active
    per token; directions are further from orthogonal (a mean largest cosine of 0.35 instead of 0.15).

    Raises:
        SourceError: SAELens 6.54 or later is not installed. ConfigError: fewer than 128 features.
    """
    check_integer("n_features", n_features, 128)
    check_integer("d_in", d_in, 1)
    synthetic = _saelens()
    config = synthetic.SyntheticModelConfig(
        num_features=n_features,
        hidden_dim=d_in,
        firing_probability=synthetic.ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
        hierarchy=synthetic.HierarchyConfig(
            total_root_nodes=n_features // 128,
            branching_factor=4,
            max_depth=3,
            mutually_exclusive_portion=1.0,
            compensate_probabilities=True,
            scale_children_by_parent=True,
        ),
        correlation=synthetic.LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
        mean_firing_magnitudes=synthetic.LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=synthetic.FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        bias=0.5,
        seed=seed,
    )
    apart = synthetic.orthogonal_initializer(num_steps=100, lr=3e-4, show_progress=False)
    directions = synthetic.FeatureDictionary(n_features, d_in, bias=0.5, initializer=apart, seed=seed)
    model = synthetic.SyntheticModel(config, feature_dict=directions)
    return lambda n_tokens, draw: saelens_features(model, n_tokens, seed=draw)


def _saelens() -> Any:
    try:
        from sae_lens import synthetic
        from sae_lens.synthetic import SyntheticModelConfig  # noqa: F401  SAELens 6.0 has none
    except ImportError as error:
        raise SourceError(
            "data of sae_lens.synthetic needs SAELens; install it with: pip install 'sae-lens>=6.54', or take "
            "planted_features, which needs nothing"
        ) from error
    return synthetic


def _with_probabilities(generator: Any, probabilities: Tensor) -> Any:
    low_rank = generator.low_rank_correlation
    return type(generator)(
        num_features=generator.num_features,
        firing_probabilities=probabilities,
        std_firing_magnitudes=generator.std_firing_magnitudes,
        mean_firing_magnitudes=generator.mean_firing_magnitudes,
        # SAELens takes the square root of the value it is given.
        correlation_matrix=None if low_rank is None else (low_rank[0], low_rank[1].square()),
    )
