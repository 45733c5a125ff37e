"""rsae_triton: upgrade a pretrained sparse autoencoder into a Rational SAE, with fused Triton kernels.

Every public name is here; more is in `rsae_triton.activations`, `.teachers`, `.integrations.saelens` and `.kernels`.
"""

import rsae_triton.common.starting  # noqa: F401  (before torch)
from rsae_triton.activations import ActivationStore, extract, extract_splits, load_corpus, load_host
from rsae_triton.common.errors import RsaeError
from rsae_triton.evaluation import compare, dimension_weights, evaluate
from rsae_triton.features import feature, steer
from rsae_triton.integrations import splice
from rsae_triton.remez import GateFit, fit_gate
from rsae_triton.sae.architectures import JumpReluSAE, ReluSAE, TopKSAE
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.batch_topk import BatchTopKSAE
from rsae_triton.sae.gate import RationalGate
from rsae_triton.sae.rational import FusedRationalSAE
from rsae_triton.sae.sparse import SparseCode, decode_sparse, encode_sparse
from rsae_triton.sae.topk_rational import TopKRationalSAE
from rsae_triton.sae.transcoder import RationalTranscoder, Transcoder
from rsae_triton.teachers import load_teacher
from rsae_triton.training.loop import train
from rsae_triton.training.settings import TrainSettings
from rsae_triton.upgrading.stage_one import upgrade

__version__ = "0.2.0"

__all__ = [
    "ActivationStore",
    "BatchTopKSAE",
    "FusedRationalSAE",
    "GateFit",
    "JumpReluSAE",
    "RationalGate",
    "RationalTranscoder",
    "ReluSAE",
    "RsaeError",
    "SparseAutoencoder",
    "SparseCode",
    "TopKRationalSAE",
    "TopKSAE",
    "TrainSettings",
    "Transcoder",
    "compare",
    "decode_sparse",
    "dimension_weights",
    "encode_sparse",
    "evaluate",
    "extract",
    "extract_splits",
    "feature",
    "fit_gate",
    "load_corpus",
    "load_host",
    "load_teacher",
    "splice",
    "steer",
    "train",
    "upgrade",
]


def __dir__() -> list[str]:
    """The public names, for completion in an interpreter; the sub-packages can still be imported by their paths."""
    return sorted([*__all__, "__doc__", "__version__"])
