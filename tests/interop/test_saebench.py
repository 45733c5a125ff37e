"""SAEBench's own `core` evaluation of a Rational SAE."""

import pytest
import torch
from rational_cases import D_SAE, rsae

pytest.importorskip("sae_lens", reason="sae-lens is not installed: make test-interop")
pytest.importorskip("sae_bench", reason="sae-bench is not installed: make test-interop")
from sae_bench.custom_saes.base_sae import BaseSAE
from sae_bench.custom_saes.custom_sae_config import CustomSAEConfig
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.core.main import run_evals
from sae_bench.sae_bench_utils.general_utils import check_decoder_norms, load_and_format_sae

from rsae_triton.integrations import saelens
from rsae_triton.integrations.saebench import SAEBenchConfig, SAEBenchSAE


def test_our_wrapper_has_everything_of_saebenchs_base_class():
    class Empty(BaseSAE):
        encode = decode = forward = torch.nn.Identity.forward

    theirs = Empty(16, D_SAE, "tiny", 1, torch.device("cpu"), torch.float32)
    ours = SAEBenchSAE(rsae())
    own = set(dir(theirs)) - set(dir(torch.nn.Module())) - {"_abc_impl", "test_sae"}  # test_sae downloads a model
    assert {name for name in own if not name.startswith("__")} <= set(dir(ours))
    assert set(dir(CustomSAEConfig("m", 1, 1, 1, "h"))) <= set(dir(SAEBenchConfig("m", 1, 1, 1, "h")))


def test_saebenchs_core_evals_run(model, store, text):
    sae = rsae()
    _, bench, _ = load_and_format_sae("ours", SAEBenchSAE(sae), "cpu")
    assert check_decoder_norms(bench.W_dec.data)
    config = CoreEvalConfig(
        model_name="tiny",
        batch_size_prompts=8,
        n_eval_reconstruction_batches=2,
        n_eval_sparsity_variance_batches=8,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
    )
    metrics, features = run_evals(bench, store(saelens.to_saelens(sae)), model, config)
    _, cache = model.run_with_cache(torch.tensor(text()["tokens"][:]), names_filter="blocks.1.hook_resid_post")
    with torch.no_grad():
        x = cache["blocks.1.hook_resid_post"].flatten(0, 1)
        z = sae.encode(x)
        x_hat = sae.decode(z)
    assert metrics["sparsity"]["l0"] == pytest.approx(float((z != 0).float().sum(1).mean()), rel=1e-4)
    mse = float((x - x_hat).square().sum(1).mean())
    assert metrics["reconstruction_quality"]["mse"] * 8 * 16 == pytest.approx(mse, rel=1e-3)  # over tokens once more
    cosine = float(torch.cosine_similarity(x, x_hat).mean())
    assert metrics["reconstruction_quality"]["cossim"] == pytest.approx(cosine, rel=1e-3)
    assert metrics["model_performance_preservation"]["ce_loss_with_sae"] > 0
    assert len(features["feature_density"]) == D_SAE
