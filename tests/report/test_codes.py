"""What the plots and snippets are computed from, against the definitions in rsae_triton.evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from report_cases import FakeStore, FakeTokenizer, make_saes

from rsae_triton.evaluation import at_l0, reconstruction
from rsae_triton.report.codes import codes_of, mse_against_l0, subset
from rsae_triton.report.gates import gate_picture
from rsae_triton.report.plots import readme_figure
from rsae_triton.report.snippets import CONTEXT, choose_features, code_change, feature_snippets
from rsae_triton.teachers import ReluSAE


@pytest.mark.parametrize("role", ["teacher", "rsae"])
def test_trade_off_curve_is_the_thresholded_code(saes, x, role):
    with torch.no_grad():
        saes[role].W_dec.mul_(torch.linspace(0.5, 2, 32)[:, None])  # the threshold counts decoder norms
    l0, mse = mse_against_l0(codes_of(saes[role], x), x)
    for at, expected in zip(l0[[0, 4, -1]], mse[[0, 4, -1]], strict=True):
        score = reconstruction(at_l0(saes[role], x, float(at)), x)
        assert score.l0 == pytest.approx(at, rel=1e-6)
        assert score.mse == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("mode", ["layer_norm", "constant_norm_rescale"])
def test_trade_off_curve_of_an_sae_that_normalises(x, mode):
    sae = ReluSAE(x.shape[1], 32, normalize_activations=mode, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_dec.copy_(torch.linspace(-1, 1, x.shape[1]))
    l0, mse = mse_against_l0(codes_of(sae, 3 * x + 1), 3 * x + 1)
    score = reconstruction(sae, 3 * x + 1)
    assert (l0[-1], mse[-1]) == (pytest.approx(score.l0), pytest.approx(score.mse, rel=1e-4))


def test_codes_count_as_the_metrics_do(saes, x):
    codes, score = codes_of(saes["rsae"], x), reconstruction(saes["rsae"], x)
    assert codes.l0 == pytest.approx(score.l0)
    assert (codes.firing_frequency() > 0).mean() == pytest.approx(score.alive_fraction)
    np.testing.assert_allclose(codes.feature(3), saes["rsae"].encode(x)[:, 3].detach().numpy())


def test_subset_is_ordered_and_depends_on_the_seed_only():
    assert subset(5, seed=0, limit=9).tolist() == [0, 1, 2, 3, 4]
    first = subset(100, seed=0, limit=9)
    assert len(first) == 9
    assert first.tolist() == sorted(set(first.tolist())) == subset(100, seed=0, limit=9).tolist()
    assert first.tolist() != subset(100, seed=1, limit=9).tolist()


def test_code_change_and_the_choice_of_features_follow_the_dense_codes(saes, x):
    before = codes_of(saes["teacher"], x)
    after = codes_of(saes["rsae"], x)
    dense = [saes[role].encode(x).detach() for role in ("teacher", "rsae")]
    expected = (dense[1] - dense[0]).norm(dim=0) / dense[0].norm(dim=0)
    np.testing.assert_allclose(code_change(before, after), expected.numpy(), rtol=1e-5)
    chosen = choose_features(before, after)
    frequency = before.firing_frequency()[chosen]
    assert len(set(chosen)) == 8
    assert (np.diff(frequency) >= 0).all()
    assert int(np.nanargmax(code_change(before, after))) in chosen


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
def test_gate_picture_draws_the_gates(kind, x):
    saes = make_saes(kind)
    picture = gate_picture(saes["teacher"], saes["init"], saes["rsae"], x, np.ones(32, dtype=bool))
    opened = picture.h > 0.6
    np.testing.assert_array_equal(picture.init.median == 0, picture.h <= np.float32(0.5))
    # The lowest threshold of the 10-90 % band opens first, the highest last.
    assert (picture.rsae.low <= picture.rsae.high).all()
    assert (picture.rational.median[opened] > 0).all()
    if kind == "relu":
        np.testing.assert_allclose(picture.teacher.median, np.maximum(picture.h, 0), atol=1e-6)
    if kind == "topk":  # no function of h: its mean code, which grows with h
        known = np.isfinite(picture.teacher.median)
        assert picture.teacher.median[known & (picture.h < 0)].max() == 0
        assert picture.teacher.median[known][-1] > 0


def test_snippets_stay_in_their_document_and_show_the_strongest_tokens(saes, x):
    store = FakeStore()
    codes = {role: codes_of(saes[role], x) for role in ("teacher", "rsae")}
    features = feature_snippets(saes, codes, np.arange(len(x)), store, FakeTokenizer())
    assert len(features) == 8
    for feature in features:
        for side, role in zip(feature.sides, ("teacher", "rsae"), strict=True):
            z = codes[role].feature(feature.index)
            assert side.snippets[0].value == pytest.approx(np.abs(z).max())
            assert side.frequency == pytest.approx((z != 0).mean())
            for snippet in side.snippets:
                ids = [int(token.text.strip().removeprefix("word")) for token in snippet.tokens]
                places = [divmod(i, 20) for i in ids]
                assert len({int(store.sequences.documents[place]) for place in places}) == 1
                assert all(position > 0 for _, position in places)
                assert len(ids) <= 2 * CONTEXT + 1
                (peak,) = (i for i, token in enumerate(snippet.tokens) if token.peak)
                context, position = places[peak]
                assert z[context * 19 + position - 1] == pytest.approx(snippet.value)
    assert features[0].sides[0].threshold == 0
    assert features[0].sides[1].threshold == pytest.approx(saes["rsae"].gate.threshold[features[0].index].item())


class _Bytes:
    """Tokens that are single bytes: a character of two bytes is half-decoded in between."""

    def decode(self, token_ids):
        return bytes(token_ids).decode("utf-8", errors="replace")


def test_pieces_put_split_characters_together():
    from rsae_triton.report.snippets import _pieces

    pieces = _pieces(_Bytes(), list("né!".encode()))
    assert pieces == ["n", "", "é", "!"]


def test_readme_figure(saes, x, metrics, tmp_path):
    figure = readme_figure(metrics, {}, saes, x)
    for name in ("figure.png", "figure.svg"):
        figure.savefig(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
