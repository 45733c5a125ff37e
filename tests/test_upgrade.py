"""Stage 1 for all three families, both forms: weights copied bit for bit, the code reproduced."""

import pytest
import torch

from rsae_triton import FusedRationalSAE, train, upgrade
from rsae_triton.errors import ConfigError, NumericsError, ShapeError
from rsae_triton.evaluate import reconstruction
from rsae_triton.recipes import RECIPES, Recipe
from rsae_triton.teachers import JumpReluSAE, ReluSAE, TopKSAE

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
    rsae = upgrade(teacher, activations)
    ours, theirs = reconstruction(rsae, activations), reconstruction(teacher, activations)
    assert ours.mse == pytest.approx(theirs.mse, rel=0.01)
    assert ours.l0 == pytest.approx(theirs.l0, rel=1e-6)
    assert rsae.metadata["stage1"]["relative_error"] <= 0.0058  # the (3, 2) ramp's own error


def test_topk_thresholds_fire_as_often_as_the_teacher(teachers, activations):
    teacher = teachers["topk"]
    rsae = upgrade(teacher, activations, n_tokens=len(activations))
    fires = (teacher.encode(activations) != 0).sum(0)
    assert (((rsae.encode(activations) != 0).sum(0) - fires).abs() <= 1).all()


@pytest.mark.parametrize("name", ["relu", "jumprelu"])
def test_direct_code_is_calibrated_to_the_real_density(teachers, activations, name):
    """Least squares on the histogram beats the minimax start, and degree="auto" climbs until it is good enough."""
    rsae = upgrade(teachers[name], activations, form="direct", tolerance=0.01)
    stage = rsae.metadata["stage1"]
    assert stage["relative_error"] < stage["initial_relative_error"]
    assert stage["l0"] == pytest.approx(stage["teacher_l0"], rel=0.02)
    assert stage["lower_bound"] / stage["error"] > 0.999
    # The jump's margin holds some of the mass here; the best (9,8) leaves 1.4 %.
    assert stage["relative_error"] <= (0.01 if name == "relu" else 0.02)


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


def test_the_gate_is_the_smallest_ramp_that_is_close_enough(teachers, activations):
    degrees = [upgrade(teachers["relu"], activations, tolerance=tol).gate.degree for tol in (0.05, 0.0085, 0.001)]
    assert degrees == [(3, 2), (5, 4), (7, 6)]


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
        ({"coefficients": 7}, ConfigError, "groups=7"),
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
    with pytest.raises(NumericsError, match="1 of"):
        upgrade(teacher, torch.cat([activations[:5], torch.full((1, 16), float("inf"))]))
    with pytest.raises(ConfigError, match="cannot be upgraded"):
        upgrade(FusedRationalSAE(16, 64), activations)
