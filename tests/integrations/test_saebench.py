"""What SAEBench's `custom_saes/base_sae.py` asks of an SAE; tests/interop runs SAEBench itself."""

import pytest
import torch
from rational_cases import D_IN, D_SAE, FORMS, rsae

from rsae_triton.common.errors import ConfigError
from rsae_triton.integrations.saebench import SAEBenchSAE
from rsae_triton.sae.topk_rational import TopKRationalSAE
from rsae_triton.teachers import ReluSAE, TopKSAE


@pytest.fixture
def x():
    return torch.randn(4, 9, D_IN, generator=torch.Generator().manual_seed(0)) + 0.2


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_the_function_is_unchanged_and_decoder_rows_have_norm_1(form, x):
    sae = rsae(form)
    before = {name: one.clone() for name, one in sae.state_dict().items()}
    bench = SAEBenchSAE(sae)
    assert torch.allclose(bench.W_dec.norm(dim=1), torch.ones(D_SAE), atol=1e-5)
    assert bench.check_decoder_norms()
    norms = sae.W_dec.norm(dim=1)
    assert torch.allclose(bench.encode(x), sae.encode(x) * norms, rtol=1e-4, atol=1e-5)
    assert torch.equal(bench.encode(x) != 0, sae.encode(x) != 0)
    assert torch.allclose(bench(x), sae(x), rtol=1e-4, atol=1e-5)
    assert torch.allclose(bench(x.flatten(0, 1)).view_as(x), bench.decode(bench.encode(x)), atol=1e-6)
    assert all(torch.equal(one, before[name]) for name, one in sae.state_dict().items())


def test_attributes(x):
    bench = SAEBenchSAE(rsae())
    assert isinstance(bench, torch.nn.Module)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,)}
    for name, shape in shapes.items():
        assert isinstance(getattr(bench, name), torch.nn.Parameter)
        assert getattr(bench, name).shape == shape
    assert bench.device == torch.device("cpu")
    assert bench.dtype == torch.float32
    assert (bench.cfg.model_name, bench.cfg.hook_name, bench.cfg.hook_layer) == ("tiny", "blocks.1.hook_resid_post", 1)
    assert (bench.cfg.d_in, bench.cfg.d_sae, bench.cfg.dtype) == (D_IN, D_SAE, "float32")
    assert (bench.cfg.architecture, bench.cfg.context_size) == ("rational", 16)
    bench.cfg.dtype = "bfloat16"  # its scripts set fields
    assert bench.cfg.to_dict()["dtype"] == "bfloat16"


@torch.no_grad()
def test_to_moves_attributes_along(x):
    """Its evals call `.to()` like this; thresholds and coefficients stay in float32."""
    bench = SAEBenchSAE(rsae())
    assert bench.to(device="cpu", dtype=torch.bfloat16) is bench
    assert (bench.dtype, bench.W_enc.dtype, bench.cfg.dtype) == (torch.bfloat16, torch.bfloat16, "bfloat16")
    assert bench.sae.gate.threshold.dtype == torch.float32
    assert bench.encode(x.bfloat16()).dtype == torch.bfloat16
    assert bench.check_decoder_norms()


def test_without_metadata_model_and_hook_must_be_passed():
    sae = rsae()
    assert SAEBenchSAE(sae, "gpt2", "blocks.7.hook_mlp_out").cfg.hook_layer == 7
    sae.metadata.clear()
    with pytest.raises(ConfigError, match="pass both"):
        SAEBenchSAE(sae)
    with pytest.raises(ConfigError, match="pass both"):
        SAEBenchSAE(sae, "gpt2", "somewhere")
    with pytest.raises(ConfigError, match="layer_norm"):
        SAEBenchSAE(rsae(normalize_activations="layer_norm"))


def test_teachers_can_be_wrapped_for_saebench(x):
    teacher = ReluSAE(D_IN, D_SAE, metadata={"model_name": "tiny", "hook_name": "blocks.0.hook_resid_pre"})
    with torch.no_grad():
        teacher.W_dec.mul_(0.5 + torch.rand(D_SAE, 1))
        assert torch.allclose(SAEBenchSAE(teacher)(x), teacher(x), atol=1e-5)


def test_norms_that_decide_which_features_win_cannot_be_folded():
    for topk in (TopKSAE(D_IN, D_SAE, k=4), TopKRationalSAE(D_IN, D_SAE, k=4, gate=rsae().gate)):
        assert SAEBenchSAE(topk, "tiny", "blocks.0.hook_resid_pre").check_decoder_norms()
        with torch.no_grad():
            topk.W_dec.mul_(0.5 + torch.rand(D_SAE, 1))
        with pytest.raises(ConfigError, match=r"cannot be folded|which k are largest"):
            SAEBenchSAE(topk, "tiny", "blocks.0.hook_resid_pre")
