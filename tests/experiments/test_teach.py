"""Teachers trained here: every family and penalty, the plan that identifies them, and BatchTopK's two modes."""

import copy
from dataclasses import replace
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch

from rsae_triton import train, upgrade
from rsae_triton.common.errors import ConfigError
from rsae_triton.evaluation import reconstruction
from rsae_triton.experiments.teach import FAMILIES, TeacherPlan, make_teacher, objective_of, train_teacher
from rsae_triton.sae.transcoder import JumpReluTranscoder
from rsae_triton.teachers import BatchTopKSAE, JumpReluSAE, ReluSAE, TopKSAE, load_teacher
from rsae_triton.training.recipes import RECIPES, USUAL_L0, recipe_for

QUIET = {"progress": False, "batch_size": 128}


class Splits:
    """The part of the real splits that training a teacher reads; for pairs, 8 numbers that are read and 8 to write."""

    def __init__(self, pairs=False):
        d_in = 8 if pairs else 16
        self.train = SimpleNamespace(manifest={"key": "k"}, scale=1.0, mean=torch.zeros(d_in), d_in=d_in)
        if pairs:
            self.train.d_out, self.train.scales = 8, (1.0, 1.0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RSAE_CACHE", str(tmp_path))


def trained(k=6, steps=200):
    from synthetic import sparse_activations

    sae = BatchTopKSAE(16, 64, k=k, generator=torch.Generator().manual_seed(0))
    train(sae, sparse_activations(), steps=steps, lr=3e-3, **QUIET)
    return sae


def test_batch_topk_keeps_k_on_average_while_training(activations):
    sae = BatchTopKSAE(16, 64, k=5, generator=torch.Generator().manual_seed(0))
    assert not sae.training
    sae.train()
    z = sae.encode(activations[:100])
    assert int((z != 0).sum()) == 500
    kept, left = z[z != 0], sae.hidden_pre(activations[:100]).relu()[z == 0]
    assert kept.min() > left.max()
    # Some tokens have more than k, some fewer: that is the point of it.
    assert (z != 0).sum(1).unique().numel() > 3


def test_batch_topk_at_inference_does_not_depend_on_the_batch(activations):
    sae = trained()
    assert not sae.training, "training hands the SAE back as it found it"
    whole = sae.encode(activations)
    assert torch.allclose(whole[:7], sae.encode(activations[:7]), atol=1e-5)
    assert reconstruction(sae, activations).l0 == pytest.approx(6, rel=0.15)
    assert sae.encode(activations[:0]).shape == (0, 64)


def test_batch_topk_is_saved_and_upgraded(activations, tmp_path):
    sae = trained()
    loaded = load_teacher(sae.save_pretrained(tmp_path / "sae"))
    assert isinstance(loaded, JumpReluSAE)
    assert torch.equal(loaded.encode(activations), sae.encode(activations))
    again = BatchTopKSAE.from_pretrained(tmp_path / "sae")
    assert again.k == 6
    assert torch.equal(again.encode(activations), sae.encode(activations))
    rsae = upgrade(sae, activations, rounds=1)
    assert torch.all(rsae.gate.threshold == sae.topk_threshold)
    assert reconstruction(rsae, activations).l0 == reconstruction(sae, activations).l0


@pytest.mark.parametrize("k", [0, 65, 2.5, True])
def test_batch_topk_refuses_a_bad_k(k):
    with pytest.raises(ConfigError, match="k is"):
        BatchTopKSAE(16, 64, k=k)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_control_goes_on_with_its_teachers_objective(family, activations, tmp_path):
    weight = None if "topk" in family else 0.03
    plan = TeacherPlan(family, 64, k=5, weight=weight, steps=3, batch_size=64)
    splits = Splits(pairs=plan.transcodes)
    teacher, log = make_teacher(plan, splits, activations)
    again, log_again = make_teacher(plan, splits, activations)
    assert torch.equal(teacher.W_enc, again.W_enc)
    assert log == log_again
    kind = type(teacher)
    recipe = objective_of(kind.from_pretrained(again.save_pretrained(tmp_path / "saved")))
    assert recipe.name == plan.nonlinearity
    assert recipe.weight == (weight or 0.0)
    # Another plan is another teacher.
    other, _ = make_teacher(TeacherPlan(family, 64, k=5, weight=weight, steps=4, batch_size=64), splits, activations)
    assert not torch.equal(other.W_enc, teacher.W_enc)


def test_a_jumprelu_learns_its_thresholds_under_the_tanh_penalty(activations):
    sae = JumpReluSAE(16, 64, threshold=0.1, bandwidth=0.3, generator=torch.Generator().manual_seed(0))
    before = reconstruction(sae, activations).l0
    recipe = TeacherPlan("jumprelu", 64, penalty="tanh", weight=0.005).recipe()
    assert recipe == RECIPES["jumprelu-tanh"].__class__(**{**vars(RECIPES["jumprelu-tanh"]), "weight": 0.005})
    train(sae, activations, steps=200, recipe=recipe, lr=3e-3, **QUIET)
    assert reconstruction(sae, activations).l0 < 0.7 * before
    assert (sae.threshold - 0.1).abs().max() > 0.05


def test_bad_plans_are_named():
    with pytest.raises(ConfigError, match="gelu"):
        TeacherPlan("gelu", 64)
    with pytest.raises(ConfigError, match="penalty"):
        TeacherPlan("relu", 64, penalty="tanh")


def test_an_sae_of_unknown_training_gets_its_familys_objective():
    sae = JumpReluSAE(16, 64)
    assert objective_of(sae) == recipe_for(sae)


def test_an_sae_that_was_made_of_another_familys_teacher_does_not_take_its_weight(activations):
    """The weight of a ReLU's l1 penalty is a hundred times that of an l0 penalty."""
    relu = ReluSAE(16, 64, generator=torch.Generator().manual_seed(0))
    relu.metadata["objective"] = {"family": "relu", "weight": 0.08}
    assert recipe_for(relu).weight == objective_of(relu).weight == 0.08
    dense, _ = upgrade(relu, activations, rounds=1).to_jumprelu(activations)
    assert dense.metadata["objective"]["family"] == "relu"
    assert recipe_for(dense) == objective_of(dense) == RECIPES["jumprelu"]
    transcoder = JumpReluTranscoder(16, 64, d_out=16)
    transcoder.metadata["objective"] = {"family": "transcoder", "weight": 0.004}
    assert recipe_for(transcoder).weight == objective_of(transcoder).weight == 0.004


def test_rsae_teach_saves_an_sae_of_the_models_own_units(tmp_path, monkeypatch, capsys, activations):
    """The store's activations are the model's times its scale; what is saved reads the model's."""
    from rsae_triton.commands.cli import main
    from rsae_triton.experiments import teach as module

    class Store:
        scale, d_in, mean = 0.25, 16, torch.zeros(16)
        manifest = {"key": "k", "hook_name": "blocks.1.hook_resid_pre"}  # noqa: RUF012

        def tensor(self):
            return activations

    class Found:
        train = validation = Store()

    class Host:
        device, name = torch.device("cpu"), "synthetic"

    monkeypatch.setattr(module, "load_host", lambda *_, **__: Host())
    monkeypatch.setattr(module, "load_corpus", lambda *_: [])
    monkeypatch.setattr(module, "splits_for", lambda *_: Found())
    out = tmp_path / "teacher"
    assert main(["teach", "topk", "--k", "5", "--d-sae", "64", "--steps", "60", "--out", str(out)]) == 0
    assert "alive" in capsys.readouterr().out
    saved = load_teacher(out)
    assert saved.metadata["hook_name"] == "blocks.1.hook_resid_pre"
    cached, _ = make_teacher(TeacherPlan("topk", 64, k=5, steps=60), Found(), activations)
    torch.testing.assert_close(saved(activations / 0.25), cached(activations) / 0.25)
    assert main(["teach", "topk", "--steps", "0", "--out", str(out)]) == 2
    assert "--steps is 0" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["relu", "jumprelu"])
def test_a_teacher_holds_l0_and_revives_features(family, activations):
    """From a start at which a third of the features is dead; without the auxiliary loss some never come to life."""
    plan = TeacherPlan(family, 32, seed=2, l0=5.0)
    assert plan.recipe().aux_k == 32
    found = []
    for recipe in (plan.recipe(), replace(plan.recipe(), aux_k=0)):
        teacher = plan.untrained(16)
        with torch.no_grad():
            teacher.b_enc[:12] = -4.0
        options = {"lr": 1e-3, "sparsity_warmup": 320, "dead_after": 2000, **QUIET}
        train(teacher, activations, steps=800, recipe=recipe, **options)
        found.append(reconstruction(teacher, activations))
    assert found[0].alive_fraction == 1 > 0.95 > found[1].alive_fraction
    assert found[0].l0 == pytest.approx(5, rel=0.15)
    assert found[0].mse < 1.02 * found[1].mse


@pytest.mark.parametrize(("family", "power"), [("jumprelu", 2), ("relu", 1)])
def test_a_held_l0_is_steered_from_the_first_step_and_the_weight_is_noted(family, power, activations):
    """A warm-up of a weight that is far too low changed nothing: the code was dense until its end, then collapsed."""
    plan = TeacherPlan(family, 32, weight=1e-3, steps=100, batch_size=128, l0=1.0)
    teacher, log = train_teacher(plan, activations, activations.mean(0), progress=False)
    risen = [weight / (step / 40) for step, weight in zip(log.step, log.weight, strict=True) if 0 < step <= 40]
    norm = float(activations.norm(dim=1).mean())
    assert risen[-1] > 2 * 1e-3 * norm**power
    # The control goes on with the weight at which its teacher settled, not with the one where it started.
    objective = objective_of(teacher)
    last = log.weight[-len(log.weight) // 4 :]
    assert min(last) <= objective.weight * norm**power * 1.001
    assert objective.weight * norm**power <= max(last) * 1.001
    assert objective.target_l0 == 1.0
    fixed, log = train_teacher(replace(plan, l0=None), activations, activations.mean(0), progress=False)
    assert max(log.weight) == pytest.approx(1e-3 * norm**power, rel=0.05)
    assert objective_of(fixed).weight == 1e-3


def test_plans_that_hold_l0_are_plans_of_their_own():
    assert "l0" not in TeacherPlan("relu", 64).identity()  # teachers that were cached before keep their names
    assert TeacherPlan("relu", 64, l0=6.0).identity()["l0"] == 6.0
    assert TeacherPlan("relu", 64).recipe() == RECIPES["relu"]
    assert TeacherPlan("topk", 64, l0=6.0).recipe() == RECIPES["topk"]
    with pytest.raises(ConfigError, match="at most 64"):
        TeacherPlan("relu", 64, l0=65.0)


def test_on_activations_that_vary_little_around_a_large_mean_features_survive(activations):
    """As on Gemma 3 270M: the usual starting weight is some hundred times too large, and most features died of it."""
    mean = torch.randn(16, generator=torch.Generator().manual_seed(3))
    x = 4 * mean / mean.norm() + 0.02 * (activations - activations.mean(0))
    teacher, _ = train_teacher(TeacherPlan("topk", 64, k=6, steps=250, batch_size=128), x, x.mean(0), progress=False)
    rsae = upgrade(teacher, x, rounds=1)
    worth = rsae.metadata["stage1"]["worth"]
    recipe = recipe_for(rsae)
    assert recipe.weight == worth < RECIPES["hard"].weight / 100
    target, ends = rsae.metadata["stage1"]["train_l0"], {}
    for weight in (RECIPES["hard"].weight, recipe.weight):
        sae = copy.deepcopy(rsae)
        log = train(sae, x, steps=120, recipe=replace(recipe, weight=weight), log_every=1, **QUIET)
        ends[weight] = (fmean(log.l0[-10:]) / target, min(log.l0) / target)
    assert ends[recipe.weight][0] == pytest.approx(1, abs=0.2)
    assert ends[recipe.weight][1] > 0.5
    assert ends[RECIPES["hard"].weight][1] < 0.1


def test_where_the_worth_is_near_the_usual_weight_the_usual_one_is_taken(activations):
    rsae = upgrade(TopKSAE(16, 64, k=6), activations, rounds=1)
    usual = RECIPES["hard"].weight * (USUAL_L0 / rsae.metadata["stage1"]["teacher_l0"]) ** 1.5
    for factor, wanted in ((1, usual), (0.4, usual), (2.5, usual), (0.2, 0.2 * usual), (5, 5 * usual)):
        rsae.metadata["stage1"]["worth"] = factor * usual
        assert recipe_for(rsae).weight == pytest.approx(wanted)
    for unknown in (None, "much", 0.0, -1.0, float("nan")):
        rsae.metadata["stage1"]["worth"] = unknown
        assert recipe_for(rsae).weight == usual


def test_the_worth_of_a_feature_is_what_leaving_out_the_weaker_half_costs():
    """Two orthonormal features of amplitudes 3 and 1: without the weaker, the error rises by 1 a token."""
    sae = ReluSAE(2, 2)
    with torch.no_grad():
        for weights in (sae.W_enc, sae.W_dec):
            weights.copy_(torch.eye(2))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    x = torch.tensor([[3.0, 1.0]]).repeat(300, 1)
    for factor in (1.0, 1e-3, 1e3):  # the weight is in units of the activations' squared norm
        assert upgrade(sae, factor * x, rounds=1).metadata["stage1"]["worth"] == pytest.approx(0.1, rel=1e-4)


def test_a_teacher_that_was_trained_here_is_trained_on_at_its_own_weight():
    for family, penalty in (("relu", "l0"), ("jumprelu", "l0"), ("jumprelu", "tanh"), ("topk", "l0")):
        plan = TeacherPlan(family, 64, weight=0.02, penalty=penalty)
        sae = plan.untrained(16)
        sae.metadata["objective"] = plan.identity()
        assert recipe_for(sae) == plan.recipe()
    assert recipe_for(JumpReluSAE(16, 64, metadata={"objective": "mine"})) == RECIPES["jumprelu"]
