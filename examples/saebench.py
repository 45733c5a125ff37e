"""Evaluate a Rational SAE with SAEBench: python examples/saebench.py RSAE MODEL DATASET"""

import sys

from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.core.main import run_evals
from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
from sae_lens import ActivationsStore
from transformer_lens.model_bridge import TransformerBridge

from rsae_triton import FusedRationalSAE
from rsae_triton.integrations.saebench import SAEBenchSAE

path, name, dataset = sys.argv[1:]
model = TransformerBridge.boot_transformers(name, device="cpu")
ours = SAEBenchSAE(FusedRationalSAE.from_pretrained(path), model_name=name)
_, sae, _ = load_and_format_sae("mine", ours, "cpu")
store = ActivationsStore.from_sae(model, sae, dataset, context_size=32, store_batch_size_prompts=4)
batches = {"n_eval_reconstruction_batches": 2, "n_eval_sparsity_variance_batches": 4}
kinds = {"compute_ce_loss": True, "compute_sparsity_metrics": True, "compute_variance_metrics": True}
metrics, _ = run_evals(sae, store, model, CoreEvalConfig(model_name=name, batch_size_prompts=4, **batches, **kinds))
print(metrics["sparsity"], metrics["model_performance_preservation"])
