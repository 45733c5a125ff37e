"""The training loop: it learns, holds l0, is deterministic, keeps decoder norms, and stops on bad numbers."""

import copy
from dataclasses import replace

import pytest
import torch
from workers import small_sae

from rsae_triton import train, upgrade
from rsae_triton.common.errors import ConfigError, NumericsError, ShapeError
from rsae_triton.teachers import JumpReluSAE, ReluSAE, TopKSAE
from rsae_triton.training.recipes import (
    RECIPES,
    Recipe,
    SparsityController,
    auxiliary_loss,
    holding,
    losses,
    recipe_for,
)

QUIET = {"progress": False, "batch_size": 128, "log_every": 5}


def teacher(kind=ReluSAE, **options):
    return kind(16, 64, generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize(
    ("sae", "recipe"),
    [
        (teacher(), Recipe("relu", "l1", weight=0.08)),
        (teacher(JumpReluSAE, threshold=0.1, bandwidth=0.3), Recipe("jumprelu", "l0", weight=0.005)),
        (teacher(TopKSAE, k=6), RECIPES["topk"]),
    ],
)
def test_every_family_learns(activations, sae, recipe):
    sae = copy.deepcopy(sae)
    log = train(sae, activations, steps=150, recipe=recipe, lr=3e-3, **QUIET)
    assert log.mse[-1] < 0.5 * log.mse[0]
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-5)


def test_the_same_seed_gives_the_same_bits(activations):
    runs = []
    for seed in (0, 0, 1):
        sae = teacher()
        train(sae, activations, steps=20, seed=seed, **QUIET)
        runs.append(sae.W_enc.detach().clone())
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_l0_is_held_at_the_target(activations):
    sae = teacher()
    train(sae, activations, steps=200, recipe=Recipe("relu", "l1", weight=0.08), lr=3e-3, **QUIET)
    rsae = upgrade(sae, activations)
    target = 0.8 * rsae.metadata["stage1"]["teacher_l0"]
    log = train(rsae, activations, steps=600, target_l0=target, lr=1e-3, **QUIET)
    assert sum(log.l0[-10:]) / 10 == pytest.approx(target, rel=0.1)
    assert len(set(log.weight)) > 10


def test_training_holds_the_l0_of_stage_1_by_default(activations):
    sae = teacher()
    train(sae, activations, steps=100, recipe=Recipe("relu", "l1", weight=0.08), lr=3e-3, **QUIET)
    rsae = upgrade(sae, activations)
    noted = rsae.metadata["stage1"]["train_l0"]
    assert noted == pytest.approx(1.04 * rsae.metadata["stage1"]["teacher_l0"])
    recipe = RECIPES["hard"]
    assert holding(recipe, rsae, "auto").target_l0 == noted
    assert holding(replace(recipe, target_l0=3.0), rsae, "auto").target_l0 == 3.0  # the recipe's own
    assert holding(recipe, sae, "auto").target_l0 is None  # no stage 1
    logs = [
        train(copy.deepcopy(rsae), activations, steps=30, **options, **QUIET) for options in ({}, {"target_l0": None})
    ]
    assert [len(set(log.weight)) > 1 for log in logs] == [True, False]


def test_decoder_norms_stay_what_they_were(activations):
    sae = teacher()
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, 64)[:, None])
    before = sae.W_dec.norm(dim=1).detach().clone()
    train(sae, activations, steps=20, **QUIET)
    assert torch.allclose(sae.W_dec.norm(dim=1), before, rtol=1e-5)


def test_rational_parameters_are_trained_and_thresholds_stay_feasible(activations):
    sae = teacher()
    train(sae, activations, steps=100, recipe=Recipe("relu", "l1", weight=0.08), lr=3e-3, **QUIET)
    rsae = upgrade(sae, activations)
    before = {name: one.detach().clone() for name, one in rsae.gate.named_parameters()}
    # output_scale is of the direct form only.
    for recipe, trained in (("hard", {"threshold"}), ("hard-trained", set(before) - {"output_scale"})):
        sae = copy.deepcopy(rsae)
        train(sae, activations, steps=30, recipe=recipe, **QUIET)
        changed = {name for name, one in sae.gate.named_parameters() if not torch.equal(one, before[name])}
        assert changed == trained
        assert float(sae.gate.threshold.detach().min()) >= 0


def test_frozen_parameters_stay_and_thaw(activations):
    rsae = upgrade(teacher(), activations)
    recipe = Recipe("own", "l0", weight=0.005, frozen=("alpha", "beta"))
    alpha = rsae.gate.alpha.detach().clone()
    train(rsae, activations, steps=5, recipe=recipe, **QUIET)
    assert torch.equal(rsae.gate.alpha, alpha)
    assert rsae.gate.alpha.requires_grad


def test_the_paper_recipe_trains_the_dense_code(activations):
    rsae = upgrade(teacher(), activations, form="direct")
    soft = losses(rsae, activations[:64], RECIPES["paper"], 1.0)
    z = rsae.encode(activations[:64], hard=False)
    expected = (activations[:64] - rsae.decode(z)).square().sum(-1).mean() + z.abs().sum(-1).mean()
    assert float(soft.total) == pytest.approx(float(expected), rel=1e-4)


def test_the_auxiliary_loss_reaches_the_encoder_of_dead_features_only():
    sae = teacher(TopKSAE, k=4)
    x = torch.randn(32, 16)
    dead = torch.zeros(64, dtype=torch.bool)
    dead[:10] = True
    auxiliary_loss(sae, x, torch.randn(32, 16), dead, k=5).backward()
    assert sae.W_enc.grad[:, :10].abs().sum() > 0
    assert sae.W_enc.grad[:, 10:].abs().sum() == 0


def test_bad_activations_stop_the_run_and_keep_the_last_good_weights(activations):
    sae = teacher()
    bad = activations.clone()
    bad[::7] = float("nan")
    with pytest.raises(NumericsError, match=r"step 0.*NaN or infinite activations"):
        train(sae, bad, steps=10, **QUIET)
    assert all(bool(torch.isfinite(one).all()) for one in sae.parameters())


def test_teacher_gradient_equals_plain_autograd():
    """`hidden_pre` skips the dx GEMM; its gradients are those of the formula."""
    sae, x = teacher().double(), torch.randn(9, 16).double()
    sae.hidden_pre(x).square().sum().backward()
    ours = [one.grad.clone() for one in (sae.W_enc, sae.b_enc, sae.b_dec)]
    sae.zero_grad()
    ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).square().sum().backward()
    for one, plain in zip(ours, (sae.W_enc, sae.b_enc, sae.b_dec), strict=True):
        assert torch.allclose(one, plain.grad)


def test_controller_brings_a_slow_process_to_its_target():
    controller = SparsityController(Recipe("own", "l0", weight=1.0, target_l0=20.0))
    l0, seen = 40.0, []
    for _ in range(600):
        # As thresholds do: l0 falls in proportion to the weight, and creeps up by itself.
        l0 *= 1 - 0.01 * controller.update(l0) + 0.004
        seen.append(l0)
    assert seen[-1] == pytest.approx(20, rel=0.05)


def test_controller_lowers_l0_slowly_in_the_warm_up_from_a_weight_that_is_far_too_low():
    controller = SparsityController(Recipe("own", "l0", weight=0.02, target_l0=5.0))
    l0, seen = 100.0, []
    for step in range(400):
        warm = min(1.0, step / 200)
        l0 += 0.1 * (100 / (1 + 20 * warm * controller.update(l0, warm)) - l0)  # at the first weight: 71
        seen.append(l0)
    assert seen[100] == pytest.approx(500**0.5, rel=0.5)
    assert seen[200] < 8  # at its end the warm-up has done its work
    assert seen[-1] == pytest.approx(5, rel=0.2)
    assert max(a / b for a, b in zip(seen, seen[10:], strict=False)) < 2  # it never collapses

    copy = SparsityController(Recipe("own", "l0", weight=0.02, target_l0=5.0))
    copy.restore(controller.state())
    assert copy.update(7.0, 0.5) == controller.update(7.0, 0.5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: train(teacher(), x[:, :15], steps=1), ShapeError, "d_in=15"),
        (lambda x: train(teacher(), x[:10], steps=1), ShapeError, "fewer than one batch"),
        (lambda x: train(teacher(), x, steps=-1), ConfigError, "steps"),
        (lambda x: train(teacher(), x, steps=1, lr=0), ConfigError, "lr"),
        (lambda x: train(teacher(), x, steps=1, recipe="best"), ConfigError, "choose one of"),
        (lambda x: train(teacher(), x, steps=1, recipe="hard"), ConfigError, "thresholds"),
        (lambda x: train(teacher(), x, steps=1, recipe="paper"), ConfigError, "has none"),
        (lambda x: Recipe("own", "l2"), ConfigError, "sparsity"),
        (lambda x: Recipe("own", weight=-1), ConfigError, "weight"),
        (lambda x: recipe_for(teacher(TopKSAE, k=3), "hard"), ConfigError, "thresholds"),
        (lambda x: train(teacher(), x, steps=1, target_l0=-3.0), ConfigError, "target_l0"),
    ],
)
def test_bad_settings_are_named(activations, call, error, message):
    with pytest.raises(error, match=message):
        call(activations)


@pytest.mark.parametrize(
    ("metadata", "factor"),
    [
        ({"objective": {"family": "jumprelu", "weight": 0.002, "k": 32}}, 2.0),
        ({"objective": {"family": "relu", "weight": None, "k": 32}}, 1.0),
        ({"objective": {"family": "topk", "weight": None, "k": 64}}, 0.5),
        ({"objective": {"family": "other", "weight": 3.0}}, 1.0),
        ({"stage1": {"teacher_l0": 100.0}}, 0.125),
        ({"stage1": {"teacher_l0": float("nan")}}, 1.0),
        ({"objective": "text", "stage1": "text"}, 1.0),
        ({}, 1.0),
    ],
)
def test_the_weight_starts_where_the_teacher_values_a_feature(metadata, factor):
    sae = small_sae("gated")
    sae.metadata = metadata
    assert recipe_for(sae).weight == pytest.approx(RECIPES["hard"].weight * factor)
    assert recipe_for(sae, "paper") == RECIPES["paper"]
