"""Load a Rational SAE in SAELens and run a model with it: python examples/saelens.py RSAE MODEL"""

import sys

import torch
from sae_lens import SAE, SAETransformerBridge

import rsae_triton.integrations.saelens  # noqa: F401  (registers the architecture "rational")

sae = SAE.load_from_disk(sys.argv[1])
model = SAETransformerBridge.boot_transformers(sys.argv[2], device="cpu")
tokens = torch.arange(12)[None]
with torch.no_grad():
    clean = model(tokens)
    logits, cache = model.run_with_cache_with_saes(tokens, saes=[sae], use_error_term=True)
codes = cache[model.get_sae_hook_name(sae)]
print(f"codes {tuple(codes.shape)}, l0 {float((codes != 0).sum(-1).float().mean()):.1f}")
print(f"changed by {float((logits - clean).abs().max()):.1e} with the error term")
