"""SAELens' files by its documented rules, written out here in numpy: what needs no SAELens (tests/interop runs it)."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rsae_triton.common.errors import FormatError
from rsae_triton.teachers import load_teacher

D_IN, D_SAE, K = 6, 20, 4
RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(0, 0.6, shape).astype(np.float32)


def relu(h):
    return np.maximum(h, 0)


def topk(h):
    return np.where(h >= np.sort(h, axis=1)[:, -K][:, None], relu(h), 0)


X = draw(50, D_IN) * 2 + 0.5
W = {"W_enc": draw(D_IN, D_SAE), "W_dec": draw(D_SAE, D_IN), "b_dec": draw(D_IN), "b_enc": draw(D_SAE)}
THRESHOLD, NORM = np.abs(draw(D_SAE)), np.linalg.norm(W["W_dec"], axis=1)
R_MAG, B_GATE, B_MAG, SCALING = draw(D_SAE), draw(D_SAE), draw(D_SAE), 1 + 0.2 * draw(D_SAE)
MATRIX, MEAN = draw(D_IN, D_IN) + 2 * np.eye(D_IN, dtype=np.float32), draw(D_IN)
INVERSE = np.linalg.inv(MATRIX)


def hidden_pre(x, subtracted=True):
    return (x - W["b_dec"] * subtracted) @ W["W_enc"] + W["b_enc"]


def write(folder, config, **tensors):
    config = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "normalize_activations": "none", **config}
    config.setdefault("metadata", {"sae_lens_version": "6.54.0"})
    (folder / "cfg.json").write_text(json.dumps({**config, "apply_b_dec_to_input": config.get("apply", True)}))
    tensors = {name: one for name, one in {**W, **tensors}.items() if one is not None}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(one, dtype=np.float32)) for name, one in tensors.items()}
    save_file(tensors, folder / "sae_weights.safetensors")


def holds(teacher, z, x_hat, x=X):
    with torch.no_grad():
        assert (z != 0).any()
        assert (z == 0).any()
        np.testing.assert_allclose(teacher.encode(torch.from_numpy(x)).numpy(), z, atol=3e-5)
        np.testing.assert_allclose(teacher(torch.from_numpy(x)).numpy(), x_hat, atol=1e-4)


def decoded(z):
    return z @ W["W_dec"] + W["b_dec"]


@pytest.mark.parametrize("subtracted", [True, False])
def test_architectures(tmp_path, subtracted):
    h = hidden_pre(X, subtracted)
    cases = {
        "standard": ({}, {}, relu(h)),
        "jumprelu": ({}, {"threshold": THRESHOLD}, np.where(h > THRESHOLD, h, 0)),
        "topk": ({"k": K}, {}, topk(h)),
        "batchtopk": ({"k": K}, {"topk_threshold": np.float32(0.4)}, np.where(h > 0.4, h, 0)),
    }
    for name, (fields, tensors, z) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        write(folder, {"architecture": name, "apply": subtracted, **fields}, **tensors)
        holds(load_teacher(folder), z, decoded(z))


def test_a_gated_sae_is_read_as_the_equivalent_jumprelu(tmp_path):
    v = (X - W["b_dec"]) @ W["W_enc"]
    write(tmp_path, {"architecture": "gated"}, b_enc=None, r_mag=R_MAG, b_gate=B_GATE, b_mag=B_MAG)
    z = (v + B_GATE > 0) * relu(np.exp(R_MAG) * v + B_MAG)
    holds(load_teacher(tmp_path), z, decoded(z))
    write(tmp_path, {"architecture": "gated"}, b_enc=None, r_mag=R_MAG[:3], b_gate=B_GATE, b_mag=B_MAG)
    with pytest.raises(FormatError, match="r_mag has shape"):
        load_teacher(tmp_path)


def test_codes_in_units_of_the_decoder_norm(tmp_path):
    """rescale_acts_by_decoder_norm: h * norm is ranked or compared; the decoder divides by the norm again."""
    h = hidden_pre(X) * NORM
    for name, z, tensors in (
        ("topk", topk(h), {}),
        ("batchtopk", np.where(h > 0.4, h, 0), {"topk_threshold": np.float32(0.4)}),
    ):
        write(tmp_path, {"architecture": name, "k": K, "rescale_acts_by_decoder_norm": True}, **tensors)
        holds(load_teacher(tmp_path), z, decoded(z / NORM))


@pytest.mark.parametrize("subtracted", [True, False])
def test_normalisation_of_activations_is_followed(tmp_path, subtracted):
    def run(x):
        z = relu(hidden_pre(x, subtracted))
        return z, decoded(z)

    config = {"architecture": "standard", "apply": subtracted}
    write(
        tmp_path, {**config, "normalize_activations": "constant_scalar_rescale", "activation_normalization_factor": 3}
    )
    z, x_hat = run(X * 3)
    holds(load_teacher(tmp_path), z, x_hat / 3)

    write(tmp_path, {**config, "normalize_activations": "expected_average_only_in"})
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 0.25}')
    z, x_hat = run(X * 0.25)
    holds(load_teacher(tmp_path), z, x_hat / 0.25)
    z, x_hat = run(X * 2)
    holds(load_teacher(tmp_path, activation_scale=2.0), z, x_hat / 2)

    write(tmp_path, {**config, "normalize_activations": "constant_norm_rescale"})
    factor = np.sqrt(D_IN) / np.linalg.norm(X, axis=1, keepdims=True)
    z, x_hat = run(X * factor)
    holds(load_teacher(tmp_path), z, x_hat / factor)

    write(tmp_path, {**config, "normalize_activations": "covariance_whitening"})
    tensors = {"mean": MEAN, "matrix": MATRIX, "inverse_matrix": INVERSE}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(one, dtype=np.float32)) for name, one in tensors.items()}
    save_file(tensors, tmp_path / "activation_whitening.safetensors")
    z, x_hat = run((X - MEAN) @ MATRIX)
    holds(load_teacher(tmp_path), z, x_hat @ INVERSE + MEAN)


def test_a_finetuned_scaling_factor_is_folded_into_the_decoder(tmp_path):
    write(tmp_path, {"architecture": "standard", "finetuning_scaling_factor": True}, scaling_factor=SCALING)
    z = relu(hidden_pre(X))
    holds(load_teacher(tmp_path), z, decoded(z * SCALING))
    write(tmp_path, {"architecture": "standard"}, scaling_factor=np.ones(D_SAE))
    holds(load_teacher(tmp_path), z, decoded(z))


def test_files_of_before_version_6(tmp_path):
    old = {
        "metadata": None,
        "hook_point": "blocks.3.hook_resid_pre",
        "model_name": "gpt2",
        "normalize_activations": None,
    }
    write(tmp_path, {**old, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}})
    teacher = load_teacher(tmp_path)
    holds(teacher, topk(hidden_pre(X)), decoded(topk(hidden_pre(X))))
    assert teacher.metadata["hook_name"] == "blocks.3.hook_resid_pre"
    write(tmp_path, {**old, "architecture": "jumprelu"}, log_threshold=np.log(THRESHOLD))
    h = hidden_pre(X)
    z = np.where(h > THRESHOLD, h, 0)
    holds(load_teacher(tmp_path), z, decoded(z))


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({"architecture": "topk"}, {}, "TopK SAE without k"),
        ({"architecture": "rational"}, {}, "architecture 'rational'"),
        ({"architecture": "transformer"}, {}, "teachers are standard"),
        ({"architecture": "standard", "normalize_activations": "sideways"}, {}, "normalize_activations='sideways'"),
        ({"architecture": "standard", "normalize_activations": "constant_scalar_rescale"}, {}, "as activation_scale"),
        ({"architecture": "standard", "normalize_activations": "expected_average_only_in"}, {}, "as activation_scale="),
        ({"architecture": "standard", "normalize_activations": "covariance_whitening"}, {}, "is not beside it"),
        ({"architecture": "standard"}, {"scaling_factor": SCALING}, "finetuning_scaling_factor is off"),
        ({"metadata": None, "activation_fn_str": "gelu"}, {}, "activation_fn='gelu'"),
        (
            {"metadata": None, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K, "signed": True}},
            {},
            "by magnitude",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_saelens_settings_that_cannot_be_reproduced_are_refused(tmp_path, fields, tensors, message):
    write(tmp_path, fields, **tensors)
    with pytest.raises(FormatError, match=message):
        load_teacher(tmp_path, format="saelens")
