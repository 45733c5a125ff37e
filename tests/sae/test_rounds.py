"""Rounds in an SAE: what they leave alone, what they gain untrained, files, dtypes, units, training's loss."""

import copy
import json
import warnings

import pytest
import torch

from rsae_triton import FusedRationalSAE, upgrade
from rsae_triton.common.errors import ConfigError, FormatError, NumericsError, ShapeError
from rsae_triton.sae import added, adding
from rsae_triton.sae.adding import hold_l0
from rsae_triton.teachers import BatchTopKSAE, JumpReluSAE, ReluSAE, TopKSAE
from rsae_triton.upgrading import stage_one


def known():
    """[3000, 32] of some 4 of 96 known directions each, and noise; and the directions, of norm 1."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(96, 32, generator=generator))
    codes = (1 + torch.rand(3000, 96, generator=generator)) * (torch.rand(3000, 96, generator=generator) < 0.05)
    return codes @ directions + 0.1 * torch.randn(3000, 32, generator=generator) + 0.3, directions


X, DIRECTIONS = known()
KEYS = ("W_enc", "b_enc", "W_dec", "b_dec")


def teacher(family="jumprelu", **options):
    """An SAE that knows the directions."""
    kinds = {
        "relu": lambda: ReluSAE(32, 96, **options),
        "jumprelu": lambda: JumpReluSAE(32, 96, threshold=1.2, **options),
        "topk": lambda: TopKSAE(32, 96, k=5, **options),
        "batchtopk": lambda: BatchTopKSAE(32, 96, k=5, **options),
    }
    sae = kinds[family]()
    with torch.no_grad():
        sae.W_dec.copy_(DIRECTIONS)
        sae.W_enc.copy_(DIRECTIONS.t())
        sae.b_dec.fill_(0.3)
        sae.b_enc.fill_(-1.4 if family == "relu" else 0.0)
        if family == "batchtopk":
            sae.topk_threshold.fill_(1.2)
    return sae


@pytest.fixture(scope="module")
def two():
    return teacher().with_rounds(2, X)


def scores(sae, x=X):
    with torch.no_grad():
        z = sae.encode(x)
        return float((x - sae.decode(z, x)).square().sum(1).mean()), float((z != 0).sum(1).float().mean())


@pytest.mark.parametrize("family", ["relu", "jumprelu", "topk", "batchtopk"])
def test_every_family_gains_at_its_own_l0_and_keeps_its_weights(family):
    own = teacher(family)
    before = copy.deepcopy(own.state_dict())
    sae = own.with_rounds(2, X)
    more = sae.with_rounds(4, X)
    assert all(torch.equal(one, before[name]) for name, one in own.state_dict().items())
    assert all(torch.equal(getattr(one, name), getattr(own, name)) for name in KEYS for one in (sae, more))
    (mse, l0), (mse_2, l0_2), (mse_4, l0_4) = scores(own), scores(sae), scores(more)
    assert mse_4 < mse_2 < 0.9 * mse
    assert abs(l0_2 / l0 - 1) < 0.01
    assert abs(l0_4 / l0 - 1) < 0.01
    assert bool((sae.encode(X) >= 0).all())
    facts = sae.metadata["rounds"]
    assert facts["mse"] == pytest.approx(mse_2, rel=1e-4)
    assert facts["mse_before"] == pytest.approx(mse, rel=1e-4)
    assert "2 rounds, untrained" in facts["summary"]


def test_a_round_that_makes_small_dimensions_worse_is_told(monkeypatch):
    own = teacher()
    found = added.scores(own, X)
    error = (X - own.decode(own.encode(X), X)).double()
    wanted = (error.square().mean(0) / X.double().var(0, correction=0)).mean()
    assert found.unexplained == pytest.approx(wanted.item(), rel=1e-5)
    assert found.mse == pytest.approx(error.square().sum(1).mean().item(), rel=1e-5)
    almost_constant = X.clone()
    almost_constant[:, 3] = 0.3 + 1e-7 * torch.arange(len(X)) / len(X)
    assert added.scores(own, almost_constant).unexplained < 10

    worse = iter((0.4, 0.5) * 3)
    measured = added.scores
    for module in (adding, stage_one):
        monkeypatch.setattr(module, "scores", lambda *one: measured(*one)._replace(unexplained=next(worse)))
    with pytest.warns(UserWarning, match=r"dimensions of small variance get worse.*0\.400 to 0\.500"):
        assert own.with_rounds(2, X).rounds == 2
    with pytest.warns(UserWarning, match="no round was added"):
        assert upgrade(own, X).rounds == 1
    with pytest.warns(UserWarning, match="lets the model choose"):
        assert upgrade(own, X, rounds=2).rounds == 2


def test_weights_of_dimensions_are_a_scaling_of_them():
    weights = torch.linspace(0.2, 3, 32)
    sae = teacher().with_rounds(3, X, weights=weights)
    weights = weights / weights.mean()
    scaled = teacher()
    with torch.no_grad():
        scaled.W_enc.div_(weights[:, None])
        scaled.W_dec.mul_(weights)
        scaled.b_dec.mul_(weights)
    scaled = scaled.with_rounds(3, X * weights)
    assert all(torch.equal(getattr(sae, name), getattr(teacher(), name)) for name in KEYS)
    for name in ("a", "b", "eta"):
        assert sae.metadata["rounds"][name] == scaled.metadata["rounds"][name]
    torch.testing.assert_close(sae.refinement.unit, scaled.refinement.unit)
    torch.testing.assert_close(sae.refinement.threshold, scaled.refinement.threshold, rtol=0.02, atol=0.01)
    scaled.gate = sae.gate  # its ramp is as wide as the activations are long, and theirs are scaled
    with torch.no_grad():
        scaled.refinement.threshold.copy_(sae.refinement.threshold)
        wanted, z, plain = scaled.encode(X * weights), sae.encode(X), teacher().with_rounds(3, X).encode(X)
    assert float(((z != 0) != (wanted != 0)).double().mean()) < 1e-5
    assert float((z - wanted).norm()) < 0.03 * float((z - plain).norm())  # a few at thresholds may differ
    torch.testing.assert_close(sae(X).detach(), sae.decode(z).detach(), rtol=1e-4, atol=1e-4)
    # equal weights are none
    plain, ones = teacher().with_rounds(2, X), teacher().with_rounds(2, X, weights=torch.full((32,), 7.0))
    torch.testing.assert_close(ones.encode(X), plain.encode(X))
    assert "dimensions weighed" in ones.metadata["rounds"]["summary"]


def test_weights_without_a_further_round_are_an_error():
    with pytest.raises(ConfigError, match="give rounds=2"):
        FusedRationalSAE(8, 16, form="gated", weighed=True)


def test_weights_are_saved_kept_by_more_rounds_and_checked(tmp_path):
    weights = torch.linspace(0.2, 3, 32)
    sae = teacher().with_rounds(2, X, weights=weights)
    sae.save_pretrained(tmp_path / "sae")
    loaded = FusedRationalSAE.from_pretrained(tmp_path / "sae")
    assert torch.equal(loaded.refinement.weights, sae.refinement.weights)
    assert torch.equal(loaded.encode(X), sae.encode(X))
    assert torch.equal(loaded.with_rounds(4, X, weights=weights).refinement.weights, sae.refinement.weights)
    assert sae.with_rounds(1, X).refinement is None
    for seed in range(8):  # the mean of weights with mean 1 is not always 1
        more = torch.rand(32, generator=torch.Generator().manual_seed(seed)) + 0.1
        made = teacher().with_rounds(2, X[:64], weights=more)
        assert made.with_rounds(3, X[:64], weights=made.refinement.weights).rounds == 3
    assert bool(teacher().with_rounds(2, X, weights=torch.full((32,), 1e38))(X).isfinite().all())
    with pytest.raises(NumericsError, match="smallest weight of a dimension is 3e-08"):
        teacher().with_rounds(2, X, weights=torch.ones(32).index_fill_(0, torch.tensor([3]), 3e-8))
    with pytest.raises(ConfigError, match="weigh dimensions otherwise"):
        sae.with_rounds(3, X, weights=weights.flip(0))
    with pytest.raises(ShapeError, match="one number per dimension"):
        teacher().with_rounds(2, X, weights=weights[:5])
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(NumericsError, match="positive and finite"):
            teacher().with_rounds(2, X, weights=weights.clone().index_fill_(0, torch.tensor([3]), value))
    sae.refinement.weights[3] = -1.0
    sae.save_pretrained(tmp_path / "wrong")
    with pytest.raises(NumericsError, match=r"refinement\.weights"):
        FusedRationalSAE.from_pretrained(tmp_path / "wrong")
    with torch.no_grad():
        sae.refinement.threshold[0, 3] = -1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(NumericsError, match=r"refinement\.threshold must not be negative"):
            sae.refinement.check_values()


def test_rounds_set_on_one_sample_help_on_another(two):
    held = X[1::2]
    sae, own = teacher().with_rounds(2, X[0::2]), teacher()
    assert scores(sae, held)[0] < 0.9 * scores(own, held)[0]
    assert abs(scores(sae, held)[1] / scores(own, held)[1] - 1) < 0.03


def test_with_rounds_reaches_a_target_l0_and_removes_rounds(two):
    assert scores(two.with_rounds(3, X, target_l0=4.0))[1] == pytest.approx(4.0, abs=0.05)
    one = two.with_rounds(1, X)
    assert one.rounds == 1
    assert one.refinement is None
    assert scores(one)[1] == pytest.approx(scores(two)[1], rel=0.01)


def test_l0_is_held_by_the_last_gate_alone(two):
    sae = copy.deepcopy(two)
    assert hold_l0(sae, X, 5.0) == pytest.approx(5.0, abs=0.05)
    changed = {n for n, one in sae.state_dict().items() if not torch.equal(one, two.state_dict()[n])}
    assert changed == {"refinement.threshold"}
    one = two.with_rounds(1, X)
    assert hold_l0(one, X, 9.0) == pytest.approx(9.0, abs=0.05)  # lower than any threshold was: up again, too
    assert hold_l0(one, X, 3.0) == pytest.approx(3.0, abs=0.05)
    with pytest.warns(UserWarning, match="cannot go below 0"):
        hold_l0(copy.deepcopy(one), X, 60.0)
    with pytest.raises(ConfigError, match="thresholds per feature"):
        hold_l0(teacher("topk"), X, 5.0)


def test_one_round_is_the_encoder_there_was():
    plain = FusedRationalSAE(32, 96, form="gated", generator=torch.Generator().manual_seed(0))
    one = FusedRationalSAE(32, 96, form="gated", rounds=1, generator=torch.Generator().manual_seed(0))
    assert plain.state_dict().keys() == one.state_dict().keys()
    assert "rounds" not in one.config()
    assert torch.equal(plain.encode(X), one.encode(X))


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)])
def test_any_leading_shape(two, lead):
    x = torch.randn(*lead, 32, generator=torch.Generator().manual_seed(0))
    z = two.encode(x)
    assert z.shape == (*lead, 96)
    assert torch.allclose(two(x), two.decode(z), atol=1e-5)
    # With and without gradients products are summed in another order: 4e-6 at most in 1,000 draws.
    assert torch.allclose(two.encode_sparse(x).to_dense(96), z, atol=1e-5)
    with pytest.raises(ShapeError, match="d_in=32"):
        two.encode(x.new_zeros(4, 15))


def test_the_k_largest_as_rows(two):
    with torch.no_grad():
        z = two.encode(X[:300])
        rows = two.encode_sparse(X[:300], k=3)
    values, places = z.topk(3)
    wanted = torch.zeros_like(z).scatter(1, places, values)
    assert int(rows.counts.max()) == 3
    assert torch.allclose(rows.to_dense(96), wanted, atol=1e-6)
    assert bool((rows.indices.diff(dim=1)[rows.counts == 3] > 0).all())


def test_backends_agree(two):
    eager = copy.deepcopy(two)
    eager.backend = "eager"
    z, wanted = two.encode(X), eager.encode(X)
    same = (z != 0) == (wanted != 0)
    assert float(same.float().mean()) > 1 - 1e-4
    assert torch.allclose(z[same], wanted[same], atol=1e-4)
    assert torch.allclose(eager(X[:9]), eager.decode(eager.encode(X[:9])))


def test_many_tokens_are_the_same_piece_by_piece(two, monkeypatch):
    with torch.no_grad():
        wanted, x_hat = two.encode_with_sums(X), two(X)
        monkeypatch.setattr("rsae_triton.sae.rounds.TOKENS", 100)
        found, own = two.encode_with_sums(X), two(X)
    assert torch.allclose(found.z, wanted.z, atol=1e-5)
    assert torch.equal(found.counts, wanted.counts)
    assert torch.allclose(own, x_hat, atol=1e-5)


def test_low_precision_keeps_the_numbers_of_rounds_in_float32(two):
    narrow = copy.deepcopy(two).to(torch.bfloat16)
    assert narrow.W_dec.dtype == torch.bfloat16
    assert all(one.dtype == torch.float32 for one in narrow.refinement.state_dict().values())
    z = narrow.encode(X.bfloat16())
    assert z.dtype == torch.bfloat16
    assert float((z.float() - two.encode(X)).detach().norm() / two.encode(X).detach().norm()) < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        assert two.encode(X).dtype == torch.bfloat16
        assert abs(float((X - two(X)).detach().square().sum(1).mean()) / scores(two)[0] - 1) < 0.05


@pytest.mark.parametrize("options", [{"l0_weight": 0.3}, {"l1_weight": 0.2}, {}])
@pytest.mark.parametrize("normalized", ["none", "layer_norm"])
def test_the_training_loss_is_the_one_built_from_code_and_decoder(options, normalized):
    sae = teacher(normalize_activations=normalized, apply_b_dec_to_input=normalized == "none").with_rounds(3, X)
    sae.double()
    x, l0, l1 = X[:50].double(), options.get("l0_weight", 0.0), options.get("l1_weight", 0.0)
    loss = sae.autoencode(x, **options)
    loss.total.backward()
    own = {name: one.grad.clone() for name, one in sae.named_parameters() if one.grad is not None}
    sae.zero_grad()
    encoded = sae.encode_with_sums(x)
    mse = (x - sae.decode(encoded.z, x)).square().sum(1).mean()
    wanted = mse + (l0 * encoded.counts.sum() + l1 * (encoded.l1 * sae.W_dec.norm(dim=1)).sum()) / len(x)
    wanted.backward()
    assert float(loss.total.detach()) == pytest.approx(float(wanted.detach()), rel=1e-9)
    assert {"refinement.a", "refinement.eta", "refinement.p", "refinement.threshold", "gate.threshold"} <= own.keys()
    for name, one in sae.named_parameters():
        if one.grad is not None:
            assert torch.allclose(own[name], one.grad, rtol=1e-7, atol=1e-9), name


def test_units_can_be_folded(two):
    z, x_hat = two.encode(X), two(X)
    scaled = copy.deepcopy(two).fold_activation_scale_(0.1)  # of activations ten times as long
    assert torch.allclose(scaled.encode(10 * X), z, atol=2e-4)
    assert torch.allclose(scaled(10 * X), 10 * x_hat, atol=2e-3)
    longer = copy.deepcopy(two)
    with torch.no_grad():
        norms = 0.5 + torch.rand(96)
        longer.W_dec.div_(norms[:, None])
        longer.W_enc.mul_(norms)
        longer.b_enc.mul_(norms)
        longer._scale_nonlinearity_(norms)
    assert torch.allclose(longer.encode(X), z * norms, atol=1e-3)
    folded = longer.fold_decoder_norm_()
    assert torch.allclose(folded.W_dec.norm(dim=1), torch.ones(96))
    assert torch.allclose(folded.encode(X), z, atol=1e-3)


def test_rounds_are_the_same_in_any_units():
    class Store:
        scale, manifest, d_in = 0.25, {}, 32

        def tensor(self):
            return X

    own = teacher("relu")
    own.units = 0.25
    wanted = own.with_rounds(2, X)
    raw = copy.deepcopy(own).to_units_(1.0)
    made = raw.with_rounds(2, Store())
    assert made.units == 1.0
    assert torch.equal(made.W_dec, raw.W_dec)
    assert torch.allclose(made.encode(4 * X), wanted.encode(X), atol=2e-3)
    assert hold_l0(made, Store(), 4.0) == pytest.approx(4.0, abs=0.05)
    assert scores(made, 4 * X)[1] == pytest.approx(4.0, abs=0.05)


def test_files(two, tmp_path):
    two.save_pretrained(tmp_path / "two")
    loaded = FusedRationalSAE.from_pretrained(tmp_path / "two")
    assert loaded.rounds == 2
    assert torch.equal(loaded.encode(X), two.encode(X))
    assert loaded.metadata["rounds"] == two.metadata["rounds"]
    config = json.loads((tmp_path / "two/cfg.json").read_text())
    assert config["rounds"] == 2
    assert "2 rounds, untrained" in (tmp_path / "two/README.md").read_text()
    for name, value in (("unit", -1.0), ("threshold", -0.1), ("epsilon", 0.0)):
        wrong = copy.deepcopy(two)
        getattr(wrong.refinement, name).data.fill_(value)
        wrong.save_pretrained(tmp_path / name)
        with pytest.raises(NumericsError, match=f"refinement.{name}"):
            FusedRationalSAE.from_pretrained(tmp_path / name)
    for bad in (1, 3, 10**9, 0, "2", True, None):
        (tmp_path / "two/cfg.json").write_text(json.dumps({**config, "rounds": bad}))
        with pytest.raises(FormatError):
            FusedRationalSAE.from_pretrained(tmp_path / "two")


def test_a_gradient_reaches_x_and_a_compiled_module_runs(two):
    x = X[:20].clone().requires_grad_()
    two(x).square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(two, backend="eager")
        assert torch.allclose(compiled(X[:20]), two(X[:20]), atol=1e-6)


def test_saes_that_cannot_have_rounds_are_refused(two):
    with pytest.raises(ConfigError, match="gated"):
        FusedRationalSAE(32, 96, rounds=2)
    with pytest.raises(ConfigError, match="gated"):
        FusedRationalSAE(32, 96).with_rounds(2, X)
    with pytest.raises(ConfigError, match="rounds is 65"):
        teacher().with_rounds(65, X)
    with pytest.raises(ConfigError, match="dense rational code"):
        two.encode(X, hard=False)
    with pytest.raises(ShapeError, match="activations"):
        teacher().with_rounds(2, X[:, :3])
    exact = upgrade(teacher("topk"), X, thresholds="token")
    assert scores(exact.with_rounds(2, X))[0] < 0.9 * scores(exact)[0]
