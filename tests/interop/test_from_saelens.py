"""Checkpoints that SAELens wrote itself: our codes and reconstructions are those of its own forward."""

import copy
import json

import pytest
import torch

pytest.importorskip("sae_lens", reason="sae-lens is not installed: make test-interop")
import sae_lens
from sae_lens import SAE, TrainingSAE
from safetensors.torch import load_file, save_file

from rsae_triton.common.errors import FormatError
from rsae_triton.teachers import JumpReluSAE, ReluSAE, TopKSAE, load_teacher

D_IN, D_SAE, K = 12, 40, 5
CONFIGS = {
    "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig, {}),
    "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig, {}),
    "gated": (sae_lens.GatedSAE, sae_lens.GatedSAEConfig, {}),
    "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig, {"k": K}),
    "topk rescaled": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig, {"k": K, "rescale_acts_by_decoder_norm": True}),
}


def randomise(sae):
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.normal_(0, 0.4)
            if name == "threshold":
                parameter.abs_()
    return sae


def make(kind, **options):
    cls, config, own = CONFIGS[kind]
    return randomise(cls(config(d_in=D_IN, d_sae=D_SAE, **own, **options)))


def agree(sae, teacher, x, tolerance=1e-5):
    with torch.no_grad():
        z = sae.encode(x)
        x_hat = sae.decode(z.clone())  # its run-time normalisation hangs on the last encode
        forward = sae(x)
        assert (z != 0).any()
        assert torch.allclose(teacher.encode(x), z, atol=tolerance)
        assert torch.allclose(teacher.decode(z, x), x_hat, atol=tolerance)
        assert torch.allclose(teacher(x), forward, atol=tolerance)


@pytest.fixture
def x():
    return torch.randn(64, D_IN) + 0.5


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("normalize_activations", ["none", "layer_norm", "constant_norm_rescale"])
def test_inference_saes(tmp_path, x, kind, apply_b_dec_to_input, normalize_activations):
    sae = make(kind, apply_b_dec_to_input=apply_b_dec_to_input, normalize_activations=normalize_activations)
    sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = "blocks.3.hook_resid_post", "gpt2-small"
    sae.save_model(tmp_path)
    agree(SAE.load_from_disk(tmp_path), load_teacher(tmp_path), x)
    teacher = load_teacher(tmp_path)
    expected = {"standard": ReluSAE, "jumprelu": JumpReluSAE, "gated": JumpReluSAE}.get(kind, TopKSAE)
    assert type(teacher) is expected
    assert teacher.metadata["hook_name"] == "blocks.3.hook_resid_post"
    assert teacher.metadata["model_name"] == "gpt2-small"
    assert teacher.metadata["loaded_from"]["format"] == "saelens"


@pytest.mark.parametrize("rescaled", [True, False])
def test_batchtopk_training_checkpoint_is_the_jumprelu_that_saelens_makes_of_it(tmp_path, x, rescaled):
    config = sae_lens.BatchTopKTrainingSAEConfig(
        d_in=D_IN, d_sae=D_SAE, k=K, rescale_acts_by_decoder_norm=rescaled, decoder_init_norm=0.7
    )
    sae = randomise(sae_lens.BatchTopKTrainingSAE(config))
    sae.topk_threshold.fill_(0.6)
    sae.save_model(tmp_path / "training")
    sae.save_inference_model(tmp_path / "inference")
    reference = SAE.load_from_disk(tmp_path / "inference")
    assert type(reference).__name__ == "JumpReLUSAE"
    agree(reference, load_teacher(tmp_path / "inference"), x)
    agree(reference, load_teacher(tmp_path / "training"), x)


@pytest.mark.parametrize("kind", ["Standard", "Gated", "JumpReLU", "TopK", "MatryoshkaBatchTopK"])
def test_training_checkpoints(tmp_path, x, kind):
    own = {"TopK": {"k": K}, "MatryoshkaBatchTopK": {"k": K, "matryoshka_widths": [10, D_SAE]}}.get(kind, {})
    config = getattr(sae_lens, f"{kind}TrainingSAEConfig")(d_in=D_IN, d_sae=D_SAE, **own)
    sae = randomise(getattr(sae_lens, f"{kind}TrainingSAE")(config))
    if kind == "MatryoshkaBatchTopK":
        sae.topk_threshold.fill_(0.4)
    sae.save_model(tmp_path / "training")
    copy.deepcopy(sae).save_inference_model(tmp_path / "inference")
    agree(SAE.load_from_disk(tmp_path / "inference"), load_teacher(tmp_path / "training"), x)


def test_whitening_and_scale_of_an_unfinished_training_run_are_folded(tmp_path, x):
    from sae_lens.training.activation_scaler import ActivationScaler

    for mode in ("expected_average_only_in", "covariance_whitening"):
        for apply_b_dec_to_input in (True, False):
            folder = tmp_path / f"{mode}-{apply_b_dec_to_input}"
            sae = make("jumprelu", normalize_activations=mode, apply_b_dec_to_input=apply_b_dec_to_input)
            sae.save_model(folder)
            scaler, batches = ActivationScaler(), iter(lambda: torch.randn(256, D_IN) * 3 + 1, None)
            if mode == "covariance_whitening":
                scaler.estimate_whitening(D_IN, batches, 4)
            else:
                scaler.estimate_scaling_factor(D_IN, batches, 4)
            scaler.save(str(folder / "activation_scaler.json"))
            raw = 3 * x + 1
            teacher = load_teacher(folder)
            with torch.no_grad():
                z = sae.encode(scaler.scale(raw))
                assert torch.allclose(teacher.encode(raw), z, atol=1e-5)
                assert torch.allclose(teacher(raw), scaler.unscale(sae.decode(z)), atol=1e-5)


def test_a_scale_that_is_nowhere_is_refused_or_given(tmp_path, x):
    sae = make("standard", normalize_activations="expected_average_only_in")
    sae.save_model(tmp_path)
    with pytest.raises(FormatError, match="activation_scale"):
        load_teacher(tmp_path)
    teacher = load_teacher(tmp_path, activation_scale=0.25)
    folded = copy.deepcopy(sae)
    folded.fold_activation_norm_scaling_factor(0.25)
    agree(folded, teacher, x)


def test_the_dtype_is_that_of_saelens(tmp_path):
    sae = make("jumprelu")
    sae.save_model(tmp_path)
    teacher = load_teacher(tmp_path)
    assert teacher.W_enc.dtype == torch.float32
    make("jumprelu", dtype="bfloat16").save_model(tmp_path / "low")
    low, reference = load_teacher(tmp_path / "low"), SAE.load_from_disk(tmp_path / "low")
    assert low.W_enc.dtype == torch.bfloat16
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(low, name), getattr(reference, name))
    assert torch.equal(low.threshold.bfloat16(), reference.threshold)


# -- before version 6


def old_folder(path, sae, **fields):
    """The flat configuration of SAELens 5 around the weights of `sae`."""
    sae.save_model(path)
    config = {
        "architecture": sae.cfg.architecture(),
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "torch.float32",
        "device": "cpu",
        "activation_fn_str": "relu",
        "apply_b_dec_to_input": sae.cfg.apply_b_dec_to_input,
        "finetuning_scaling_factor": False,
        "hook_name": "blocks.8.hook_resid_pre",
        "hook_layer": 8,
        "model_name": "gpt2-small",
        "context_size": 128,
        "normalize_activations": "none",
        "sae_lens_training_version": "3.1.0",
        **fields,
    }
    (path / "cfg.json").write_text(json.dumps({name: one for name, one in config.items() if one != "absent"}))
    return path


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("standard", {}),
        ("standard", {"architecture": "absent", "normalize_activations": False, "activation_fn_str": "absent"}),
        ("standard", {"hook_name": "absent", "hook_point": "blocks.8.hook_resid_pre"}),
        ("gated", {}),
        ("jumprelu", {}),
        ("topk", {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}),
        ("standard", {"normalize_activations": "layer_norm"}),
    ],
)
def test_saelens_configurations_before_version_6_are_read(tmp_path, x, kind, fields):
    old_folder(tmp_path, make(kind), **fields)
    teacher = load_teacher(tmp_path)
    agree(SAE.load_from_disk(tmp_path), teacher, x)
    assert teacher.metadata["hook_name"] == "blocks.8.hook_resid_pre"
    assert teacher.metadata["model_name"] == "gpt2-small"


def test_log_threshold_of_old_training_checkpoints(tmp_path, x):
    config = sae_lens.JumpReLUTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE)
    sae = randomise(sae_lens.JumpReLUTrainingSAE(config))
    with torch.no_grad():
        sae.threshold.abs_()
    sae.save_model(tmp_path)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    weights["log_threshold"] = weights.pop("threshold").log()
    save_file(weights, tmp_path / "sae_weights.safetensors")
    agree(TrainingSAE.load_from_disk(tmp_path), load_teacher(tmp_path), x)
