"""Places by every name that libraries give them, read and replaced with either library."""

import copy

import pytest
import tiny_models
import torch

from rsae_triton.activations.host import HostModel
from rsae_triton.activations.places import canonical, same_place
from rsae_triton.common.errors import ConfigError
from rsae_triton.integrations import splice
from rsae_triton.teachers import ReluSAE

SMALL = ReluSAE(32, 8)
TOKENS = torch.arange(1, 13).reshape(2, 6)
SAME = ("blocks.1.hook_resid_post", "blocks.1.hook_out", "blocks.2.hook_in", "blocks.2.hook_resid_pre",
        "model.layers.1", "model.layers.1.output", "model.layers.2.input", "layers.1",
        "layer 1", "Layer_1", "blocks.1")  # fmt: skip


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("model"), tiny_models.llama()
    tokenizer = tiny_models.tokenizer(folder)
    bridge = tiny_models.bridge(model, folder)
    return HostModel(model, tokenizer, "tiny"), HostModel(model, tokenizer, "tiny", bridge)


@pytest.mark.parametrize("name", SAME)
def test_one_place_has_one_meaning_under_all_its_names(hosts, name):
    for host in hosts:
        expected = host.residual(TOKENS, "blocks.1.hook_resid_post")
        assert torch.equal(host.residual(TOKENS, name), expected)
    model = hosts[0].model
    sae = ReluSAE(tiny_models.D_MODEL, 64, generator=torch.Generator().manual_seed(0))
    with splice(model, sae, "blocks.1.hook_resid_post"):
        replaced = model(TOKENS).logits
    with splice(model, sae, name):
        assert torch.equal(model(TOKENS).logits, replaced)
    assert same_place(name, "blocks.1.hook_resid_post")
    assert not same_place(name, "blocks.1.hook_resid_pre")


def test_the_output_of_the_last_layer_is_the_hook_in_of_the_layer_after_it(hosts):
    last = hosts[0].residual(TOKENS, f"blocks.{tiny_models.N_LAYERS - 1}.hook_out")
    assert torch.equal(hosts[0].residual(TOKENS, f"blocks.{tiny_models.N_LAYERS}.hook_in"), last)


def test_mlps_are_served_without_transformer_lens_and_alike_with_it(hosts):
    alone, lens = hosts
    for name in ("blocks.2.mlp.hook_in", "blocks.2.mlp.hook_out", "blocks.2.hook_mlp_out", "layers.2.mlp"):
        found: list[torch.Tensor] = []
        lens._run_bridge(TOKENS, {canonical(name): lambda value, found=found: found.append(value.clone()) or value})
        assert torch.allclose(alone.residual(TOKENS, name), found[0], atol=1e-6)
    # The MLP itself, on what is read before it, is what is read behind it.
    inside, out, stream = alone.residuals(TOKENS, ["blocks.2.mlp.hook_in", "layers.2.mlp", "blocks.2.hook_resid_post"])
    assert torch.allclose(alone.model.model.layers[2].mlp(inside), out, atol=1e-6)
    assert stream.shape == out.shape


def test_a_pair_of_places_is_read_and_written_in_one_pass(hosts):
    """Handing the MLP's own output back changes nothing; zeros are an ablation; the order of places is checked."""
    places = {"hook_name": "blocks.1.hook_mlp_out", "read_at": "blocks.1.mlp.hook_in"}
    for host in hosts:
        own = copy.deepcopy(host.model.model.layers[1].mlp)  # the model's own would go through the hook again

        def compute(out, x, own=own):
            return own(x)

        changes = {"clean": None, "own": compute, "zero": lambda out, x: torch.zeros_like(out)}
        found = host.splice(TOKENS, replacements=changes, kl=True, **places)
        assert torch.allclose(found["own"].nll, found["clean"].nll, atol=1e-5)
        assert float(found["own"].kl.abs().max()) < 1e-5 < float(found["zero"].kl.max())
        ablated = host.splice(TOKENS, "blocks.1.mlp.hook_out", {"zero": torch.zeros_like})["zero"].nll
        assert torch.allclose(found["zero"].nll, ablated, atol=1e-5)
        with pytest.raises(ConfigError, match="swap"):
            host.splice(TOKENS, "blocks.0.mlp.hook_in", {"x": lambda out, x: out}, read_at="blocks.1.mlp.hook_out")


def test_an_unknown_hook_name_is_an_error_that_suggests_known_ones(hosts):
    for host in hosts:
        with pytest.raises(ConfigError, match=r"blocks\.1\.hook_resid_p"):
            host.resolve_hook("blocks.1.hook_resid_pos")
        with pytest.raises(ConfigError, match="4 layers"):
            host.resolve_hook("layer 9")
    with (
        pytest.raises(ConfigError, match="did you mean"),
        splice(hosts[0].model, SMALL, "model.layers.1.mpl"),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="did you mean"),
        splice(hosts[1].bridge, SMALL, "blocks.1.hook_rsid_post"),
    ):
        pass
