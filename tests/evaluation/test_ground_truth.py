"""Detection of known features: the scores of codes whose scores are known, the data, and SAELens' own definitions."""

import pytest
import torch

from rsae_triton.common.errors import ConfigError, ShapeError, SourceError
from rsae_triton.evaluation import reconstruction
from rsae_triton.evaluation.ground_truth import (
    KnownFeatures,
    assigned_cosine,
    detect,
    planted_features,
    saelens_features,
    saelens_model,
)
from rsae_triton.evaluation.pursuit import Pursuit
from rsae_triton.teachers import ReluSAE, TopKSAE


@pytest.fixture(scope="module")
def known():
    """Eight orthogonal features in ten dimensions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(10, 8, generator=generator)).Q.t().contiguous()
    active = torch.rand(500, 8, generator=generator) < 0.3
    sizes = 1 + torch.rand(500, 8, generator=generator)
    return KnownFeatures((active * sizes) @ directions, directions, active)


def perfect(known, threshold=0.5):
    sae = ReluSAE(10, 8)
    with torch.no_grad():
        sae.W_dec.copy_(known.directions)
        sae.W_enc.copy_(known.directions.t())
        sae.b_enc.fill_(-threshold)
    return sae


def test_a_dictionary_of_the_true_features_is_found(known):
    score = detect(perfect(known), known)
    assert (score.f1, score.precision, score.recall, score.uniqueness, score.dead) == (1, 1, 1, 1, 0)
    assert score.mcc == pytest.approx(1, abs=1e-6)
    assert score.l0 == score.true_l0 == known.l0
    assert score.mse == pytest.approx(reconstruction(perfect(known), known.x).mse, rel=1e-6)


def test_dead_and_wrong_detectors_are_scored_by_the_definition(known):
    sae = perfect(known)
    with torch.no_grad():
        sae.W_enc[:, 0], sae.b_enc[0] = 0, -1.0  # never active
        sae.W_enc[:, 1], sae.b_enc[1] = 0, 1.0  # always
        sae.W_dec[2] = -sae.W_dec[3]  # the direction of another one, turned round
    score = detect(sae, known)
    share = float(known.active[:, 1].float().mean())
    both = known.active[:, 2] & known.active[:, 3]
    third = [float(both.sum() / known.active[:, f].sum()) for f in (2, 3)]
    assert score.dead == 1
    assert score.uniqueness == 7 / 8
    assert score.precision == pytest.approx((0 + share + third[0] + 5) / 8)
    assert score.recall == pytest.approx((0 + 1 + third[1] + 5) / 8)
    f1 = 2 * float(both.sum()) / float(known.active[:, 2].sum() + known.active[:, 3].sum())
    assert score.f1 == pytest.approx((0 + 2 * share / (1 + share) + f1 + 5) / 8)
    assert score.mcc == pytest.approx(7 / 8, abs=1e-6)  # features 2 and 3 want one direction, orthogonal to the other


def test_the_assignment_is_one_to_one():
    assert assigned_cosine(torch.tensor([[0.9, 0.8], [0.7, 0.1]])) == pytest.approx(0.75)
    assert assigned_cosine(torch.tensor([[0.9, 0.8, 0.3]])) == pytest.approx(0.9)


def test_planted_data_is_what_was_asked_for():
    one, same, other = (planted_features(4000, l0=6.0, seed=seed, correlation=0.4) for seed in (0, 0, 1))
    assert torch.equal(one.x, same.x)
    assert torch.equal(one.directions, other.directions)
    assert not torch.equal(one.active, other.active)
    assert one.l0 == pytest.approx(6, rel=0.05)
    independent = planted_features(4000, l0=6.0)
    together = [
        float(k.active[:, 0:8].sum(1).float().var() / k.active[:, 0:8].float().var(0).sum()) for k in (one, independent)
    ]
    assert together[0] > 1.3 > 1.15 > together[1]  # the sum over a group varies more where its features go together
    assert planted_features(10, model_seed=1).directions[0, 0] != one.directions[0, 0]


def test_pursuit_finds_a_sparse_code_and_bounds_an_encoder(known):
    sae = TopKSAE(10, 8, k=3)
    with torch.no_grad():
        sae.W_dec.copy_(2 * known.directions)
        sae.W_enc.copy_(known.directions.t())
    exact = known.x[known.active.sum(1) == 3]
    pursuit = Pursuit(sae, 3)
    assert reconstruction(pursuit, exact).mse < 1e-8
    assert torch.allclose(
        pursuit.encode(exact), 0.5 * exact @ known.directions.t() * (exact @ known.directions.t() > 0.5), atol=1e-4
    )
    generator = torch.Generator().manual_seed(1)
    other = TopKSAE(10, 24, k=3, generator=generator)
    bound, own = reconstruction(Pursuit(other, 3), known.x), reconstruction(other, known.x)
    assert bound.mse < own.mse
    assert bound.l0 <= 3
    with pytest.raises(ConfigError, match="at most d_in=10"):
        Pursuit(sae, 11)


def test_bad_arguments_of_detect_and_planted_features_are_errors(known, monkeypatch):
    with pytest.raises(ShapeError, match="do not fit"):
        detect(perfect(known), known._replace(active=known.active[:, :7]))
    with pytest.raises(ConfigError, match="correlation"):
        planted_features(10, correlation=1.0)
    with pytest.raises(ConfigError, match="SyntheticModel"):
        saelens_features(object(), 10)
    monkeypatch.setitem(__import__("sys").modules, "sae_lens.synthetic", None)
    with pytest.raises(SourceError, match=r"sae-lens>=6\.54"):
        saelens_model()
