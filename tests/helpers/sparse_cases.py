"""SAEs of every kind, tokens for them, and what every row of a sparse code keeps to."""

import pytest
import torch

from rsae_triton import FusedRationalSAE
from rsae_triton.ops import backends
from rsae_triton.teachers import JumpReluSAE, ReluSAE, TopKSAE

D_IN, D_SAE = 12, 70
KINDS = ("direct", "per feature", "gated", "identity", "relu", "jumprelu", "topk", "signed topk")


def make(kind, dtype=torch.float32, **options):
    """An SAE of few active features, with biases."""
    options = {"generator": torch.Generator().manual_seed(0), "dtype": dtype, **options}
    sizes = (D_IN, D_SAE)
    if kind == "relu":
        sae = ReluSAE(*sizes, **options)
    elif kind == "jumprelu":
        sae = JumpReluSAE(*sizes, threshold=0.9, **options)
    elif kind.endswith("topk"):
        sae = TopKSAE(*sizes, k=6, relu=kind == "topk", **options)
    else:
        form, groups = ("direct", D_SAE if kind == "per feature" else 1) if kind[0] in "dp" else ("gated", 1)
        amplitude = "identity" if kind == "identity" else "rational"
        sae = FusedRationalSAE(*sizes, form=form, groups=groups, amplitude=amplitude, **options)
        with torch.no_grad():
            sae.gate.threshold.fill_(0.9 if form == "gated" else 0.0)
            sae.gate.activity_threshold.fill_(0.9)
            sae.gate.alpha.mul_(torch.linspace(0.8, 1.2, groups)[:, None])
    with torch.no_grad():
        sae.b_enc.add_(torch.linspace(-0.3, 0.1, D_SAE))
        sae.b_dec.add_(torch.linspace(-0.2, 0.2, D_IN))
    return sae


def tokens(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, D_IN, generator=torch.Generator().manual_seed(seed)).to(dtype)


def on_kernels(sae):
    if not torch.cuda.is_available() and not backends.interpreting():
        pytest.skip("neither a GPU nor TRITON_INTERPRET=1")
    sae.backend = "triton"
    return sae.cuda() if torch.cuda.is_available() else sae


def assert_rows(code):
    used = torch.arange(code.values.shape[-1]) < code.counts[..., None]
    assert code.indices.dtype == code.counts.dtype == torch.int64
    assert ((code.values != 0) == used).all()
    assert (code.indices[~used] == 0).all()
    assert ((code.indices.diff(dim=-1) > 0) | ~used[..., 1:]).all()
