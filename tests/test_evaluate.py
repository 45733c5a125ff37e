"""Scores against their definitions, equal l0, and splicing with a host whose answer is known."""

from types import SimpleNamespace

import pytest
import torch

from rsae_triton.errors import ConfigError, NumericsError, ShapeError
from rsae_triton.evaluate import Splice, at_l0, compare, reconstruction, splice_loss
from rsae_triton.teachers import ReluSAE


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

    def splice(self, tokens, hook_name, replacements):
        resid = self.resid[tokens[:, 0]]
        return {
            name: SimpleNamespace(nll=((r(resid) if r else resid) - resid).square().sum(-1)[:, 1:] + 1.0)
            for name, r in replacements.items()
        }


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
    zero = resid.square().sum(-1)
    zero[:, 0], zero[3, 5] = 0, 0
    recovered = 1 - float(per_sequence.mean() / zero[:, 1:].mean(1).mean())
    assert score.loss_recovered == pytest.approx(recovered, rel=1e-4)
    assert score.loss_recovered_mean == pytest.approx(score.loss_recovered, rel=1e-6)


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


def test_bad_input_is_named(sae, activations):
    with pytest.raises(ShapeError, match="d_in=16"):
        reconstruction(sae, activations[:, :4])
    with pytest.raises(ShapeError, match="at least one token"):
        reconstruction(sae, activations[:0])
    bad = activations.clone()
    bad[3, 3] = float("inf")
    with pytest.raises(NumericsError, match="1 of 2048"):
        reconstruction(sae, bad)
    with pytest.raises(ConfigError, match="l0 is 0"):
        at_l0(sae, activations, 0)
    with pytest.raises(NumericsError, match="at least 2"):
        splice_loss(Host(activations), {}, torch.zeros(1, 3), Splice("h"), torch.zeros(16))
