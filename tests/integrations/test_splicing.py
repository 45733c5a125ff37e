"""A model with an SAE in it: nothing changes under an identity, and nothing stays behind."""

import contextlib

import pytest
import torch
from tiny_models import D_MODEL, N_LAYERS, bridge, gpt2, llama, tokenizer

from rsae_triton import FusedRationalSAE, load_host
from rsae_triton.common.errors import ConfigError, ShapeError, SourceError
from rsae_triton.integrations import splice
from rsae_triton.teachers import ReluSAE

pytest.importorskip("transformers")
TOKENS = torch.arange(24).view(2, 12) % 50 + 3
RESIDUAL = ["blocks.0.hook_resid_pre", "blocks.2.hook_resid_pre", f"blocks.{N_LAYERS - 1}.hook_resid_post"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {"llama": llama(), "gpt2": gpt2()}
    with contextlib.suppress(ImportError):
        made["bridge"] = bridge(made["llama"], tmp_path_factory.mktemp("tokenizer"))
    return made


@pytest.fixture(params=["llama", "gpt2", "bridge"])
def model(request, models):
    return models.get(request.param) or pytest.skip("transformer_lens is not installed")


def identity(width=D_MODEL, **metadata):
    """relu(x) - relu(-x) = x, exactly."""
    sae, eye = ReluSAE(width, 2 * width, metadata=metadata), torch.eye(width)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], 1))
        sae.W_dec.copy_(torch.cat([eye, -eye], 0))
    return sae


def rsae(width=D_MODEL):
    sae = FusedRationalSAE(width, 64, generator=torch.Generator().manual_seed(0), form="gated", backward="rational")
    with torch.no_grad():
        sae.gate.threshold.fill_(0.02)
    return sae


def logits(model):
    out = model(TOKENS)
    return getattr(out, "logits", out)


def hooks(model):
    """Every hook of every module, and TransformerLens' own lists."""
    torch_hooks = [
        (name, list(module._forward_hooks), list(module._forward_pre_hooks), list(module._backward_hooks))
        for name, module in model.named_modules()
    ]
    lens = {name: (list(p.fwd_hooks), list(p.bwd_hooks)) for name, p in getattr(model, "hook_dict", {}).items()}
    return torch_hooks, lens, sorted(model.__dict__)


@torch.no_grad()
@pytest.mark.parametrize("place", RESIDUAL)
def test_identity_changes_nothing_and_nothing_stays(model, place):
    clean, before = logits(model), hooks(model)
    with splice(model, identity(), place):
        assert (logits(model) - clean).abs().max() <= 1e-5
    assert hooks(model) == before
    with splice(model, rsae(), place):
        assert (logits(model) - clean).abs().max() > 1e-2
    assert hooks(model) == before
    assert torch.equal(logits(model), clean)


@torch.no_grad()
def test_nothing_stays_when_the_body_or_the_sae_raises(model):
    clean, before = logits(model), hooks(model)

    def interrupted():
        with splice(model, rsae(), RESIDUAL[1]):
            logits(model)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert hooks(model) == before
    with pytest.raises(ShapeError, match=f"d_in={D_MODEL + 1}"), splice(model, rsae(D_MODEL + 1), RESIDUAL[1]):
        logits(model)
    assert hooks(model) == before
    assert torch.equal(logits(model), clean)


@torch.no_grad()
def test_the_spliced_activations_are_the_reconstruction_by_all_three_ways(models):
    """The same place by three ways: our host's own splice, the Hugging Face hook, TransformerLens' hook."""
    from rsae_triton.activations import layers

    sae = rsae()
    expected = layers.replaced(models["llama"], TOKENS, 2, lambda x: sae(x))
    for name in ("llama", "bridge"):
        if name in models:
            with splice(models[name], sae, "blocks.2.hook_resid_pre"):
                assert torch.allclose(logits(models[name]), expected, atol=1e-5)


@torch.no_grad()
def test_two_saes_at_once_come_off_in_any_order(model):
    clean, before = logits(model), hooks(model)
    with splice(model, rsae(), RESIDUAL[0]):
        one = logits(model)
        with splice(model, rsae(), RESIDUAL[2]):
            both = logits(model)
        assert torch.equal(logits(model), one)
    assert not torch.allclose(one, both)
    outer, inner = splice(model, rsae(), RESIDUAL[0]), splice(model, identity(), RESIDUAL[0])
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    assert hooks(model) == before
    assert torch.equal(logits(model), clean)


def test_error_term_keeps_the_output_and_gives_the_code_gradients(model):
    with torch.no_grad():
        clean = logits(model)
    sae = rsae()
    with splice(model, sae, RESIDUAL[1], use_error_term=True):
        out = logits(model)
    assert torch.allclose(out, clean, atol=1e-4)
    out[:, -1].max(-1).values.sum().backward()
    assert sae.W_dec.grad.abs().sum() > 0


@torch.no_grad()
def test_long_activations_are_left_alone(model):
    clean, sae = logits(model), rsae()
    with splice(model, sae, RESIDUAL[1], norm_limit=0.0):
        assert torch.equal(logits(model), clean)
    with splice(model, sae, RESIDUAL[1], norm_limit=1e9):
        limited = logits(model)
    with splice(model, sae, RESIDUAL[1]):
        assert torch.equal(logits(model), limited)


@torch.no_grad()
def test_low_precision_models_get_their_own_dtype_back():
    model = llama().bfloat16()
    clean = logits(model)
    with splice(model, identity(), RESIDUAL[1]):
        out = logits(model)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, clean)


@torch.no_grad()
def test_modules_by_their_path(models):
    for name, path in (("llama", "model.layers.1.mlp"), ("gpt2", "transformer.h.1.attn")):
        clean = logits(models[name])
        with splice(models[name], identity(), path):
            assert (logits(models[name]) - clean).abs().max() <= 1e-5
        with splice(models[name], rsae(), path):
            assert not torch.allclose(logits(models[name]), clean, atol=1e-3)


@torch.no_grad()
def test_places_only_transformer_lens_has(models):
    if "bridge" not in models:
        pytest.skip("transformer_lens is not installed")
    model, sae = models["bridge"], identity(hook_name="blocks.1.attn.hook_z")
    clean = logits(model)
    with splice(model, sae):  # [batch, token, head, d_head], flattened for the SAE
        assert (logits(model) - clean).abs().max() <= 1e-5
    with splice(model, rsae(), "blocks.1.hook_mlp_out"):
        assert not torch.allclose(logits(model), clean, atol=1e-3)
        spliced = logits(model)
        model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.hook_mlp_out", lambda value, hook: value)])
        assert torch.equal(logits(model), spliced)  # a run with hooks in the body takes nothing off


@torch.no_grad()
def test_generation_with_a_cache(models):
    model = models["llama"]
    plain = model.generate(TOKENS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    with splice(model, identity(), RESIDUAL[1]):
        assert torch.equal(model.generate(TOKENS, max_new_tokens=5, do_sample=False, pad_token_id=0), plain)


@pytest.mark.parametrize(
    ("place", "message"), [("blocks.99.hook_resid_pre", "no hook|4 layers"), ("nowhere", "nowhere"), (None, "names no")]
)
def test_wrong_places_are_named(model, place, message):
    before = hooks(model)
    with pytest.raises(ConfigError, match=message), splice(model, identity(), place):
        pass
    assert hooks(model) == before


@torch.no_grad()
def test_splicing_at_a_module_that_never_runs_is_an_error():
    class Idle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = torch.nn.Identity(), torch.nn.Identity()

        def forward(self, x):
            return self.used(x)

    model = Idle()
    with pytest.raises(ConfigError, match="never computed unused"), splice(model, identity(), "unused"):
        model(torch.randn(2, 3, D_MODEL))
    with splice(model, identity(), "unused"):
        pass  # nothing ran, nothing was missed


@torch.no_grad()
def test_a_bridge_that_is_made_inside_is_spliced_too(tmp_path):
    pytest.importorskip("transformer_lens")
    llama().save_pretrained(tmp_path)
    tokenizer(tmp_path).save_pretrained(tmp_path)
    host = load_host(str(tmp_path), dtype="float32", device="cpu")
    with splice(host, rsae(), RESIDUAL[1]):
        inside = (logits(host.model), logits(host.bridge))
    outside = (logits(host.model), logits(host.bridge))
    torch.testing.assert_close(inside[0], inside[1])
    torch.testing.assert_close(outside[0], outside[1])
    assert (inside[0] - outside[0]).abs().max() > 1e-3
    before = hooks(host.bridge)
    with splice(host, rsae(), RESIDUAL[1]):
        torch.testing.assert_close(logits(host.bridge), inside[0])
    assert hooks(host.bridge) == before


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.network
def test_smollm2():
    """In the real model, as a Hugging Face module and behind a bridge: 30 layers, BOS a hundredfold longer."""
    try:
        host = load_host("smollm2", dtype="float32", device="cpu")
    except SourceError as error:
        pytest.skip(f"SmolLM2 cannot be fetched: {error}")
    ids = host.tokenizer("The capital of Denmark is Copenhagen.", add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([[host.bos_token_id, *ids]])

    def run(model):
        out = model(tokens)
        return getattr(out, "logits", out)

    for model in filter(None, (host.model, host.bridge)):
        clean, before = run(model), hooks(model)
        with splice(model, identity(host.d_model), host.default_hook):
            assert (run(model) - clean).abs().max() <= 1e-5
        with contextlib.suppress(KeyboardInterrupt), splice(model, rsae(host.d_model), host.default_hook):
            assert (run(model) - clean).abs().max() > 1
            raise KeyboardInterrupt
        assert hooks(model) == before
        assert torch.equal(run(model), clean)
