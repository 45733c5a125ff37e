"""rsae_triton: upgrade a pretrained sparse autoencoder into a Rational SAE, with fused Triton kernels."""

# Imported at once, not on first use: `train`, `upgrade` and `evaluate` are called like the modules they live in,
# and a module imported later would take the function's place.
from rsae_triton.activations import load_host
from rsae_triton.evaluation import evaluate
from rsae_triton.remez import GateFit, fit_gate
from rsae_triton.sae.gate import RationalGate
from rsae_triton.sae.rational import FusedRationalSAE
from rsae_triton.sae.sparse import SparseCode, decode_sparse, encode_sparse
from rsae_triton.sae.topk_rational import TopKRationalSAE
from rsae_triton.teachers import load_teacher
from rsae_triton.training.loop import train
from rsae_triton.upgrading.stage_one import upgrade

__version__ = "0.1.0"

__all__ = [
    "FusedRationalSAE",
    "GateFit",
    "RationalGate",
    "SparseCode",
    "TopKRationalSAE",
    "decode_sparse",
    "encode_sparse",
    "evaluate",
    "fit_gate",
    "load_host",
    "load_teacher",
    "train",
    "upgrade",
]
