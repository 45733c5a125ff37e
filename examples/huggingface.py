"""Generate with a Hugging Face model that has a Rational SAE in it: python examples/huggingface.py RSAE MODEL TEXT"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from rsae_triton import FusedRationalSAE
from rsae_triton.integrations import splice

rsae = FusedRationalSAE.from_pretrained(sys.argv[1])
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[2]), AutoTokenizer.from_pretrained(sys.argv[2])
prompt = tokenizer(sys.argv[3], return_tensors="pt")
with splice(model, rsae, norm_limit=None):  # a limit leaves attention sinks such as BOS as they are
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]))
