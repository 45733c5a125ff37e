"""Rational SAEs in other libraries.

`splice` runs a TransformerLens or Hugging Face model with an SAE in it. Importing `saelens` registers Rational SAEs
with SAELens; `saebench` wraps an SAE for SAEBench; `circuit_tracer` writes transcoders for circuit-tracer.
"""

from rsae_triton.integrations.splicing import splice

__all__ = ["splice"]
