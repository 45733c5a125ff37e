"""Save the JumpReLU SAE nearest to a Rational one: python examples/dense_export.py RSAE MODEL TEXT OUT"""

import sys

import rsae_triton as rt
from rsae_triton.activations import extract, load_corpus

source, model, text, out = sys.argv[1:]
rsae = rt.FusedRationalSAE.from_pretrained(source)
host = rt.load_host(model, hook_name=rsae.metadata["hook_name"])
store = extract(host, load_corpus(text), n_tokens=10_000)
jumprelu, loss = rsae.to_jumprelu(store)
jumprelu.save_pretrained(out)  # any tool that reads SAELens' JumpReLU reads this
print(loss.summary)
