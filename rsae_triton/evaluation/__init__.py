"""How good a code is: its reconstruction, its sparsity, and what it costs the language model when spliced in.

Every number is computed on the shipped code, with its exact zeros, and again with all codes at the same l0.
"""

from rsae_triton.evaluation.compare import compare, evaluate
from rsae_triton.evaluation.downstream import Downstream, Splice, splice_loss
from rsae_triton.evaluation.ground_truth import (
    Detection,
    KnownFeatures,
    detect,
    planted_features,
    saelens_model,
    synthsaebench_model,
)
from rsae_triton.evaluation.listening import dimension_weights
from rsae_triton.evaluation.matching import Matching, match_features
from rsae_triton.evaluation.paired import Interval, mean_interval
from rsae_triton.evaluation.probing import Probed, sparse_probe
from rsae_triton.evaluation.reconstruction import Measured, Reconstruction, Thresholded, at_l0, measure, reconstruction

__all__ = [
    "Detection",
    "Downstream",
    "Interval",
    "KnownFeatures",
    "Matching",
    "Measured",
    "Probed",
    "Reconstruction",
    "Splice",
    "Thresholded",
    "at_l0",
    "compare",
    "detect",
    "dimension_weights",
    "evaluate",
    "match_features",
    "mean_interval",
    "measure",
    "planted_features",
    "reconstruction",
    "saelens_model",
    "sparse_probe",
    "splice_loss",
    "synthsaebench_model",
]
