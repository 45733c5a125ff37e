"""Matching features: a known permutation, known cosines, correlations against numpy, and memory-saving passes."""

from importlib import import_module

import numpy as np
import pytest
import torch

from rsae_triton.common.errors import ConfigError, ShapeError
from rsae_triton.evaluation.matching import match_features, passes
from rsae_triton.teachers import ReluSAE

# A correlation is a float32 sum of the products of 2048 tokens: about sqrt(2048) * 2^-24, some five times that.
ROUNDING = 1.5e-5


@pytest.fixture(params=[False, True], ids=["codes", "rows"], autouse=True)
def rows(request, monkeypatch):
    """Every test also by rows of active features, as wide SAEs are matched, some pairs at a time."""
    if request.param:
        monkeypatch.setattr(import_module("rsae_triton.evaluation.reconstruction"), "WIDE", 1)
        monkeypatch.setattr("rsae_triton.evaluation.matching._AT_ONCE", 300)
        monkeypatch.setattr("rsae_triton.evaluation.matching._Moments.codes", None)  # no dense code is made


@pytest.fixture
def teacher():
    made = ReluSAE(16, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made.b_enc.copy_(torch.linspace(-1, 0.5, 32))
    return made


def permuted(sae, order):
    other = ReluSAE(sae.d_in, len(order))
    with torch.no_grad():
        other.W_enc.copy_(sae.W_enc[:, order])
        other.b_enc.copy_(sae.b_enc[order])
        other.W_dec.copy_(sae.W_dec[order])
        other.b_dec.copy_(sae.b_dec)
    return other


def test_an_sae_matches_itself(teacher, activations):
    found = match_features(teacher, teacher, activations)
    assert found.partner.tolist() == list(range(32))
    assert found.mutual.all()
    assert found.cosine.min() > 1 - 1e-6
    assert found.correlation.min() > 1 - 1e-5
    summary = found.summary()
    assert summary["kept_meaning"] == summary["same_index"] == summary["mutual"] == 32
    assert summary["kept_meaning_fraction"] == 1
    assert summary["cosine"]["p50"] == pytest.approx(1)


def test_a_permutation_is_found(teacher, activations):
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    found = match_features(teacher, permuted(teacher, order), activations)
    assert torch.equal(found.partner, order)
    assert torch.equal(found.best_correlated, order)
    assert found.summary()["kept_meaning"] == 32
    assert found.summary()["same_index"] == int((order == torch.arange(32)).sum())
    assert torch.equal(found.partner_frequency, found.frequency)


def test_cosines_and_correlations_are_numpys(teacher, activations):
    """Another SAE of another size; the decoder's norms must not matter, nor that the text begins otherwise."""
    activations = torch.cat([0.2 * activations, 1.5 * activations])
    sae = ReluSAE(16, 24, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.1, 3, 24)[:, None])
    found = match_features(teacher, sae, activations)
    own, other = ((one.W_dec / one.W_dec.norm(dim=1, keepdim=True)).detach().double().numpy() for one in (sae, teacher))
    cosine = own @ other.T
    assert found.partner.tolist() == cosine.argmax(1).tolist()
    assert np.allclose(found.cosine, cosine.max(1), atol=1e-6)
    assert found.mutual.tolist() == [cosine.argmax(0)[t] == f for f, t in enumerate(cosine.argmax(1))]
    with torch.no_grad():
        z, z_teacher = sae.encode(activations).double().numpy(), teacher.encode(activations).double().numpy()
    expected = np.corrcoef(z.T, z_teacher.T)[:24, 24:]
    assert np.allclose(found.correlation, expected[np.arange(24), cosine.argmax(1)], atol=ROUNDING)
    assert np.allclose(found.best_correlation, expected.max(1), atol=ROUNDING)
    assert found.best_correlated.tolist() == expected.argmax(1).tolist()
    assert np.allclose(found.frequency, (z != 0).mean(0))
    assert np.allclose(found.partner_frequency, (z_teacher != 0).mean(0)[cosine.argmax(1)])
    there = (z_teacher != 0)[:, cosine.argmax(1)]
    either = ((z != 0) | there).sum(0)
    assert np.allclose(found.overlap[either > 0], (((z != 0) & there).sum(0) / np.maximum(either, 1))[either > 0])
    assert found.overlap.isnan().tolist() == (either == 0).tolist()


def test_passes_over_parts_of_the_teacher_give_the_same(teacher, activations):
    sae = ReluSAE(16, 24, generator=torch.Generator().manual_seed(3))
    assert (passes(teacher, sae), passes(teacher, sae, 24 * 5)) == (1, 7)
    done = []
    whole = match_features(teacher, sae, activations)
    parts = match_features(teacher, sae, activations, pairs=24 * 5, progress=done.append)
    assert sum(done) == 7 * len(activations)
    for name in ("partner", "mutual", "best_correlated"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))
    assert torch.allclose(whole.correlation, parts.correlation, atol=ROUNDING)
    assert torch.allclose(whole.best_correlation, parts.best_correlation, atol=ROUNDING)
    with pytest.raises(ConfigError, match="24 features"):
        match_features(teacher, sae, activations, pairs=23)


def test_a_feature_with_a_large_mean_keeps_its_digits(activations):
    """Always on, around 1000 with a standard deviation near 1: sums of squares in float32 would lose it."""
    teacher, sae = (ReluSAE(16, 2, apply_b_dec_to_input=False) for _ in range(2))
    with torch.no_grad():
        for one in (teacher, sae):
            one.W_enc.zero_()
            one.W_enc[0, 0] = one.W_enc[1, 1] = 1
            one.b_enc.fill_(1000)
            one.W_dec.copy_(torch.eye(2, 16))
        sae.W_enc[1, 0] = 0.5
    found = match_features(teacher, sae, activations)
    x = activations.double().numpy()
    expected = np.corrcoef(x[:, 0], x[:, 0] + 0.5 * x[:, 1])[0, 1]
    assert float(found.correlation[0]) == pytest.approx(expected, abs=1e-3)


def test_the_most_changed_features_come_first_and_dead_ones_separately(teacher, activations):
    sae = permuted(teacher, torch.arange(32))
    with torch.no_grad():
        sae.W_dec[5] = -sae.W_dec[5]  # another direction
        sae.W_enc[:, 9] = torch.randn(16, generator=torch.Generator().manual_seed(7))  # fires on something else
        sae.b_enc[20] = -1e4  # dead
    found = match_features(teacher, sae, activations)
    summary = found.summary()
    assert set(found.most_changed(2)) == {5, 9}
    assert 20 not in found.most_changed(32)
    assert found.correlation[20].isnan()
    assert found.best_correlated[20] == -1
    assert found.partner[20] == 20
    assert summary["never_active"] == 1
    assert summary["kept_meaning"] == 29
    assert summary["kept_meaning_fraction"] == pytest.approx(29 / 31)
    assert summary["correlation"]["p95"] <= 1


def test_saes_that_cannot_be_matched_are_named(teacher, activations):
    with pytest.raises(ShapeError, match="d_in=16 and 8"):
        match_features(teacher, ReluSAE(8, 4), activations)
    with pytest.raises(ConfigError, match="at least 2"):
        match_features(teacher, teacher, activations[:1])
