"""Rational SAEs in other people's tools.

`splice` runs a TransformerLens or Hugging Face model with an SAE in it. `saelens` registers with SAELens when it is
imported; `saebench` wraps an SAE for SAEBench.
"""

from rsae_triton.integrations.splicing import splice

__all__ = ["splice"]
