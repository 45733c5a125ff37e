"""Steering adds decoder rows, in the model's units, and leaves the model as it was."""

import copy

import pytest
import torch

import rsae_triton as rt
from rsae_triton.common.errors import ConfigError

TOKENS = torch.arange(1, 21).view(2, 10)


def residual_behind(host, depth=3):
    return host.model(TOKENS, output_hidden_states=True).hidden_states[depth]


@torch.no_grad()
@pytest.mark.parametrize("scaled", [False, True])
def test_steering_adds_to_or_sets_a_feature(world, scaled):
    host, store, _, rsae = world
    sae = copy.deepcopy(rsae).to_units_(store.scale) if scaled else rsae
    place = sae.metadata["hook_name"]
    x = host.residual(TOKENS, place)
    seen = []
    for mode in ("add", "set"):
        with rt.steer(host, sae, {3: 4.0, 7: -1.0}, mode=mode):
            hook = host.model.model.layers[2].register_forward_pre_hook(
                lambda _module, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).clone()),
                with_kwargs=True,
            )
            host.model(TOKENS)
            hook.remove()
    added, made = seen
    rows = rsae.W_dec[[3, 7]].float()
    torch.testing.assert_close(added[:, 1:], (x + 4 * rows[0] - rows[1])[:, 1:].to(x.dtype), rtol=1e-3, atol=1e-3)
    assert torch.equal(added[:, 0], x[:, 0])
    z = rsae.encode(x.float())[..., [3, 7]]
    expected = x + (torch.tensor([4.0, -1.0]) - z) @ rows
    torch.testing.assert_close(made[:, 1:], expected[:, 1:].to(x.dtype), rtol=1e-3, atol=2e-3)


@torch.no_grad()
def test_a_completion_changes_and_the_model_is_as_it_was(world):
    host, _, _, rsae = world
    clean = host.complete("w1 w2 w3", 12)
    assert clean.startswith("w1 w2 w3")
    with rt.steer(host, rsae, {5: 300.0}):
        steered = host.complete("w1 w2 w3", 12)
    assert steered != clean
    assert host.complete("w1 w2 w3", 12) == clean


def test_bad_strengths_features_and_modes_are_errors(world):
    host, _, _, rsae = world
    for strengths, message in (({}, "strengths is {}"), ({96: 1.0}, "a feature is 96"), ({3: "x"}, "strength of")):
        with pytest.raises(ConfigError, match=message), rt.steer(host, rsae, strengths):
            pass
    with pytest.raises(ConfigError, match="mode is"), rt.steer(host, rsae, {3: 1.0}, mode="times"):
        pass
