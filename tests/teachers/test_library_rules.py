"""dictionary_learning's and sparsify's files by their documented rules, in numpy, for where neither is installed.

tests/interop runs the same against the libraries themselves.
"""

import json

import numpy as np
import pytest
import torch
from encode_rules import D_IN, D_SAE, K, check, draw, topk
from safetensors.torch import save_file

from rsae_triton.common.errors import FormatError
from rsae_triton.teachers import JumpReluSAE, load_teacher


@pytest.fixture
def x():
    return draw(50, D_IN) * 2 + 0.5


def dictionary(folder, kind, w, **buffers):
    tensors = {name: torch.from_numpy(one) for name, one in w.items()}
    torch.save({**tensors, **buffers}, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": kind, "layer": 2, "lm_name": "gpt2"}}))
    return load_teacher(folder)


def test_dictionary_learning_gated_is_a_jumprelu(tmp_path, x):
    names = {"decoder_bias": D_IN, "r_mag": D_SAE, "gate_bias": D_SAE, "mag_bias": D_SAE}
    w = {name: draw(size) for name, size in names.items()}
    w.update({"encoder.weight": draw(D_SAE, D_IN), "decoder.weight": draw(D_IN, D_SAE)})
    teacher = dictionary(tmp_path, "GatedAutoEncoder", w)
    assert isinstance(teacher, JumpReluSAE)
    v = (x - w["decoder_bias"]) @ w["encoder.weight"].T
    z = (v + w["gate_bias"] > 0) * np.maximum(np.exp(w["r_mag"]) * v + w["mag_bias"], 0)
    check(teacher, x, z, z @ w["decoder.weight"].T + w["decoder_bias"])


def test_dictionary_learning_autoencoder_has_unit_decoder_rows(tmp_path, x):
    w = {"bias": draw(D_IN), "encoder.bias": draw(D_SAE)}
    w.update({"encoder.weight": draw(D_SAE, D_IN), "decoder.weight": draw(D_IN, D_SAE)})
    teacher = dictionary(tmp_path, "AutoEncoder", w)
    norm = np.linalg.norm(w["decoder.weight"], axis=0)
    z = np.maximum((x - w["bias"]) @ w["encoder.weight"].T + w["encoder.bias"], 0)
    check(teacher, x, z * norm, z @ w["decoder.weight"].T + w["bias"])
    assert torch.allclose(teacher.W_dec.norm(dim=1), torch.ones(D_SAE), atol=1e-6)
    assert teacher.metadata["hook_name"] == "blocks.2.hook_resid_post"


def test_dictionary_learning_batchtopk_is_a_threshold(tmp_path, x):
    w = {"b_dec": draw(D_IN), "encoder.bias": draw(D_SAE)}
    w.update({"encoder.weight": draw(D_SAE, D_IN), "decoder.weight": draw(D_IN, D_SAE)})
    teacher = dictionary(tmp_path, "BatchTopKSAE", w, k=torch.tensor(K), threshold=torch.tensor(0.7))
    h = (x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]
    z = h * (h > 0.7)
    check(teacher, x, z, z @ w["decoder.weight"].T + w["b_dec"])


def test_dictionary_learning_matryoshka_is_a_threshold(tmp_path, x):
    w = {"W_enc": draw(D_IN, D_SAE), "b_enc": draw(D_SAE), "W_dec": draw(D_SAE, D_IN), "b_dec": draw(D_IN)}
    buffers = {"k": torch.tensor(K), "threshold": torch.tensor(0.7), "group_sizes": torch.tensor([5, 15])}
    teacher = dictionary(tmp_path, "MatryoshkaBatchTopKSAE", w, **buffers)
    h = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    check(teacher, x, h * (h > 0.7), h * (h > 0.7) @ w["W_dec"] + w["b_dec"])


def test_dictionary_learning_jumprelu_does_not_subtract_b_dec(tmp_path, x):
    w = {"W_enc": draw(D_IN, D_SAE), "b_enc": draw(D_SAE), "W_dec": draw(D_SAE, D_IN), "b_dec": draw(D_IN)}
    w["threshold"] = np.abs(draw(D_SAE))
    h = x @ w["W_enc"] + w["b_enc"]
    z = h * (h > w["threshold"])
    check(dictionary(tmp_path, "JumpReluAutoEncoder", w), x, z, z @ w["W_dec"] + w["b_dec"])


def test_dictionary_learning_new_has_a_bias_of_the_decoder(tmp_path, x):
    w = {"encoder.bias": draw(D_SAE), "decoder.bias": draw(D_IN)}
    w.update({"encoder.weight": draw(D_SAE, D_IN), "decoder.weight": draw(D_IN, D_SAE)})
    z = np.maximum(x @ w["encoder.weight"].T + w["encoder.bias"], 0)
    check(dictionary(tmp_path, "AutoEncoderNew", w), x, z, z @ w["decoder.weight"].T + w["decoder.bias"])


@pytest.mark.parametrize("size", [{"num_latents": D_SAE}, {"num_latents": 0, "expansion_factor": D_SAE / D_IN}])
def test_sparsify_always_subtracts_b_dec(tmp_path, x, size):
    w = {"encoder.weight": draw(D_SAE, D_IN), "encoder.bias": draw(D_SAE), "W_dec": draw(D_SAE, D_IN)}
    w["b_dec"] = draw(D_IN)
    save_file({name: torch.from_numpy(one) for name, one in w.items()}, tmp_path / "sae.safetensors")
    config = {"d_in": D_IN, "k": K, "normalize_decoder": True, **size}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    z = np.maximum(topk((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"], K), 0)
    check(load_teacher(tmp_path), x, z, z @ w["W_dec"] + w["b_dec"])
    (tmp_path / "cfg.json").write_text(json.dumps({**config, "num_latents": D_SAE + 1}))
    with pytest.raises(FormatError, match="do not belong together"):
        load_teacher(tmp_path)
