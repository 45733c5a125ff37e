"""Stage 1 for all three families, both forms: weights copied bit for bit, the code reproduced."""

import copy
import warnings

import pytest
import torch

from rsae_triton import FusedRationalSAE, TopKRationalSAE, train, upgrade
from rsae_triton.common.errors import ConfigError, FormatError, NumericsError, ShapeError
from rsae_triton.evaluation import reconstruction
from rsae_triton.evaluation.held_out import load_sae
from rsae_triton.ops.reference import rational_gate
from rsae_triton.sae.like_teacher import teacher_thresholds
from rsae_triton.teachers import JumpReluSAE, ReluSAE, TopKSAE
from rsae_triton.training.recipes import RECIPES, Recipe

FAMILIES = {
    "relu": (ReluSAE, {}, Recipe("relu", "l1", weight=0.08)),
    "jumprelu": (JumpReluSAE, {"threshold": 0.4, "bandwidth": 0.3}, Recipe("jumprelu", "l0", weight=0.01)),
    "topk": (TopKSAE, {"k": 6}, RECIPES["topk"]),
}


@pytest.fixture(scope="module")
def teachers():
    from synthetic import sparse_activations

    x = sparse_activations()
    made = {}
    for name, (kind, options, recipe) in FAMILIES.items():
        sae = kind(16, 64, generator=torch.Generator().manual_seed(0), **options)
        train(sae, x, steps=250, recipe=recipe, lr=3e-3, batch_size=128, progress=False)
        made[name] = sae
    return made


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_copied_bit_for_bit(teachers, activations, name):
    teacher = teachers[name]
    rsae = upgrade(teacher, activations)
    for one in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(rsae, one), getattr(teacher, one))
    assert isinstance(rsae, FusedRationalSAE)


@pytest.mark.parametrize("name", ["relu", "jumprelu"])
def test_gated_code_reproduces_its_teacher(teachers, activations, name):
    teacher = teachers[name]
    rsae = upgrade(teacher, activations, rounds=1)
    ours, theirs = reconstruction(rsae, activations), reconstruction(teacher, activations)
    assert ours.mse == pytest.approx(theirs.mse, rel=0.01)
    assert ours.l0 == pytest.approx(theirs.l0, rel=1e-6)
    assert rsae.metadata["stage1"]["relative_error"] <= 0.0058  # the (3, 2) ramp's own error


def test_topk_thresholds_fire_as_often_as_the_teacher(teachers, activations):
    teacher = teachers["topk"]
    rsae = upgrade(teacher, activations, n_tokens=len(activations), rounds=1)
    fires = (teacher.encode(activations) != 0).sum(0)
    assert (((rsae.encode(activations) != 0).sum(0) - fires).abs() <= 1).all()


@pytest.mark.parametrize("name", ["relu", "jumprelu"])
def test_direct_code_is_calibrated_to_the_real_density(teachers, activations, name):
    """Least squares on the histogram beats the minimax start, and degree="auto" climbs until it is good enough."""
    rsae = upgrade(teachers[name], activations, form="direct", tolerance=0.01)
    stage = rsae.metadata["stage1"]
    assert stage["relative_error"] < stage["initial_relative_error"]
    assert stage["l0"] == pytest.approx(stage["teacher_l0"], rel=0.02)
    assert stage["train_l0"] == pytest.approx(1.04 * stage["teacher_l0"])
    assert stage["lower_bound"] / stage["error"] > 0.999
    # The jump's margin holds some of the mass here; the best (9,8) leaves 1.4 %.
    assert stage["relative_error"] <= (0.01 if name == "relu" else 0.02)


def test_activations_of_another_place_are_refused(teachers, activations):
    class Store:
        manifest = {"hook_name": "blocks.16.hook_resid_pre"}  # noqa: RUF012

        def tensor(self):
            return activations

    teacher = copy.deepcopy(teachers["relu"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        upgrade(teacher, Store())
        teacher.metadata["hook_name"] = "blocks.16.hook_resid_pre"
        upgrade(teacher, Store())
    teacher.metadata["hook_name"] = "blocks.8.hook_resid_pre"
    with pytest.raises(ConfigError, match=r"read at blocks\.16.*reads blocks\.8"):
        upgrade(teacher, Store())


def test_the_automatic_degree_climbs_until_the_code_is_good_enough(teachers, activations):
    degrees = [
        upgrade(teachers["relu"], activations, form="direct", tolerance=tolerance).gate.degree
        for tolerance in (0.5, 0.004)
    ]
    assert degrees[0] == (3, 2)
    assert sum(degrees[1]) > 5


def test_per_feature_and_grouped_coefficients(teachers, activations):
    shared = upgrade(teachers["relu"], activations)
    for coefficients, groups in (("per_feature", 64), (8, 8)):
        rsae = upgrade(teachers["relu"], activations, coefficients=coefficients)
        assert rsae.gate.groups == groups
        assert torch.allclose(rsae(activations[:50]), shared(activations[:50]), atol=1e-5)


def test_groups_are_made_of_equally_strong_features(teachers, activations):
    teacher = teachers["relu"]
    rsae = upgrade(teacher, activations, coefficients=5)  # does not divide 64
    with torch.no_grad():
        z = teacher.encode(activations)
    strength = (z.square().sum(0) / (z != 0).sum(0).clamp_min(1)).sqrt()
    groups = [strength[rsae.gate.group_of == group] for group in range(5)]
    assert [len(one) for one in groups] == [13, 13, 13, 13, 12]
    # The sample is not all activations: groups may overlap at their ends, their middles may not.
    medians = [float(one.median()) for one in groups]
    assert medians == sorted(medians)
    assert medians[-1] > 1.2 * medians[0]


def test_a_group_moves_its_own_features_only(teachers, activations, tmp_path):
    rsae = upgrade(teachers["relu"], activations, coefficients=5, rounds=1)
    before = rsae.encode(activations)
    with torch.no_grad():
        rsae.gate.alpha[2] *= 1.5
    changed = ((rsae.encode(activations) - before).abs().amax(0) > 1e-6).nonzero().flatten()
    assert len(changed)
    assert set(changed.tolist()) <= set((rsae.gate.group_of == 2).nonzero().flatten().tolist())
    rsae.encode(activations).square().sum().backward()
    assert len(rsae.gate.alpha.grad) == 5
    loaded = type(rsae).from_pretrained(rsae.save_pretrained(tmp_path / "grouped"))
    assert torch.equal(loaded.encode(activations), rsae.encode(activations))


def test_a_file_that_names_a_group_that_is_not_there_is_refused(teachers, activations, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = upgrade(teachers["relu"], activations, coefficients=5).save_pretrained(tmp_path / "bad")
    weights = load_file(folder / "sae_weights.safetensors")
    for wrong in (weights["gate.group_of"] + 3, weights["gate.group_of"] - 1):
        save_file({**weights, "gate.group_of": wrong}, folder / "sae_weights.safetensors")
        with pytest.raises(FormatError, match="group_of"):
            FusedRationalSAE.from_pretrained(folder)


def test_a_topk_threshold_lies_halfway_to_the_next_pre_activation(teachers, activations):
    """Not at it: on other text the next one would fire."""
    teacher = teachers["topk"]
    with torch.no_grad():
        h, z = teacher.hidden_pre(activations), teacher.encode(activations)
    theta = teacher_thresholds(teacher, h, z)
    fires = (z != 0).sum(0)
    assert torch.equal((h > theta).sum(0), torch.where(theta > 0, fires, (h > 0).sum(0)))
    ranked = h.sort(0, descending=True).values
    for feature in ((fires > 0) & (theta > 0)).nonzero().flatten().tolist():
        last, following = ranked[fires[feature] - 1, feature], ranked[fires[feature], feature]
        assert theta[feature] == pytest.approx(float(last + following) / 2, rel=1e-6)


@pytest.mark.parametrize("coefficients", [0, -1, 65, "some", 2.5])
def test_a_number_of_groups_that_cannot_be_is_refused(teachers, activations, coefficients):
    with pytest.raises(ConfigError, match="coefficients is"):
        upgrade(teachers["relu"], activations, coefficients=coefficients)


def test_the_gate_is_the_smallest_ramp_that_is_close_enough(teachers, activations):
    degrees = [upgrade(teachers["relu"], activations, tolerance=tol).gate.degree for tol in (0.05, 0.0085, 0.001)]
    assert degrees == [(3, 2), (5, 4), (7, 6)]


def test_the_ramps_width_changes_how_it_trains_and_not_the_code(teachers, activations):
    usual, narrow = (upgrade(teachers["relu"], activations, width=width, rounds=1) for width in (1.0, 0.5))
    torch.testing.assert_close(narrow.gate.input_scale, usual.gate.input_scale / 2)
    codes = [one.encode(activations) for one in (narrow, usual)]
    assert float((codes[0] - codes[1]).norm() / codes[1].norm()) < 0.01
    assert torch.equal(
        upgrade(teachers["relu"], activations, width="0.5", rounds=1).gate.input_scale, narrow.gate.input_scale
    )
    for width, form in ((0.5, "direct"), (0.0, "gated"), (float("nan"), "gated"), ("wide", "gated"), (True, "gated")):
        with pytest.raises(ConfigError, match="width is"):
            upgrade(teachers["relu"], activations, width=width, form=form, rounds=1)


@pytest.mark.filterwarnings("ignore:.*worse than their mean")
def test_a_ramp_reaches_no_deeper_than_active_codes_rise_where_those_are_small(teachers, activations):
    teacher = teachers["relu"]
    usual = float(upgrade(teacher, activations, width=1.0).gate.input_scale.detach())
    with torch.no_grad():
        # The sample is all activations, so that the rise is that of all.
        z = teacher.encode(activations)
        for wanted in (0.3, 0.69, 0.71, 1.0, 4.0):
            factor = wanted * usual / float(z[z != 0].median())
            scaled = copy.deepcopy(teacher)
            for name in ("W_enc", "b_enc"):
                getattr(scaled, name).mul_(factor)
            width = float(upgrade(scaled, activations).gate.input_scale.detach()) / usual
            assert width == pytest.approx(1.0 if wanted > 0.7 else wanted, rel=5e-3)
        # The same SAE with codes in other units has the same ramp in these.
        scaled.W_dec.div_(3)
        assert float(upgrade(scaled, activations).gate.input_scale.detach()) == pytest.approx(3 * usual, rel=5e-3)


def test_a_ramp_of_another_degree_fits_too(teachers, activations):
    rsae = upgrade(teachers["relu"], activations, degree=(8, 8))
    assert rsae.gate.degree == (8, 8)
    stage = rsae.metadata["stage1"]
    assert 0.999 < stage["lower_bound"] / stage["error"] <= 1
    # What the code can be wrong by is what the gate can be: the certificate holds for codes too.
    assert stage["relative_error"] <= stage["error"] * 1.01


def test_a_ramp_too_coarse_for_the_tolerance_is_refused(teachers, activations):
    with pytest.raises(NumericsError, match="raise tolerance or the degree"):
        upgrade(teachers["relu"], activations, degree=(2, 2))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_slope_lies_below_the_threshold(teachers, activations, name):
    """Pre-activations just below theta are taught by the gate, those above it by their amplitude alone."""
    gate = upgrade(teachers[name], activations, degree=(9, 8)).gate
    offset = gate.input_scale.detach() * torch.tensor([-1.1, -0.5, 0.3, 2.0])
    h = (gate.threshold.detach() + 1.0 + offset[:, None]).requires_grad_()
    with torch.no_grad():
        gate.threshold.add_(1.0)
    z = gate(h)
    assert (z[:2] == 0).all()
    (slope,) = torch.autograd.grad(z.sum(), h)
    assert slope[0].abs().max() < 0.02
    assert (slope[1] > 1).all()
    assert torch.allclose(slope[2:], torch.ones(2, gate.d_sae), atol=0.02)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"form": "soft"}, ConfigError, "form"),
        ({"degree": "3"}, ConfigError, "degree"),
        ({"degree": "three,2"}, ConfigError, "degree"),
        ({"coefficients": "many"}, ConfigError, "coefficients"),
    ],
)
def test_bad_settings_are_named(activations, options, error, message):
    with pytest.raises(error, match=message):
        upgrade(ReluSAE(16, 64), activations, **options)


def test_bad_activations_are_named(activations):
    teacher = ReluSAE(16, 64)
    with pytest.raises(ShapeError, match="d_in=16"):
        upgrade(teacher, activations[:, :8])
    with pytest.raises(ShapeError, match="no activations"):
        upgrade(teacher, activations[:0])
    with pytest.raises(NumericsError, match="16 NaN or infinite values"):
        upgrade(teacher, torch.cat([activations[:5], torch.full((1, 16), float("inf"))]))
    with pytest.raises(ConfigError, match="cannot be upgraded"):
        upgrade(FusedRationalSAE(16, 64), activations)


class TestThresholdsByToken:
    """TopK exactly: tau between the k-th and (k+1)-th pre-activation of each token."""

    @pytest.fixture
    def rsae(self, teachers, activations):
        return upgrade(teachers["topk"], activations, thresholds="token")

    def test_it_is_the_teachers_code(self, rsae, teachers, activations):
        with torch.no_grad():
            code, expected = rsae.encode(activations), teachers["topk"].encode(activations)
        assert isinstance(rsae, TopKRationalSAE)
        assert torch.equal(code != 0, expected != 0)
        assert (code - expected).norm() < 0.0085 * expected.norm()
        # Thresholds by feature cannot do that.
        fixed = upgrade(teachers["topk"], activations).encode(activations)
        assert not torch.equal(fixed != 0, expected != 0)

    def test_the_gradient_is_that_of_the_reference_with_thresholds_supplied(self, rsae, activations):
        x = activations[:40].double()
        rsae = rsae.double()
        h = rsae.hidden_pre(x).detach().requires_grad_()
        tau = rsae.token_thresholds(h.detach())
        ranked = h.detach().sort(1, descending=True).values
        assert torch.equal(tau[:, 0], ((ranked[:, 5] + ranked[:, 6]) / 2).clamp_min(0))
        upstream = torch.randn(40, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        gate = rsae.gate.tensors()._replace(threshold=tau)
        (expected,) = torch.autograd.grad((rational_gate(h, gate, rsae.gate.spec())[0] * upstream).sum(), h)
        (rsae.encode(x) * upstream).sum().backward()
        torch.testing.assert_close(rsae.b_enc.grad, expected.sum(0))
        assert float(rsae.b_enc.grad.norm()) > 0

    def test_it_trains_saves_and_loads(self, rsae, activations, tmp_path):
        before = reconstruction(rsae, activations).mse
        log = train(rsae, activations, steps=60, batch_size=128, progress=False)
        after = reconstruction(rsae, activations)
        assert log.recipe == "topk"
        assert after.mse < before
        assert after.l0 <= 6
        loaded = TopKRationalSAE.from_pretrained(rsae.save_pretrained(tmp_path / "token"))
        assert torch.equal(loaded(activations), rsae(activations))
        assert load_sae(tmp_path / "token").k == 6
        card = (tmp_path / "token" / "README.md").read_text()
        assert "from rsae_triton import TopKRationalSAE" in card
        assert "by token, 6 features each" in card
        assert "SAELens" not in card

    def test_k_of_every_feature_is_a_relu(self, rsae, activations):
        every = TopKRationalSAE(16, 64, k=64, gate=rsae.gate)
        every.load_state_dict(rsae.state_dict())
        assert torch.equal(every.encode(activations) != 0, every.hidden_pre(activations) > 0)

    def test_what_needs_thresholds_by_feature_says_so(self, rsae, teachers, activations):
        for call in (rsae.autoencode, rsae.encode_sparse, rsae.to_jumprelu):
            with pytest.raises(ConfigError, match="thresholds"):
                call(activations)
        with pytest.raises(ConfigError, match="a scale per feature"):
            rsae._scale_nonlinearity_(torch.arange(1.0, 65.0))
        with pytest.raises(ConfigError, match="TopK teacher"):
            upgrade(teachers["relu"], activations, thresholds="token")
        with pytest.raises(ConfigError, match="thresholds is"):
            upgrade(teachers["topk"], activations, thresholds="none")
        with pytest.raises(ConfigError, match="k is"):
            TopKRationalSAE(16, 64, k=65, gate=rsae.gate)
        with pytest.raises(ConfigError, match="trainable thresholds"):
            train(rsae, activations, steps=1, recipe="hard", batch_size=128, progress=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_rounds_lower_the_error_at_the_teachers_l0_and_nothing_is_trained(teachers, activations, name):
    teacher = teachers[name]
    rsae, one = upgrade(teacher, activations), upgrade(teacher, activations, rounds=1)
    ours, theirs = reconstruction(rsae, activations), reconstruction(teacher, activations)
    assert rsae.rounds == 2
    assert ours.mse < 0.9 * theirs.mse
    assert ours.l0 == pytest.approx(theirs.l0, rel=0.01)
    stage = rsae.metadata["stage1"]
    assert stage["summary"].startswith(f"nothing trained: mse -{100 * (1 - ours.mse / theirs.mse):.1f} % at the")
    assert stage["rounds"]["mse_before"] == pytest.approx(theirs.mse, rel=1e-3)
    # Beside the rounds it is the SAE that one round makes: numbers of stage 1, weights, gate.
    assert {k: v for k, v in one.metadata["stage1"].items() if k not in ("rounds", "summary")} == {
        k: v for k, v in stage.items() if k not in ("rounds", "summary")
    }
    own = rsae.state_dict()
    assert all(torch.equal(tensor, own[key]) for key, tensor in one.state_dict().items())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("n", [1, 200])
def test_too_few_tokens_are_warned_of_and_claim_no_percentage(teachers, activations, name, n):
    with pytest.warns(UserWarning, match=f"only {n} token.* to calibrate on: too few"):
        rsae = upgrade(teachers[name], activations[:n])
    said = rsae.metadata["stage1"]["summary"]
    assert "mse" not in said
    assert "too few to say what l0 and the error will be" in said
    with pytest.warns(UserWarning, match="too few"):
        said = teachers[name].with_rounds(2, activations[:n]).metadata["rounds"]["summary"]
    assert "%" not in said


def test_rounds_are_set_on_validation_text_where_there_is_any(teachers, activations):
    held = activations[1::2] * 1.02
    rsae = upgrade(teachers["jumprelu"], activations[0::2], rounds=3, validation=held)
    wanted = reconstruction(teachers["jumprelu"], held).l0
    assert reconstruction(rsae, held).l0 == pytest.approx(wanted, rel=0.01)
    one = upgrade(teachers["jumprelu"], activations[0::2], rounds=1, validation=held)
    assert one.metadata["stage1"]["validation_l0"] == pytest.approx(wanted, rel=1e-5)


def test_direct_gates_and_thresholds_by_token_get_no_rounds(teachers, activations):
    assert upgrade(teachers["relu"], activations, form="direct").rounds == 1
    assert upgrade(teachers["topk"], activations, thresholds="token").rounds == 1
    for options in ({"form": "direct"}, {"thresholds": "token"}):
        with pytest.raises(ConfigError, match="rounds"):
            upgrade(teachers["topk"], activations, rounds=2, **options)
    for bad in ("two", 0, 1.5, "-1", 100):
        with pytest.raises(ConfigError, match="rounds is"):
            upgrade(teachers["topk"], activations, rounds=bad)
