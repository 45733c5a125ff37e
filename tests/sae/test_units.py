"""Units: a store and an SAE are brought together whatever either is in, and what cannot be right is said."""

import copy
import warnings

import pytest
import torch

import rsae_triton as rt
from rsae_triton.activations.from_tensor import store_tensor
from rsae_triton.common.errors import ConfigError
from rsae_triton.evaluation import evaluate
from rsae_triton.evaluation.compare import compare
from rsae_triton.evaluation.matching import match_features
from rsae_triton.integrations.splicing import replacement
from rsae_triton.sae.adding import hold_l0
from rsae_triton.sae.architectures import JumpReluSAE, ReluSAE
from rsae_triton.sae.units import reading, same_hook, same_model
from rsae_triton.training.loop import train
from rsae_triton.upgrading.stage_one import upgrade

D, F = 12, 32
PLACE = {"model": "tiny", "hook_name": "blocks.1.hook_resid_pre"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A store of the model's activations (norms of about 70) and a JumpReLU SAE trained on it, reading those."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(F, D, generator=generator), dim=1)
    codes = torch.rand(2048, F, generator=generator) * (torch.rand(2048, F, generator=generator) < 0.08)
    raw = 90 * codes @ directions + 20
    store = store_tensor(raw, tmp_path_factory.mktemp("units") / "store", provenance=PLACE)
    teacher = ReluSAE(D, F, generator=generator)
    train(teacher, store, steps=150, batch_size=256, lr=3e-3, progress=False)
    teacher.to_units_(1.0)
    return store, teacher, raw


def scores(sae, store):
    found = evaluate(sae, None, store)
    return [found[name] for name in ("mse", "fvu", "l0", "l1")]


def test_training_on_a_store_binds_a_new_sae_to_it(world):
    store, teacher, raw = world
    fresh = ReluSAE(D, F)
    assert fresh.units is None
    train(fresh, store, steps=2, batch_size=256, progress=False)
    assert fresh.units == store.scale
    assert fresh.metadata["hook_name"] == PLACE["hook_name"]
    assert scores(teacher, store)[1] < 0.5
    z = teacher.encode(raw)
    torch.testing.assert_close(copy.deepcopy(teacher).to_units_(store.scale).encode(raw * store.scale), z)


def test_upgrade_train_and_evaluate_do_not_care_which_units_a_teacher_reads(world, tmp_path):
    store, teacher, _ = world
    scaled = copy.deepcopy(teacher).to_units_(store.scale)
    results = []
    for one in (teacher, scaled):
        before = {name: tensor.clone() for name, tensor in one.state_dict().items()}
        rsae = upgrade(one, store)
        assert rsae.units == one.units
        assert all(torch.equal(before[name], tensor) for name, tensor in one.state_dict().items())
        assert all(torch.equal(getattr(rsae, name), before[name]) for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
        first = scores(rsae, store)
        log = train(rsae, store, steps=5, batch_size=256, progress=False, seed=1)
        assert rsae.units == one.units
        loaded = rt.FusedRationalSAE.from_pretrained(rsae.save_pretrained(tmp_path / str(one.units)))
        assert loaded.units == 1.0
        assert scores(loaded, store) == pytest.approx(scores(rsae, store), rel=1e-3)
        results.append([*first, *log.mse, *scores(rsae, store)])
    assert results[0] == pytest.approx(results[1], rel=1e-3)


def test_compare_match_and_splice_bring_units_together(world):
    store, teacher, raw = world
    scaled = copy.deepcopy(teacher).to_units_(store.scale)
    both = compare({"a": teacher, "b": scaled}, store)
    assert both["b"]["mse"] == pytest.approx(both["a"]["mse"], rel=1e-3)
    found = match_features(teacher, scaled, store)
    assert found.summary()["kept_meaning_fraction"] == 1
    own, other = (
        replacement(sae, use_error_term=False, norm_limit=None, count=[0])(raw[:64]) for sae in (teacher, scaled)
    )
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-3)
    with pytest.raises(ConfigError, match="different units"):
        match_features(teacher, scaled, store.tensor())


def test_frozen_weights_come_back_bit_for_bit(world):
    store, teacher, _ = world
    rsae = upgrade(teacher, store)
    rsae.W_dec.requires_grad_(False)
    before = rsae.W_dec.clone(), rsae.W_enc.clone()
    train(rsae, store, steps=2, batch_size=256, progress=False)
    assert torch.equal(rsae.W_dec, before[0])
    assert not torch.equal(rsae.W_enc, before[1])
    with pytest.raises(RuntimeError, match="inside"), reading(rsae, store):
        raise RuntimeError("inside")
    assert torch.equal(rsae.W_dec, before[0])
    assert rsae.units == 1.0


def test_an_error_in_training_leaves_the_units_they_were(world):
    store, teacher, _ = world
    own = copy.deepcopy(teacher)

    class Broken:
        d_in, scale, manifest, n_tokens = D, store.scale, store.manifest, store.n_tokens

        def batches(self, size, *, seed):
            yield torch.full((size, D), float("nan"))

    with pytest.raises(rt.common.errors.NumericsError):
        train(own, Broken(), steps=2, batch_size=8, progress=False)
    assert own.units == 1.0
    torch.testing.assert_close(own.W_enc, teacher.W_enc)


def test_rounds_are_the_same_in_any_units(world):
    store, teacher, _ = world
    scaled = copy.deepcopy(teacher).to_units_(store.scale)
    refined = [one.with_rounds(2, store) for one in (teacher, scaled)]
    assert [one.units for one in refined] == [1.0, store.scale]
    assert torch.equal(refined[0].W_dec, teacher.W_dec)
    assert scores(refined[0], store) == pytest.approx(scores(refined[1], store), rel=1e-3)
    unit = refined[0].refinement.unit.clone()
    hold_l0(refined[0], store, 0.8 * scores(teacher, store)[2])
    assert scores(refined[0], store)[2] == pytest.approx(0.8 * scores(teacher, store)[2], rel=0.02)
    assert torch.equal(refined[0].W_dec, teacher.W_dec)
    assert torch.equal(refined[0].refinement.unit, unit)


def test_a_tensor_in_other_units_is_warned_of_with_the_factor(world):
    store, teacher, raw = world
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        upgrade(teacher, raw)
    with pytest.warns(UserWarning, match=r"worse than their mean.*Multiplied by about .*other units"):
        upgrade(teacher, store.tensor())
    with pytest.warns(UserWarning, match="other units"):
        train(copy.deepcopy(teacher), store.tensor(), steps=1, batch_size=64, progress=False)
    with pytest.warns(UserWarning, match="other units"):
        compare({"a": teacher}, store.tensor())
    with pytest.warns(UserWarning, match="another model, layer or hook"):
        upgrade(teacher, -raw)


def test_another_model_or_place_is_an_error(world):
    store, teacher, _ = world
    for key, value in (("hook_name", "blocks.2.hook_resid_pre"), ("model_name", "gpt2")):
        other = copy.deepcopy(teacher)
        other.metadata[key] = value
        for call in (upgrade, lambda sae, x: train(sae, x, steps=1), lambda sae, x: evaluate(sae, None, x)):
            with pytest.raises(ConfigError, match=f"says that it reads {value}"):
                call(other, store)
    with pytest.raises(ConfigError, match="are unknown"):
        JumpReluSAE(D, F).to_units_(1.0)


def test_names_of_one_place():
    assert same_hook("blocks.7.hook_resid_post", "blocks.8.hook_resid_pre")
    assert same_hook("model.layers.7", "blocks.8.hook_resid_pre")
    assert same_hook("transformer.h.3.mlp", "blocks.3.mlp.hook_out")
    assert same_hook("transformer.h.3.mlp", "blocks.3.hook_mlp_out") is None
    assert not same_hook("blocks.7.hook_resid_pre", "blocks.8.hook_resid_pre")
    assert not same_hook("blocks.7.hook_mlp_out", "blocks.7.hook_attn_out")
    assert same_hook("somewhere", "blocks.7.hook_resid_pre") is None
    assert same_model("gpt2-small", "openai-community/gpt2")
    assert same_model("google/gemma-2-2b", "gemma-2-2b-it")
    assert not same_model("gpt2", "EleutherAI/pythia-70m")
    assert same_model("/data/snapshots/12ab", "gpt2") is None
