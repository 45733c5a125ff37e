"""Run a TransformerLens 3 or 4 model with a Rational SAE in it: python examples/transformer_lens.py RSAE MODEL"""

import sys

import torch
from transformer_lens.model_bridge import TransformerBridge

from rsae_triton import FusedRationalSAE
from rsae_triton.integrations import splice

rsae = FusedRationalSAE.from_pretrained(sys.argv[1])  # its metadata says where it goes
model = TransformerBridge.boot_transformers(sys.argv[2], device="cpu")
tokens = torch.arange(12)[None]
with torch.no_grad():
    clean = model(tokens, return_type="loss")
    with splice(model, rsae):
        spliced = model(tokens, return_type="loss")
print(f"loss {float(clean):.4f}, with the SAE {float(spliced):.4f}")
