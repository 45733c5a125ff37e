"""Scores against their definitions, equal l0, and splicing with a host whose answer is known."""

import importlib
import json
from types import SimpleNamespace

import pytest
import torch

from rsae_triton.common.errors import ConfigError, NumericsError, ShapeError
from rsae_triton.evaluation import Splice, at_l0, compare, mean_interval, measure, reconstruction, splice_loss
from rsae_triton.evaluation.compare import Scores
from rsae_triton.sae.rational import FusedRationalSAE
from rsae_triton.teachers import BatchTopKSAE, JumpReluSAE, ReluSAE, TopKSAE

reconstructions = importlib.import_module("rsae_triton.evaluation.reconstruction")


@pytest.fixture
def sae():
    made = ReluSAE(16, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made.W_dec.mul_(torch.linspace(0.5, 2, 64)[:, None])
    return made


def test_scores_are_their_definitions(sae, activations):
    score = reconstruction(sae, activations)
    z = sae.encode(activations)
    x_hat = sae.decode(z)
    mse = (activations - x_hat).square().sum(1).mean()
    assert score.mse == pytest.approx(float(mse), rel=1e-5)
    variance = (activations - activations.mean(0)).square().sum(1).mean()
    assert score.fvu == pytest.approx(float(mse / variance), rel=1e-5)
    share = (activations - x_hat).double().square().mean(0) / activations.double().var(0, correction=0)
    assert score.fvu_by_dimension == pytest.approx(float(share.mean()), rel=1e-5)
    alone = reconstruction(sae, activations[:1])  # nothing varies, so that no share of the variance exists
    assert alone.fvu != alone.fvu
    assert alone.fvu_by_dimension != alone.fvu_by_dimension
    assert score.l0 == pytest.approx(float((z != 0).sum(1).float().mean()))
    assert score.l1 == pytest.approx(float((z.abs() * sae.W_dec.norm(dim=1)).sum(1).mean()), rel=1e-5)
    assert score.alive_fraction == pytest.approx(float((z != 0).any(0).float().mean()))
    assert score.n_tokens == 2048


def test_equal_l0_is_exact_and_keeps_the_strongest(sae, activations):
    own = reconstruction(sae, activations).l0
    matched = at_l0(sae, activations, own / 3)
    assert reconstruction(matched, activations).l0 == pytest.approx(own / 3, abs=1 / 2048)
    z, kept = sae.encode(activations), matched.encode(activations)
    strength = z * sae.W_dec.norm(dim=1)
    assert strength[kept != 0].min() > strength[(kept == 0) & (z != 0)].max() - 1e-6
    assert at_l0(sae, activations, own * 2).tau == 0


def test_rescaled_decoders_change_no_matched_score(sae, activations):
    """|z| * ||W_dec row|| is what counts: moving scale between code and decoder must not help."""
    target = reconstruction(sae, activations).l0 / 2
    before = reconstruction(at_l0(sae, activations, target), activations)
    factor = torch.rand(64) + 0.5
    with torch.no_grad():
        sae.W_enc.mul_(factor)
        sae.b_enc.mul_(factor)
        sae.W_dec.div_(factor[:, None])
    after = reconstruction(at_l0(sae, activations, target), activations)
    assert after.mse == pytest.approx(before.mse, rel=1e-4)
    assert after.l1 == pytest.approx(before.l1, rel=1e-4)


class Host:
    """A host whose loss is the squared distance of the spliced residual to its own: delta_ce is known."""

    def __init__(self, resid):
        self.resid = resid

    def splice(self, tokens, hook_name, replacements, *, kl):
        resid = self.resid[tokens[:, 0]]
        errors = {
            name: ((r(resid) if r else resid) - resid).square().sum(-1)[:, 1:] for name, r in replacements.items()
        }
        return {name: SimpleNamespace(nll=error + 1, kl=3 * error) for name, error in errors.items()}


def test_splicing_is_paired_and_leaves_bos_and_outliers(sae, activations):
    resid = activations[:600].reshape(30, 20, 16) / 2  # host units: scale 2 takes them to the SAE's
    resid[:, 0] *= 1000
    resid[3, 5] *= 1000
    host, tokens = Host(resid), torch.arange(30)[:, None].expand(30, 20)
    splice = Splice("blocks.0.hook_resid_pre", scale=2.0, norm_limit=100.0)
    score = splice_loss(host, {"sae": sae}, tokens, splice, torch.zeros(16), batch=7)["sae"]
    x = resid * 2
    error = (sae(x) / 2 - resid).square().sum(-1)
    error[:, 0], error[3, 5] = 0, 0
    per_sequence = error[:, 1:].mean(1).double()
    assert score.ce == pytest.approx(1 + float(per_sequence.mean()), rel=1e-4)
    assert score.delta_ce == pytest.approx(float(per_sequence.mean()), rel=1e-4)
    half = 1.959964 * float(per_sequence.std()) / 30**0.5
    assert score.delta_ce_high - score.delta_ce == pytest.approx(half, rel=1e-4)
    assert score.kl == pytest.approx(3 * score.delta_ce, rel=1e-5)
    assert score.kl - score.kl_low == pytest.approx(3 * half, rel=1e-4)


def test_loss_recovered_is_against_zero_and_against_the_mean(sae, activations):
    resid = activations[:600].reshape(30, 20, 16)
    host, tokens = Host(resid), torch.arange(30)[:, None].expand(30, 20)
    mean = resid.flatten(0, 1).mean(0)
    score = splice_loss(host, {"sae": sae}, tokens, Splice("h"), mean)["sae"]
    error, zero, centred = (
        float(one.square().sum(-1)[:, 1:].mean()) for one in (sae(resid) - resid, resid, resid - mean)
    )
    assert (score.ce_clean, score.ce_zero, score.ce_mean) == pytest.approx((1, 1 + zero, 1 + centred), rel=1e-4)
    assert score.loss_recovered == pytest.approx(1 - error / zero, rel=1e-4)
    assert score.loss_recovered_mean == pytest.approx(1 - error / centred, rel=1e-4)
    assert score.loss_recovered_mean < score.loss_recovered - 0.01


def test_predictions_that_do_not_count_are_left_out(sae, activations):
    resid = activations[:600].reshape(30, 20, 16)
    host, tokens = Host(resid), torch.arange(30)[:, None].expand(30, 20)
    counted = torch.ones(30, 19, dtype=torch.bool)
    counted[:, 9:] = False
    score = splice_loss(host, {"sae": sae}, tokens, Splice("h"), torch.zeros(16), counted=counted)["sae"]
    error = (sae(resid) - resid).square().sum(-1)[:, 1:10]
    assert score.delta_ce == pytest.approx(float(error.mean(1).mean()), rel=1e-4)


def test_compare_scores_everyone_at_the_first_ones_l0(sae, activations):
    sparse = ReluSAE(16, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sparse.b_enc.sub_(1.0)
    scores = compare({"teacher": sparse, "rsae": sae}, activations)
    assert scores["matched_l0"]["rsae"]["l0"] == pytest.approx(scores["teacher"]["l0"], abs=1e-3)
    assert scores["matched_l0"]["rsae"]["tau"] > 0
    assert scores["rsae"]["l0"] > scores["teacher"]["l0"]


def test_a_code_at_its_own_l0_is_not_gone_through_twice(sae, activations, monkeypatch):
    """The second pass would hold every active code of the activations."""
    module = importlib.import_module("rsae_triton.evaluation.compare")
    monkeypatch.setattr(module, "cut_to", None)
    scores = compare({"sae": sae}, activations)
    assert scores["matched_l0"]["sae"]["tau"] == 0
    assert scores["matched_l0"]["sae"]["mse"] == scores["sae"]["mse"]


def test_dead_and_dense_features_are_counted_by_their_frequency():
    """Feature f of this SAE is active where x_f > 0, and that is known by construction."""
    sae = ReluSAE(4, 4, apply_b_dec_to_input=False)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(4))
        sae.W_dec.copy_(torch.eye(4))
    x = -torch.ones(20, 4)
    x[:, 0], x[:10, 1], x[:2, 2] = 1, 1, 1  # on 20, 10 (half: not more), 2 (a tenth: not more) and 0 of 20 tokens
    measured = measure(sae, x)
    assert measured.frequency.tolist() == [1, 0.5, 0.1, 0]
    scores = measured.scores
    assert (scores.dead_features, scores.dense_features, scores.dense_features_half) == (1, 2, 1)
    assert scores.alive_fraction == 0.75
    assert measured.squared_error[0] == 1  # reconstructs 1, 1, 1, 0 of 1, 1, 1, -1
    assert measured.squared_error.mean() == pytest.approx(scores.mse)
    assert scores.cosine == pytest.approx((2 * 3 / 12**0.5 + 8 * 2 / 8**0.5 + 10 * 1 / 4**0.5) / 20)


def test_negative_codes_and_the_sizes_of_codes_are_told():
    class Signed(ReluSAE):
        def encode(self, x):
            return x * (x.abs() > 0.5)

    sae = Signed(8, 8)
    with torch.no_grad():
        sae.W_dec.copy_(2 * torch.eye(8))
    x = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0))
    score = measure(sae, x).scores
    active = x[x.abs() > 0.5]
    assert score.negative == pytest.approx(float((active < 0).float().mean()))
    for q in (5, 50, 95):
        assert getattr(score, f"size_p{q}") == pytest.approx(2 * float(active.abs().quantile(q / 100)), rel=1e-3)
    silent = measure(sae, 0.1 * x.clamp(-1, 1)).scores
    assert (silent.negative, silent.size_p50, silent.l0) == (0, 0, 0)


def test_intervals_are_those_of_independent_clusters():
    values = torch.tensor([1.0, 2, 3, 10])
    found = mean_interval(values)
    half = 1.959964 * float(values.std()) / 2
    assert found == pytest.approx((4, 4 - half, 4 + half), abs=1e-5)
    assert found.low < 0 < mean_interval(values + 10).low
    # Every value four times, in clusters of four: as uncertain as the four values alone, not half as much.
    repeated, names = values.repeat_interleave(4), torch.arange(4).repeat_interleave(4)
    assert mean_interval(repeated, names) == pytest.approx(found, abs=1e-9)
    assert mean_interval(repeated).high < found.high
    with pytest.raises(NumericsError, match="at least 2"):
        mean_interval(values, torch.zeros(4, dtype=torch.long))
    with pytest.raises(ShapeError, match="4 values"):
        mean_interval(values, torch.zeros(3))


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(400):
        shared = torch.randn(60, 1, generator=generator)
        values = (shared + 0.5 * torch.randn(60, 8, generator=generator) + 2).flatten()
        found = mean_interval(values, torch.arange(60).repeat_interleave(8))
        hits += found.low < 2 < found.high
    assert 0.90 < hits / 400 < 0.98


def test_compare_pairs_everyone_with_everyone_before(sae, activations):
    other = ReluSAE(16, 64, generator=torch.Generator().manual_seed(1))
    resid = activations[:600].reshape(30, 20, 16)
    contexts = torch.arange(30).repeat_interleave(20)
    options = {"host": Host(resid), "tokens": torch.arange(30)[:, None].expand(30, 20), "splice": Splice("h")}
    with torch.no_grad():
        sae.b_enc.sub_(0.5)  # sparser, so that the other has to be thresholded
    saes = {"a": sae, "b": other, "c": sae}
    scores = compare(saes, resid.flatten(0, 1), contexts=contexts, mean=torch.zeros(16), **options)
    for paired, part in ((scores["paired"]["shipped"], scores), (scores["paired"]["matched_l0"], scores["matched_l0"])):
        assert {(b, a) for b in paired for a in paired[b]} == {("b", "a"), ("c", "a"), ("c", "b")}
        for metric in ("mse", "delta_ce", "kl"):
            mean, low, high = paired["b"]["a"][metric]
            assert mean == pytest.approx(part["b"][metric] - part["a"][metric], rel=1e-4)
            assert low < mean < high
            assert paired["c"]["a"][metric] == [0, 0, 0]
            assert paired["c"]["b"][metric][0] == pytest.approx(-mean)
    for name, one in (("a", sae), ("b", other)):
        at = at_l0(one, resid.flatten(0, 1), scores["matched_l0"][name]["l0"])
        (spliced,) = splice_loss(options["host"], {"": at}, options["tokens"], Splice("h"), torch.zeros(16)).values()
        assert scores["matched_l0"][name]["delta_ce"] == pytest.approx(spliced.delta_ce, rel=1e-5)
    assert compare(saes, resid.flatten(0, 1))["paired"]["shipped"]["b"]["a"] == {}
    with pytest.raises(ConfigError, match="tokens, splice and mean"):
        compare(saes, resid.flatten(0, 1), host=Host(resid))


def test_bad_input_is_named(sae, activations):
    with pytest.raises(ShapeError, match="d_in=16"):
        reconstruction(sae, activations[:, :4])
    with pytest.raises(ShapeError, match="at least one token"):
        reconstruction(sae, activations[:0])
    bad = activations.clone()
    bad[3, 3] = float("inf")
    with pytest.raises(NumericsError, match=r"1 NaN or infinite.*\[3, 3\]"):
        reconstruction(sae, bad)
    with pytest.raises(ConfigError, match="l0 is 0"):
        at_l0(sae, activations, 0)
    with pytest.raises(NumericsError, match="at least 2"):
        splice_loss(Host(activations), {}, torch.zeros(1, 3), Splice("h"), torch.zeros(16))
    with pytest.raises(NumericsError, match="no prediction that counts"):
        splice_loss(Host(activations), {}, torch.zeros(2, 3), Splice("h"), torch.zeros(16), counted=torch.zeros(2, 2))


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "batchtopk", "rational"])
def test_a_wide_code_is_scored_as_rows_and_never_made_whole(kind, activations, monkeypatch):
    """The same scores, thresholded or not, with no tensor of [n_tokens, d_sae]."""
    x, d_sae = activations[:256], 2200
    options = {"generator": torch.Generator().manual_seed(0)}
    sae = {
        "relu": lambda: ReluSAE(16, d_sae, **options),
        "jumprelu": lambda: JumpReluSAE(16, d_sae, threshold=1.5, **options),
        "topk": lambda: TopKSAE(16, d_sae, k=9, **options),
        "batchtopk": lambda: BatchTopKSAE(16, d_sae, k=9, **options),
        "rational": lambda: FusedRationalSAE(16, d_sae, form="gated", **options),
    }[kind]()
    with torch.no_grad():
        sae.b_enc.fill_(-1.5 if kind == "relu" else 0.0)
        if kind == "batchtopk":
            sae.topk_threshold.fill_(1.8)
        if kind == "rational":
            sae.gate.threshold.fill_(1.5)
    wide = {}
    for name, least in (("rows", 2048), ("dense", 10**6)):
        monkeypatch.setattr(reconstructions, "WIDE", least)
        matched = at_l0(sae, x, 4.0)
        wide[name] = [measure(sae, x), measure(matched, x), reconstructions.reconstruct(matched, x)]
    for own, dense in zip(wide["rows"][:2], wide["dense"][:2], strict=True):
        for name, value in vars(dense.scores).items():
            assert getattr(own.scores, name) == pytest.approx(value, rel=1e-4, abs=1e-6), name
        torch.testing.assert_close(own.frequency, dense.frequency)
    assert wide["rows"][1].scores.l0 == pytest.approx(4.0, abs=0.01)
    torch.testing.assert_close(wide["rows"][2], wide["dense"][2], rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(reconstructions, "WIDE", 2048)
    encode = type(sae).encode
    monkeypatch.setattr(type(sae), "encode", lambda *_, **__: pytest.fail("the dense code was made"))
    measure(at_l0(sae, x, 4.0), x)
    monkeypatch.setattr(type(sae), "encode", encode)


def test_scores_print_in_lines_of_80_columns_and_stay_a_dictionary():
    one = {"mse": 48.12455758356161, "fvu": 0.18633, "cosine": 0.95779, "l0": 32.665, "l1": 34.718, "n_tokens": 1200}
    scores = Scores(one | {"alive_fraction": 0.98784})
    assert scores == one | {"alive_fraction": 0.98784}
    assert json.loads(json.dumps(scores)) == scores
    assert str(scores).splitlines() == [
        "error     mse 48.12, fvu 0.1863, cosine 0.9578  (1,200 tokens)",
        "sparsity  l0 32.66, l1 34.72, 98.8 % of the features alive",
    ]
    spliced = {"delta_ce": 0.12086, "delta_ce_low": 0.0019, "delta_ce_high": 0.2398, "kl": 0.24, "n_sequences": 4}
    more = str(Scores(scores | spliced | {"loss_recovered": 0.98847}))
    assert "delta CE 0.1209 nats (95 %: 0.0019 to 0.2398)" in more
    assert "kl 0.24, loss recovered 98.8 %  (4 sequences)" in more
    assert max(map(len, more.splitlines())) <= 80
