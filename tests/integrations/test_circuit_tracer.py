"""circuit-tracer's layout: what it would read of our files, by its own rule, and what it cannot have."""

import pytest
import torch
from safetensors.torch import load_file

from rsae_triton.common.errors import ConfigError
from rsae_triton.integrations.circuit_tracer import write_transcoders
from rsae_triton.sae.card import model_card
from rsae_triton.sae.transcoder import JumpReluTranscoder, RationalTranscoder, ReluTranscoder, TopKTranscoder
from rsae_triton.teachers import load_teacher
from rsae_triton.upgrading.stage_one import upgrade

D, F = 8, 40
X = torch.randn(500, D, generator=torch.Generator().manual_seed(0))


def made(kind=JumpReluTranscoder, layer=0, skip=True, **options):
    options |= {"threshold": 0.4} if kind is JumpReluTranscoder else {}
    sae = kind(D, F, skip=skip, generator=torch.Generator().manual_seed(layer), **options)
    sae.metadata.update(
        model_name="google/gemma-2-2b",
        hook_name=f"blocks.{layer}.mlp.hook_in",
        hook_name_out=f"blocks.{layer}.hook_mlp_out",
    )
    with torch.no_grad():
        sae.b_enc.normal_(0, 0.3)
        sae.b_dec.normal_(0, 0.3)
        if skip:
            sae.W_skip.normal_(0, 0.3)
    return sae


def traced(weights, x):
    """`SingleLayerTranscoder` of circuit-tracer 0.5: encode, decode, compute_skip."""
    h = torch.nn.functional.linear(x, weights["W_enc"], weights["b_enc"])
    threshold = weights.get("activation_function.threshold")
    z = torch.relu(h) if threshold is None else h * (h > threshold)
    y = z @ weights["W_dec"] + weights["b_dec"]
    return z, y + x @ weights["W_skip"].T if "W_skip" in weights else y


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", [ReluTranscoder, JumpReluTranscoder])
def test_circuit_tracers_own_formula_on_our_files_gives_our_reconstruction(tmp_path, kind, skip):
    own = {layer: made(kind, layer, skip) for layer in (0, 1)}
    folder = write_transcoders(own, tmp_path / "set", repo="me/transcoders")
    for layer, sae in own.items():
        z, y = traced(load_file(folder / f"layer_{layer}.safetensors"), X)
        torch.testing.assert_close(sae.encode(X), z, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sae(X), y, rtol=1e-4, atol=1e-5)
        again = load_teacher(folder / f"layer_{layer}.safetensors")
        torch.testing.assert_close(again(X), sae(X))
        assert type(again) is kind
        for name in ("model_name", "hook_name", "hook_name_out"):
            assert again.metadata[name] == sae.metadata[name]
    text = (folder / "config.yaml").read_text()
    for line in ('model_kind: "transcoder_set"', 'feature_input_hook: "mlp.hook_in"',
                 'feature_output_hook: "hook_mlp_out"', '  - "hf://me/transcoders/layer_1.safetensors"'):  # fmt: skip
        assert line in text


def test_a_rational_transcoder_is_exported_as_the_nearest_jumprelu(tmp_path):
    teacher = made()
    rsae = upgrade(teacher, X, targets=teacher(X).detach())
    with pytest.raises(ConfigError, match="to_jumprelu"):
        write_transcoders({0: rsae}, tmp_path / "set")
    jumprelu, loss = rsae.to_jumprelu(X, targets=teacher(X).detach())
    assert type(jumprelu) is JumpReluTranscoder
    assert loss.code_error < 0.01
    _, y = traced(load_file(write_transcoders({0: jumprelu}, tmp_path / "set") / "layer_0.safetensors"), X)
    assert float((y - rsae(X)).norm() / rsae(X).norm()) < 0.01


def test_transcoders_that_circuit_tracer_cannot_read_are_refused(tmp_path):
    for wrong, message in (
        ({}, "empty"),
        ({0: made(TopKTranscoder, k=4)}, "not TopKTranscoder"),
        ({1: made()}, "one of that layer"),
        ({0: JumpReluTranscoder(D, F, d_out=D + 1)}, "one width"),
        ({0: made(), 1: _other_model()}, "different places or models"),
    ):
        with pytest.raises(ConfigError, match=message):
            write_transcoders(wrong, tmp_path / "set")
    scaled = made()
    scaled.units, scaled.units_out = 2.0, 3.0
    with pytest.raises(ConfigError, match="to_units_"):
        write_transcoders({0: scaled}, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def _other_model():
    sae = made(layer=1)
    sae.metadata["model_name"] = "gpt2"
    return sae


def test_cards_say_what_a_transcoder_is_and_what_is_owed():
    sae = made()
    sae.metadata["loaded_from"] = {"format": "gemma_scope", "source": "google/gemma-scope-2b-pt-transcoders/layer_0"}
    card = model_card(RationalTranscoder.config(upgrade(sae, X, targets=sae(X).detach())))
    for text in ('license: "cc-by-4.0"', "# Rational transcoder of google/gemma-2-2b from `blocks.0.mlp.hook_in` to",
                 "Google DeepMind", "CC-BY-4.0", "Gemma model", "RationalTranscoder.from_pretrained"):  # fmt: skip
        assert text in card
    sae.metadata["loaded_from"]["source"] = "somebody/transcoders"
    sae.metadata["model_name"] = "meta-llama/Llama-3.2-1B"
    card = model_card(sae.config())
    assert "license:" not in card
    assert "Built with Llama" in card
    assert "whose licence is not known here" in card
