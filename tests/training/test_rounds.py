"""Training with rounds: one trained and the others added afterwards, or through all of them; l0 set on unseen text."""

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch

from rsae_triton import FusedRationalSAE, upgrade
from rsae_triton.common.errors import ConfigError, NumericsError
from rsae_triton.evaluation import reconstruction
from rsae_triton.ops.cost import CEILINGS, Step, cost
from rsae_triton.sae.architectures import JumpReluSAE
from rsae_triton.training.distributed import feature_axes
from rsae_triton.training.loop import train
from rsae_triton.training.memory import plan_memory
from rsae_triton.training.recipes import recipe_for

OPTIONS = {"steps": 30, "batch_size": 128, "progress": False}


@pytest.fixture(scope="module")
def two():
    from synthetic import sparse_activations

    activations = sparse_activations()
    teacher = JumpReluSAE(16, 64, threshold=0.9, generator=torch.Generator().manual_seed(0))
    train(teacher, activations, steps=100, lr=3e-3, batch_size=128, progress=False)
    return upgrade(teacher, activations)


def test_rounds_are_left_aside_and_put_back(two, activations):
    sae, one = copy.deepcopy(two), copy.deepcopy(two)
    one.refinement = None
    logs = [train(given, activations, **OPTIONS) for given in (sae, one)]  # rounds="after" is the default
    assert logs[0].mse == logs[1].mse
    assert all(torch.equal(tensor, sae.state_dict()[name]) for name, tensor in one.state_dict().items())
    assert sae.rounds == 2
    score, plain = reconstruction(sae, activations), reconstruction(one, activations)
    assert score.mse < 0.9 * plain.mse
    assert score.l0 == pytest.approx(two.metadata["rounds"]["target_l0"], rel=0.01)
    assert sae.metadata["rounds"]["mse_before"] == pytest.approx(plain.mse, rel=0.01)


def test_training_through_rounds_lowers_the_error_and_moves_all_of_their_numbers(two, activations):
    sae = copy.deepcopy(two)
    log = train(sae, activations, steps=150, batch_size=128, progress=False, target_l0=6.0, lr=2e-3, rounds="through")
    assert sum(log.mse[-5:]) < 0.9 * sum(log.mse[:5])
    before = two.state_dict()
    moved = {name for name, one in sae.state_dict().items() if not torch.equal(one, before[name])}
    numbers = {"a", "b", "eta", "threshold", "p"}
    assert {f"refinement.{name}" for name in numbers} | {"gate.threshold", "W_enc", "W_dec", "b_enc", "b_dec"} == moved
    assert bool((sae.refinement.threshold >= 0).all())
    scale = recipe_for(two).lr_scale
    assert scale["refinement.eta"] == 5
    assert scale["threshold"] == 15


def test_training_moves_away_from_extreme_starts_that_were_searched_and_from_no_others(two, activations):
    """A search without training ends at the edge for ReLU teachers, where training through rounds ends worse."""
    searched, by_hand = copy.deepcopy(two), copy.deepcopy(two)
    facts = {"a": 0.1, "b": 1.0, "eta": 0.7}
    for sae in (searched, by_hand):
        sae.metadata["rounds"] = sae.metadata["rounds"] | facts
        with torch.no_grad():
            for name, value in facts.items():
                getattr(sae.refinement, name).fill_(value)
    with torch.no_grad():
        by_hand.refinement.a[:, 0] = by_hand.refinement.b[:, 0] = 0.2
    for sae, a, b in ((searched, 0.3, 0.7), (by_hand, 0.1, 1.0)):
        train(sae, activations, steps=1, lr=1e-9, batch_size=128, progress=False, rounds="through")
        assert sae.refinement.a[:, 1:].mean().item() == pytest.approx(a)
        assert sae.refinement.b[:, 1:].mean().item() == pytest.approx(b)


def test_rounds_that_were_trained_or_set_by_hand_are_not_searched_again(two, activations):
    by_hand, trained = copy.deepcopy(two), copy.deepcopy(two)
    with torch.no_grad():
        by_hand.refinement.eta.fill_(0.5)
    train(trained, activations, rounds="through", **OPTIONS)
    for sae in (by_hand, trained):
        before = copy.deepcopy(sae.state_dict())
        with pytest.raises(ConfigError, match="trained or set by hand"):
            train(sae, activations, **OPTIONS)
        assert all(torch.equal(one, before[name]) for name, one in sae.state_dict().items())
    train(trained, activations, rounds="through", **OPTIONS)


def test_training_the_gate_alone_keeps_every_weight(two, activations):
    sae = copy.deepcopy(two)
    train(sae, activations, rounds="through", trainable="gate", **OPTIONS)
    assert all(torch.equal(getattr(sae, name), getattr(two, name)) for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    assert not torch.equal(sae.refinement.eta, two.refinement.eta)


@pytest.mark.parametrize("rounds", ["after", "through"])
def test_l0_on_validation_text_is_what_it_was_set_for(two, activations, rounds):
    held, sae = activations[:1000] * 1.05, copy.deepcopy(two)
    train(sae, activations[1000:], validation=held, rounds=rounds, **OPTIONS)
    assert reconstruction(sae, held).l0 == pytest.approx(two.metadata["rounds"]["target_l0"], rel=0.02)


def test_training_ends_at_a_given_target_l0(two, activations):
    for rounds, validation in (("through", activations[:1000]), ("after", None)):
        sae = copy.deepcopy(two)
        train(sae, activations, target_l0=4.0, rounds=rounds, validation=validation, **OPTIONS)
        assert reconstruction(sae, activations).l0 == pytest.approx(4.0, rel=0.03), (rounds, validation is None)


def test_no_l0_is_set_where_a_process_holds_a_part(two, activations):
    mesh = SimpleNamespace(features=(0, 2), data=(0, 1))
    with pytest.raises(ConfigError, match="hold_l0 on the whole SAE"):
        train(copy.deepcopy(two), activations, validation=activations, mesh=mesh, rounds="through", **OPTIONS)


def test_one_round_is_held_on_validation_text_too(two, activations):
    sae = copy.deepcopy(two)
    sae.refinement = None
    del sae.metadata["rounds"]
    train(sae, activations, validation=activations[:1000], **OPTIONS)
    wanted = two.metadata["stage1"]["teacher_l0"]
    assert reconstruction(sae, activations[:1000]).l0 == pytest.approx(wanted, rel=0.02)


def test_a_run_goes_on_where_it_stopped_and_only_in_the_way_it_began(two, activations, tmp_path):
    options = {**OPTIONS, "rounds": "through", "out": tmp_path / "run", "checkpoint_every": 5}
    whole, first, second = (copy.deepcopy(two) for _ in range(3))
    train(whole, activations, **{**options, "out": None, "checkpoint_every": None})
    train(first, activations, **options)
    for later in list((tmp_path / "run/checkpoints").glob("step-*30*")):
        shutil.rmtree(later)
    with pytest.raises(ConfigError, match="trained with"):
        train(copy.deepcopy(two), activations, resume=True, **{**options, "rounds": "after"})
    train(second, activations, resume=True, **options)
    for name, one in second.state_dict().items():
        assert torch.allclose(one, whole.state_dict()[name], rtol=1e-4, atol=1e-5), name


def test_processes_that_share_features_all_hold_the_weights_of_dimensions():
    sae = FusedRationalSAE(16, 16, form="gated", backward="rational", rounds=2, weighed=True)
    axes = feature_axes(sae)
    assert axes["refinement.weights"] is None
    assert (axes["refinement.unit"], axes["refinement.p"], axes["b_dec"]) == (0, 1, None)


def test_an_error_in_training_keeps_the_rounds(two, activations):
    sae = copy.deepcopy(two)
    bad = activations.clone()
    bad[:] = torch.inf
    with pytest.raises(NumericsError):
        train(sae, bad, **OPTIONS)
    assert sae.rounds == 2
    with pytest.raises(ConfigError, match="rounds is"):
        train(sae, activations, rounds="never", **OPTIONS)
    assert isinstance(sae, FusedRationalSAE)


def test_the_plan_of_a_step_knows_of_rounds(two):
    six = copy.deepcopy(two)
    six.refinement = two.refinement.with_rounds(6)
    plans = [plan_memory(one, 512, free=1e12) for one in (two, six)]
    assert [one.mode for one in plans] == ["entries", "entries"]
    assert plans[0].need < plans[1].need < 6 * plans[0].need
    weighed = copy.deepcopy(two)
    weighed.refinement.weights = torch.ones(two.d_in)
    assert plan_memory(weighed, 512, free=1e12).need == plans[0].need + 8 * two.W_dec.numel()
    for memory in ("saved", "chunked", "streamed"):
        with pytest.raises(ConfigError, match="works on entries"):
            plan_memory(two, 512, memory)
    step = Step(4096, 768, 24576, support=0.004, active=0.002, rounds=2)
    wide, plain = (cost(step, name) for name in ("rounds", "sparse"))
    assert wide.total("flops") == plain.total("flops")  # one dense product, as for one round
    assert plain.seconds(CEILINGS["H200"]) < wide.seconds(CEILINGS["H200"]) < 5 * plain.seconds(CEILINGS["H200"])
