"""rsae_triton: upgrade a pretrained sparse autoencoder into a Rational SAE, with fused Triton kernels."""

# Imported at once, not on first use: `train`, `upgrade` and `evaluate` are called like the modules they live in,
# and a module imported later would take the function's place.
from .activations import load_host
from .evaluate import evaluate
from .gate import RationalGate
from .remez import GateFit, fit_gate
from .sae import FusedRationalSAE
from .sparse import SparseCode, decode_sparse, encode_sparse
from .teachers import load_teacher
from .topk_rational import TopKRationalSAE
from .train import train
from .upgrade import upgrade

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
