"""Formats whose library is not run: the documented encode rule, written out here in numpy, and cases done by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from encode_rules import D_IN, D_SAE, K, check, draw, topk
from safetensors.torch import save_file

from rsae_triton.common.errors import FormatError
from rsae_triton.teachers import FORMATS, JumpReluSAE, ReluSAE, TopKSAE, load_teacher


@pytest.fixture
def x():
    return draw(50, D_IN) * 2 + 0.5


def hand(teacher, x, z, x_hat):
    """One token, computed with pencil."""
    x = torch.tensor([x], dtype=torch.float32)
    assert teacher.encode(x).tolist() == [z]
    assert teacher(x).tolist() == [x_hat]


def test_the_page_has_a_row_for_every_format():
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    for name in FORMATS:
        assert any(f"`{name}`" in row for row in rows), name


# -- Gemma Scope


def jumprelu(x, W_enc, W_dec, b_enc, b_dec, threshold):
    h = x @ W_enc + b_enc
    z = (h > threshold) * np.maximum(h, 0)
    return z, z @ W_dec + b_dec


def gemma(second=False):
    names = ("w_enc", "w_dec") if second else ("W_enc", "W_dec")
    values = (draw(D_IN, D_SAE), draw(D_SAE, D_IN), draw(D_SAE), draw(D_IN), np.abs(draw(D_SAE)))
    return dict(zip((*names, "b_enc", "b_dec", "threshold"), values, strict=True))


def test_gemma_scope(tmp_path, x):
    params = gemma()
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **params)
    teacher = load_teacher(folder)
    assert isinstance(teacher, JumpReluSAE)
    check(teacher, x, *jumprelu(x, *params.values()))
    assert teacher.metadata["hook_name"] == "blocks.20.hook_resid_post"
    assert teacher.metadata["model_name"] == "google/gemma-2-2b"
    check(load_teacher(folder / "params.npz"), x, *jumprelu(x, *params.values()))


def test_gemma_scope_by_hand(tmp_path):
    """h = [1*1 + 2*0 + 0, 0 + 2 + 1, 1 - 2 + 0.5] = [1, 3, -0.5]; thresholds [1, 2, 0]: strictly above, so only 3."""
    np.savez(
        tmp_path / "params.npz",
        W_enc=np.array([[1, 0, 1], [0, 1, -1]], np.float32),
        W_dec=np.array([[1, 1], [2, -1], [5, 5]], np.float32),
        b_enc=np.array([0, 1, 0.5], np.float32),
        b_dec=np.array([10, 20], np.float32),
        threshold=np.array([1, 2, 0], np.float32),
    )
    hand(load_teacher(tmp_path, kind="sae"), [1, 2], [0, 3, 0], [16, 17])


def test_gemma_scope_2(tmp_path, x):
    params = gemma(second=True)
    save_file({name: torch.from_numpy(one) for name, one in params.items()}, tmp_path / "params.safetensors")
    config = {
        "architecture": "jump_relu",
        "model_name": "google/gemma-3-1b-pt",
        "hf_hook_point_in": "model.layers.13.self_attn.o_proj.input",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    teacher = load_teacher(tmp_path)
    check(teacher, x, *jumprelu(x, *params.values()))
    assert teacher.metadata["hook_name"] == "blocks.13.attn.hook_z"
    assert teacher.metadata["model_name"] == "google/gemma-3-1b-pt"
    assert teacher.config()["reshape_activations"] == "hook_z"


# -- OpenAI


def openai(activation="TopK", **state):
    weights = {
        "pre_bias": draw(D_IN),
        "encoder.weight": draw(D_SAE, D_IN),
        "latent_bias": draw(D_SAE),
        "decoder.weight": draw(D_IN, D_SAE),
    }
    tensors = {name: torch.from_numpy(one) for name, one in weights.items()}
    tensors["stats_last_nonzero"] = torch.zeros(D_SAE, dtype=torch.long)
    saved = {**tensors, "activation": activation, "activation_state_dict": state}
    return weights, saved


def openai_rule(x, w, normalize, activation):
    mean = x.mean(1, keepdims=True) if normalize else 0
    std = x.std(1, ddof=1, keepdims=True) if normalize else 1  # torch's std: unbiased
    inputs = (x - mean) / (std + 1e-5) if normalize else x
    z = activation((inputs - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"])
    return z, (z @ w["decoder.weight"].T + w["pre_bias"]) * std + mean


def test_openai_topk_normalises_its_input(tmp_path, x):
    w, saved = openai(k=K, postact_fn="ReLU")
    path = tmp_path / "gpt2-small" / "resid_post_mlp_v5_32k" / "autoencoders" / "8.pt"
    path.parent.mkdir(parents=True)
    torch.save(saved, path)
    teacher = load_teacher(path)
    assert isinstance(teacher, TopKSAE)
    check(teacher, x, *openai_rule(x, w, True, lambda h: np.maximum(topk(h, K), 0)))
    assert teacher.normalize_activations == "layer_norm"
    assert teacher.metadata["hook_name"] == "blocks.8.hook_resid_post"
    assert teacher.metadata["model_name"] == "gpt2"


def test_openai_identity_after_topk_keeps_negative_values(tmp_path, x):
    w, saved = openai(k=D_SAE - 2, postact_fn="Identity")
    torch.save(saved, tmp_path / "0.pt")
    z, x_hat = openai_rule(x, w, True, lambda h: topk(h, D_SAE - 2))
    assert (z < 0).any()
    check(load_teacher(tmp_path), x, z, x_hat)


def test_openai_relu_models_do_not_normalise_their_input(tmp_path, x):
    w, saved = openai("ReLU")
    torch.save(saved, tmp_path / "3.pt")
    teacher = load_teacher(tmp_path / "3.pt")
    assert isinstance(teacher, ReluSAE)
    check(teacher, x, *openai_rule(x, w, False, lambda h: np.maximum(h, 0)))


def test_openai_by_hand(tmp_path):
    """x = [1, 3]: mean 2, unbiased std sqrt(2); normalised +-1/sqrt(2) (epsilon aside). k=1 keeps the second."""
    saved = {
        "pre_bias": torch.tensor([0.0, 0.0]),
        "encoder.weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        "latent_bias": torch.zeros(2),
        "decoder.weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        "activation": "TopK",
        "activation_state_dict": {"k": 1, "postact_fn": "ReLU"},
    }
    torch.save(saved, tmp_path / "0.pt")
    teacher = load_teacher(tmp_path)
    x = torch.tensor([[1.0, 3.0]])
    assert torch.allclose(teacher.encode(x), torch.tensor([[0.0, 0.5**0.5]]), atol=1e-5)
    assert torch.allclose(teacher(x), torch.tensor([[2.0, 3.0]]), atol=1e-4)


# -- Llama Scope


def llama_rule(x, w, threshold, scale, decoder_norm=True, bias_first=False):
    inputs = x * scale - (w["b_D"] if bias_first else 0)
    h = inputs @ w["W_E"] + w["b_E"]
    score = h * np.linalg.norm(w["W_D"], axis=1) if decoder_norm else h
    z = h * (score > threshold)
    return z, (z @ w["W_D"] + w["b_D"]) / scale


def llama_weights():
    return {"W_E": draw(D_IN, D_SAE), "b_E": draw(D_SAE), "W_D": draw(D_SAE, D_IN), "b_D": draw(D_IN)}


@pytest.mark.parametrize("decoder_norm", [True, False])
@pytest.mark.parametrize("bias_first", [True, False])
def test_llama_scope_of_the_first_release(tmp_path, x, decoder_norm, bias_first):
    w, norm = llama_weights(), 9.5
    folder = tmp_path / "Llama3_1-8B-Base-L15R-8x"
    (folder / "checkpoints").mkdir(parents=True)
    names = {"encoder.weight": w["W_E"].T, "encoder.bias": w["b_E"], "decoder.weight": w["W_D"].T}
    tensors = {name: torch.from_numpy(one.copy()) for name, one in {**names, "decoder.bias": w["b_D"]}.items()}
    save_file(tensors, folder / "checkpoints" / "final.safetensors")
    hyperparams = {
        "d_model": D_IN,
        "d_sae": D_SAE,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.4,
        "top_k": 50,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": bias_first,
        "sparsity_include_decoder_norm": decoder_norm,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": norm, "out": norm},
        "hook_point_in": "blocks.15.hook_resid_post",
        "hook_point_out": "blocks.15.hook_resid_post",
    }
    (folder / "hyperparams.json").write_text(json.dumps(hyperparams))
    teacher = load_teacher(folder)
    assert isinstance(teacher, JumpReluSAE)
    check(teacher, x, *llama_rule(x, w, 0.4, D_IN**0.5 / norm, decoder_norm, bias_first))
    assert teacher.metadata["hook_name"] == "blocks.15.hook_resid_post"
    assert teacher.metadata["model_name"] == "meta-llama/Llama-3.1-8B"


def llama_folder(folder, w, log_threshold=None, **fields):
    tensors = {name: torch.from_numpy(one) for name, one in w.items()}
    if log_threshold is not None:
        tensors["activation_function.log_jumprelu_threshold"] = torch.from_numpy(log_threshold)
    norm = fields.pop("norm", None)
    if norm is not None:
        tensors["dataset_average_activation_norm.blocks.3.hook_resid_post"] = torch.tensor(norm)
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {
        "sae_type": "sae",
        "d_model": D_IN,
        "expansion_factor": D_SAE / D_IN,
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "hook_point_in": "blocks.3.hook_resid_post",
        "hook_point_out": "blocks.3.hook_resid_post",
        **fields,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_llamascopium_jumprelu(tmp_path, x):
    w, log_threshold = llama_weights(), draw(D_SAE) - 1
    llama_folder(tmp_path, w, log_threshold, norm=7.0)
    check(load_teacher(tmp_path), x, *llama_rule(x, w, np.exp(log_threshold), D_IN**0.5 / 7))


def test_llamascopium_inference_mode_and_relu(tmp_path, x):
    w = llama_weights()
    llama_folder(tmp_path, w, act_fn="relu", norm_activation="inference")
    check(load_teacher(tmp_path), x, *llama_rule(x, w, 0.0, 1.0))


def test_llamascopium_token_wise(tmp_path, x):
    w, log_threshold = llama_weights(), draw(D_SAE) - 1
    llama_folder(tmp_path, w, log_threshold, norm_activation="token-wise")
    scale = D_IN**0.5 / np.linalg.norm(x, axis=1, keepdims=True)
    check(load_teacher(tmp_path), x, *llama_rule(x, w, np.exp(log_threshold), scale))


def test_llamascopium_topk_ranks_by_decoder_norm_and_measures_codes_in_it(tmp_path, x):
    w = llama_weights()
    llama_folder(tmp_path, w, act_fn="topk", top_k=K, norm=7.0)
    norm = np.linalg.norm(w["W_D"], axis=1)
    score = (x * D_IN**0.5 / 7 @ w["W_E"] + w["b_E"]) * norm
    z = np.maximum(topk(score, K), 0)
    check(load_teacher(tmp_path), x, z, (z / norm @ w["W_D"] + w["b_D"]) * 7 / D_IN**0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"act_fn": "batchtopk"}, "whole batch"),
        ({"norm_activation": "batch-wise"}, "batch"),
        ({"use_glu_encoder": True}, "use_glu_encoder"),
        ({"sae_type": "clt"}, "clt"),
        ({}, "activation_scale"),  # dataset-wise, and no norm anywhere
    ],
)
def test_llamascopium_refusals(tmp_path, fields, message):
    llama_folder(tmp_path, llama_weights(), draw(D_SAE), **fields)
    with pytest.raises(FormatError, match=message):
        load_teacher(tmp_path)


# -- Qwen Scope and Goodfire


def test_qwen_scope(tmp_path, x):
    w = {"W_enc": draw(D_SAE, D_IN), "W_dec": draw(D_IN, D_SAE), "b_enc": draw(D_SAE), "b_dec": draw(D_IN)}
    folder = tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_4"
    folder.mkdir()
    torch.save({name: torch.from_numpy(one) for name, one in w.items()}, folder / "layer5.sae.pt")
    teacher = load_teacher(folder / "layer5.sae.pt")
    z = topk(x @ w["W_enc"].T + w["b_enc"], 4)
    check(teacher, x, z, z @ w["W_dec"].T + w["b_dec"])
    assert teacher.metadata["hook_name"] == "blocks.5.hook_resid_post"
    assert teacher.metadata["model_name"] == "Qwen/Qwen3-1.7B-Base"


def test_qwen_scope_elsewhere_needs_k(tmp_path, x):
    w = {"W_enc": draw(D_SAE, D_IN), "W_dec": draw(D_IN, D_SAE), "b_enc": draw(D_SAE), "b_dec": draw(D_IN)}
    torch.save({name: torch.from_numpy(one) for name, one in w.items()}, tmp_path / "layer5.sae.pt")
    with pytest.raises(FormatError, match="pass k="):
        load_teacher(tmp_path)
    assert load_teacher(tmp_path, k=3).k == 3


def test_goodfire(tmp_path, x):
    w = {
        "encoder_linear.weight": draw(D_SAE, D_IN),
        "encoder_linear.bias": draw(D_SAE),
        "decoder_linear.weight": draw(D_IN, D_SAE),
        "decoder_linear.bias": draw(D_IN),
    }
    path = tmp_path / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    torch.save({name: torch.from_numpy(one) for name, one in w.items()}, path)
    teacher = load_teacher(path)
    z = np.maximum(x @ w["encoder_linear.weight"].T + w["encoder_linear.bias"], 0)
    check(teacher, x, z, z @ w["decoder_linear.weight"].T + w["decoder_linear.bias"])
    assert teacher.metadata["hook_name"] == "blocks.19.hook_resid_post"
    assert teacher.metadata["model_name"] == "meta-llama/Llama-3.1-8B-Instruct"


@torch.no_grad()
def test_layer_normed_teacher_can_be_upgraded(tmp_path):
    """The run-time normalisation goes along: what is upgraded reads raw activations too."""
    from rsae_triton import FusedRationalSAE, upgrade

    teacher = TopKSAE(16, 64, k=6, normalize_activations="layer_norm", generator=torch.Generator().manual_seed(0))
    x = torch.randn(2000, 16, generator=torch.Generator().manual_seed(1)) * 7 + 3
    rsae = upgrade(teacher, x, rounds=1)
    assert rsae.normalize_activations == "layer_norm"
    kept = rsae.encode(x)
    wanted = teacher.hidden_pre(x)
    wanted = wanted * (wanted > rsae.gate.threshold)
    assert float((kept - wanted).norm() / wanted.norm()) < 0.01
    # What a layer norm does not see (but for a code or two at its threshold).
    assert float((rsae.encode(5 * x - 2) - kept).norm() / kept.norm()) < 1e-3
    assert float((rsae(5 * x - 2) - (5 * rsae(x) - 2)).norm() / (5 * x).norm()) < 1e-3
    rsae.save_pretrained(tmp_path)
    again = FusedRationalSAE.from_pretrained(tmp_path)
    assert torch.equal(again(x), rsae(x))
    with pytest.raises(ValueError, match="normalises every token"):
        again.decode(kept)
