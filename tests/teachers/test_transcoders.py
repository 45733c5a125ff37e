"""Transcoders of every library that has them, against the documented rule in numpy; and what is refused by name.

Weights, configurations and folders are made here as each library writes them; none of our code computes the rule.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rsae_triton.common.errors import ConfigError, FormatError
from rsae_triton.sae.transcoder import (
    JumpReluTranscoder,
    RationalTranscoder,
    ReluTranscoder,
    TopKTranscoder,
    Transcoder,
)
from rsae_triton.teachers import ReluSAE, SparseAutoencoder, load_teacher

D_IN, D_SAE, K = 6, 20, 4
RANDOM = np.random.default_rng(0)


def draw(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


X = draw(40, D_IN)


def torched(**arrays):
    return {name: torch.from_numpy(np.ascontiguousarray(one)) for name, one in arrays.items()}


def relu(h):
    return np.maximum(h, 0)


def topk(h):
    return relu(h * (h >= np.sort(h, axis=1)[:, -K][:, None]))


def check(teacher, z, y_hat, inside, outside):
    x = torch.from_numpy(X)
    np.testing.assert_allclose(teacher.encode(x).detach(), z, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(teacher(x).detach(), y_hat, rtol=1e-4, atol=1e-4)
    assert (teacher.metadata["hook_name"], teacher.metadata["hook_name_out"]) == (inside, outside)
    assert isinstance(teacher, Transcoder)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("jump", [False, True])
def test_circuit_tracer(tmp_path, jump, skip):
    W_enc, W_dec, b_enc, b_dec, W_skip = draw(D_SAE, D_IN), draw(D_SAE, D_IN), draw(D_SAE), draw(D_IN), draw(D_IN, D_IN)
    threshold = np.abs(draw(D_SAE))
    arrays = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
    arrays |= {"activation_function.threshold": threshold} if jump else {}
    arrays |= {"W_skip": W_skip} if skip else {}
    save_file(torched(**arrays), tmp_path / "layer_7.safetensors")
    h = X @ W_enc.T + b_enc
    z = h * (h > threshold) if jump else relu(h)
    y_hat = z @ W_dec + b_dec + (X @ W_skip.T if skip else 0)
    teacher = load_teacher(tmp_path / "layer_7.safetensors")
    check(teacher, z, y_hat, "blocks.7.mlp.hook_in", "blocks.7.hook_mlp_out")
    assert type(teacher) is (JumpReluTranscoder if jump else ReluTranscoder)
    (tmp_path / "config.yaml").write_text(
        'model_name: "google/gemma-2-2b"\nmodel_kind: transcoder_set\nfeature_input_hook: "ln2.hook_normalized"\n'
        "feature_output_hook: hook_mlp_out  # of the block\nscan: x\n"
    )
    teacher = load_teacher(tmp_path)
    check(teacher, z, y_hat, "blocks.7.ln2.hook_normalized", "blocks.7.hook_mlp_out")
    assert teacher.metadata["model_name"] == "google/gemma-2-2b"


def test_circuit_tracers_folders_of_many_layers_ask_for_one(tmp_path):
    arrays = torched(W_enc=draw(D_SAE, D_IN), W_dec=draw(D_SAE, D_IN), b_enc=draw(D_SAE), b_dec=draw(D_IN))
    for layer in (0, 1):
        save_file(arrays, tmp_path / f"layer_{layer}.safetensors")
    with pytest.raises(FormatError, match="layer_N"):
        load_teacher(tmp_path)
    assert load_teacher(tmp_path / "layer_1.safetensors").metadata["hook_name"] == "blocks.1.mlp.hook_in"
    save_file({**arrays, "log_thresholds": torch.zeros(D_SAE)}, tmp_path / "layer_2.safetensors")
    with pytest.raises(FormatError, match="log_thresholds"):
        load_teacher(tmp_path / "layer_2.safetensors")


def gemma_weights():
    return draw(D_IN, D_SAE), draw(D_SAE, D_IN), draw(D_SAE), draw(D_IN), np.abs(draw(D_SAE))


def gemma_rule(W_enc, W_dec, b_enc, b_dec, threshold):
    h = X @ W_enc + b_enc
    z = relu(h) * (h > threshold)
    return z, z @ W_dec + b_dec


def test_gemma_scope_transcoders(tmp_path):
    folder = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_3" / "width_16k" / "average_l0_76"
    folder.mkdir(parents=True)
    weights = gemma_weights()
    np.savez(
        folder / "params.npz", **dict(zip(("W_enc", "W_dec", "b_enc", "b_dec", "threshold"), weights, strict=True))
    )
    teacher = load_teacher(folder)
    check(teacher, *gemma_rule(*weights), "blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out")
    assert teacher.metadata["model_name"] == "google/gemma-2-2b"


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("configured", [False, True])
def test_gemma_scope_2_transcoders(tmp_path, configured, affine):
    """Folders of the release without config.json say by their names what they are."""
    folder = tmp_path / "gemma-scope-2-270m-pt" / "transcoder_all" / "layer_5_width_16k_l0_big"
    folder.mkdir(parents=True)
    weights, skip = gemma_weights(), draw(D_IN, D_IN)
    names = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
    arrays = torched(**dict(zip(names, weights, strict=True)), **({"affine_skip_connection": skip} if affine else {}))
    save_file(arrays, folder / "params.safetensors")
    config = {
        "architecture": "jump_relu",
        "model_name": "gemma-v3-270m-pt",
        "hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output",
        "affine_connection": affine,
    }
    if configured:
        (folder / "config.json").write_text(json.dumps(config))
    teacher = load_teacher(folder)
    z, y_hat = gemma_rule(*weights)
    # Stored (d_in, d_out): added as x @ affine_skip_connection.
    check(teacher, z, y_hat + (X @ skip if affine else 0), "blocks.5.mlp.hook_in", "blocks.5.hook_mlp_out")
    assert teacher.metadata["model_name"] == "google/gemma-3-270m"


def test_gemma_scope_folders_that_say_nothing_are_not_taken_for_saes(tmp_path):
    weights = gemma_weights()
    save_file(
        torched(**dict(zip(("w_enc", "w_dec", "b_enc", "b_dec", "threshold"), weights, strict=True))),
        tmp_path / "params.safetensors",
    )
    with pytest.raises(FormatError, match="nothing says whether"):
        load_teacher(tmp_path)
    assert isinstance(load_teacher(tmp_path, kind="transcoder"), JumpReluTranscoder)
    assert not isinstance(load_teacher(tmp_path, kind="sae"), Transcoder)
    with pytest.raises(ConfigError, match="kind is 'clt'"):
        load_teacher(tmp_path, kind="clt")


def test_gemma_scope_2_saes_without_a_configuration(tmp_path):
    for site, hook in (("resid_post_all", "hook_resid_post"), ("attn_out", "attn.hook_z"), ("mlp_out", "hook_mlp_out")):
        folder = tmp_path / "gemma-scope-2-1b-it" / site / "layer_9_width_16k_l0_small"
        folder.mkdir(parents=True)
        names = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
        save_file(torched(**dict(zip(names, gemma_weights(), strict=True))), folder / "params.safetensors")
        teacher = load_teacher(folder)
        assert not isinstance(teacher, Transcoder)
        assert teacher.metadata["hook_name"] == f"blocks.9.{hook}"
        assert teacher.metadata["model_name"] == "google/gemma-3-1b-it"


def test_gemma_scopes_embedding_saes_read_what_hook_embed_holds(tmp_path):
    folder = tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6"
    folder.mkdir(parents=True)
    weights = gemma_weights()
    np.savez(
        folder / "params.npz", **dict(zip(("W_enc", "W_dec", "b_enc", "b_dec", "threshold"), weights, strict=True))
    )
    teacher = load_teacher(folder)
    assert teacher.metadata["hook_name"] == "hook_embed"
    W_enc, W_dec, b_enc, b_dec, threshold = weights
    h = X / np.sqrt(D_IN) @ W_enc + b_enc
    z = relu(h) * (h > threshold)
    np.testing.assert_allclose(teacher.encode(torch.from_numpy(X)).detach(), z, atol=1e-5)
    np.testing.assert_allclose(teacher(torch.from_numpy(X)).detach(), (z @ W_dec + b_dec) * np.sqrt(D_IN), atol=1e-4)


@pytest.mark.parametrize("skip", [False, True])
def test_sparsify(tmp_path, skip):
    folder = tmp_path / "run" / "layers.2.mlp"
    folder.mkdir(parents=True)
    W_enc, b_enc, W_dec, b_dec, W_skip = draw(D_SAE, D_IN), draw(D_SAE), draw(D_SAE, D_IN), draw(D_IN), draw(D_IN, D_IN)
    arrays = {"encoder.weight": W_enc, "encoder.bias": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    save_file(torched(**arrays, **({"W_skip": W_skip} if skip else {})), folder / "sae.safetensors")
    config = {"d_in": D_IN, "num_latents": D_SAE, "k": K, "transcode": True, "skip_connection": skip}
    (folder / "cfg.json").write_text(json.dumps(config))
    z = topk(relu(X @ W_enc.T + b_enc))
    teacher = load_teacher(folder)
    y_hat = z @ W_dec + b_dec + (X @ W_skip.T if skip else 0)
    check(teacher, z, y_hat, "blocks.2.mlp.hook_in", "blocks.2.mlp.hook_out")
    assert type(teacher) is TopKTranscoder
    (folder / "cfg.json").write_text(json.dumps({**config, "transcode": False, "skip_connection": True}))
    with pytest.raises(FormatError, match="an SAE has not"):
        load_teacher(folder)


def test_llamascopium(tmp_path):
    """Both ends are scaled to a mean norm of sqrt(d_model), each by its own."""
    W_E, b_E, W_D, b_D = draw(D_IN, D_SAE), draw(D_SAE), draw(D_SAE, D_IN), draw(D_IN)
    inside, outside = "blocks.6.ln2.hook_normalized", "blocks.6.hook_mlp_out"
    norms = {inside: 3.0, outside: 0.7}
    arrays = {"W_E": W_E, "b_E": b_E, "W_D": W_D, "b_D": b_D}
    stored = {f"dataset_average_activation_norm.{name}": torch.tensor(one) for name, one in norms.items()}
    save_file({**torched(**arrays), **stored}, tmp_path / "sae_weights.safetensors")
    config = {"d_model": D_IN, "act_fn": "topk", "top_k": K, "sparsity_include_decoder_norm": False,
              "norm_activation": "dataset-wise", "hook_point_in": inside, "hook_point_out": outside}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    z = topk(X * np.sqrt(D_IN) / 3.0 @ W_E + b_E)
    y_hat = (z @ W_D + b_D) * 0.7 / np.sqrt(D_IN)
    check(load_teacher(tmp_path), z, y_hat, inside, outside)
    for kind in ("crosscoder", "clt", "molt", "lorsa"):
        (tmp_path / "config.json").write_text(json.dumps({**config, "sae_type": kind}))
        with pytest.raises(FormatError, match=kind):
            load_teacher(tmp_path)


@pytest.mark.parametrize(
    "architecture", ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]
)
def test_saelens(tmp_path, architecture):
    d_out = D_IN + 1
    W_enc, b_enc, W_dec, b_dec, W_skip = (
        draw(D_IN, D_SAE),
        draw(D_SAE),
        draw(D_SAE, d_out),
        draw(d_out),
        draw(d_out, D_IN),
    )
    arrays = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    threshold = np.abs(draw(D_SAE))
    jump, skip = "jumprelu" in architecture, "skip" in architecture
    arrays |= ({"threshold": threshold} if jump else {}) | ({"W_skip": W_skip} if skip else {})
    save_file(torched(**arrays), tmp_path / "sae_weights.safetensors")
    metadata = {
        "sae_lens_version": "6.54.12",
        "hook_name": "blocks.1.mlp.hook_in",
        "hook_name_out": "blocks.1.hook_mlp_out",
    }
    config = {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "d_out": d_out, "dtype": "float32",
              "apply_b_dec_to_input": False, "normalize_activations": "none", "metadata": metadata}  # fmt: skip
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    h = X @ W_enc + b_enc
    z = relu(h) * (h > threshold) if jump else relu(h)
    y_hat = z @ W_dec + b_dec + (X @ W_skip.T if skip else 0)
    teacher = load_teacher(tmp_path)
    check(teacher, z, y_hat, "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")
    # And back: what we write is the same folder.
    again = type(teacher).from_pretrained(teacher.save_pretrained(tmp_path / "ours"))
    written = json.loads((tmp_path / "ours" / "cfg.json").read_text())
    assert {name: written[name] for name in ("architecture", "d_out")} == {"architecture": architecture, "d_out": d_out}
    check(again, z, y_hat, "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")
    check(load_teacher(tmp_path / "ours"), z, y_hat, "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")
    (tmp_path / "cfg.json").write_text(json.dumps({**config, "normalize_activations": "layer_norm"}))
    with pytest.raises(FormatError, match="normalize_activations"):
        load_teacher(tmp_path)


def test_gpt2s_attention_saes(tmp_path):
    W_enc, b_enc, W_dec, b_dec = draw(D_IN, D_SAE), draw(D_SAE), draw(D_SAE, D_IN), draw(D_IN)
    name = "gpt2-small_L5_Hcat_z_lr1.20e-03_v9"
    torch.save(torched(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec), tmp_path / f"{name}.pt")
    with pytest.raises(FormatError):
        load_teacher(tmp_path / f"{name}.pt")  # the configuration beside it is missing
    config = {"act_size": D_IN, "dict_size": D_SAE, "act_name": "blocks.5.attn.hook_z"}
    (tmp_path / f"{name}_cfg.json").write_text(json.dumps(config))
    teacher = load_teacher(tmp_path / f"{name}.pt")
    z = relu((X - b_dec) @ W_enc + b_enc)
    np.testing.assert_allclose(teacher.encode(torch.from_numpy(X)).detach(), z, atol=1e-5)
    np.testing.assert_allclose(teacher(torch.from_numpy(X)).detach(), z @ W_dec + b_dec, atol=1e-4)
    assert (teacher.metadata["hook_name"], teacher.metadata["model_name"]) == ("blocks.5.attn.hook_z", "gpt2")
    assert teacher.config()["reshape_activations"] == "hook_z"


def test_qresearchs_sae_of_deepseek(tmp_path):
    E, b_e, D, b_d = draw(D_SAE, D_IN), draw(D_SAE), draw(D_IN, D_SAE), draw(D_IN)
    weights = {"encoder.weight": E, "encoder.bias": b_e, "decoder.weight": D, "decoder.bias": b_d}
    torch.save(torched(**weights), tmp_path / "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt")
    teacher = load_teacher(tmp_path)
    assert type(teacher) is ReluSAE
    z = relu(X @ E.T + b_e)
    np.testing.assert_allclose(teacher.encode(torch.from_numpy(X)).detach(), z, atol=1e-5)
    np.testing.assert_allclose(teacher(torch.from_numpy(X)).detach(), z @ D.T + b_d, atol=1e-4)
    assert teacher.metadata["model_name"] == "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    assert teacher.metadata["hook_name"] == "blocks.19.hook_resid_post"


def clt(folder):
    save_file(
        torched(W_enc_0=draw(D_SAE, D_IN), b_enc_0=draw(D_SAE), b_dec_0=draw(D_IN)), folder / "W_enc_0.safetensors"
    )
    save_file(torched(W_dec_0=draw(D_SAE, 3, D_IN)), folder / "W_dec_0.safetensors")


def gemma_clt(folder):
    arrays = torched(w_enc=draw(D_IN, D_SAE), w_dec=draw(D_SAE, 3, D_IN), b_enc=draw(D_SAE), b_dec=draw(D_IN))
    save_file({**arrays, "threshold": torch.ones(D_SAE)}, folder / "params.safetensors")


def temporal(folder):
    (folder / "conf.yaml").write_text("llm: {dimin: 6}\n")
    save_file(torched(D=draw(D_SAE, D_IN), b=draw(D_IN)), folder / "latest_ckpt.safetensors")


def crosscoder(folder):
    torch.save(torched(W=draw(2, D_IN, D_SAE)), folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "CrossCoder"}}))


@pytest.mark.parametrize(
    ("write", "name"),
    [(clt, "cross-layer"), (gemma_clt, "cross-layer"), (temporal, "temporal SAE"), (crosscoder, "crosscoder")],
)
def test_unsupported_transcoder_formats_are_refused_by_name(tmp_path, write, name):
    write(tmp_path)
    with pytest.raises(FormatError, match=name):
        load_teacher(tmp_path)


@pytest.mark.parametrize("architecture", ["temporal", "matching_pursuit", "abstopk", "rational_transcoder", "made_up"])
def test_saelens_architectures_that_are_no_teachers(tmp_path, architecture):
    save_file(torched(W_enc=draw(D_IN, D_SAE)), tmp_path / "sae_weights.safetensors")
    metadata = {"sae_lens_version": "6.54.12"}
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": architecture, "metadata": metadata}))
    with pytest.raises(FormatError, match=f"{architecture}'; ") as raised:
        load_teacher(tmp_path)
    if architecture == "rational_transcoder":
        assert "RationalTranscoder.from_pretrained" in str(raised.value)


def test_options_that_transcoders_do_not_have_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="b_dec"):
        ReluTranscoder(4, 8, apply_b_dec_to_input=True)
    with pytest.raises(ConfigError, match="normalise"):
        ReluTranscoder(4, 8, normalize_activations="layer_norm")
    with pytest.raises(ConfigError, match="rounds are for SAEs"):
        RationalTranscoder(4, 8, rounds=2)
    with pytest.raises(ConfigError, match="rounds are for SAEs"):
        ReluTranscoder(4, 8).with_rounds(2, torch.zeros(5, 4))
    with pytest.raises(ConfigError, match="two scales"):
        ReluTranscoder(4, 8).fold_activation_scale_(2.0)
    with pytest.raises(ConfigError, match=r"decode\(feature_acts, x\)"):
        ReluTranscoder(4, 8, skip=True).decode(torch.zeros(3, 8))
    assert isinstance(ReluTranscoder(4, 8), SparseAutoencoder)


@pytest.mark.parametrize("skip", [False, True])
def test_scales_are_folded_at_both_ends(skip):
    made = ReluTranscoder(D_IN, D_SAE, d_out=4, skip=skip, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made.b_enc.copy_(torch.from_numpy(draw(D_SAE)))
        if skip:
            made.W_skip.copy_(torch.from_numpy(draw(4, D_IN)))
    x = torch.from_numpy(X)
    z, y = made.encode(x * 2), made(x * 2) / 5
    made.fold_activation_scale_(2.0, 5.0)
    torch.testing.assert_close(made.encode(x), z)
    torch.testing.assert_close(made(x), y)
