"""How good a code is: reconstruction, sparsity, and what splicing it in costs the language model.

Every number is computed on the code that is shipped (exact zeros), and again at equal l0.
"""

from .compare import compare, evaluate
from .downstream import Downstream, Splice, splice_loss
from .matching import Matching, match_features
from .paired import Interval, mean_interval
from .probing import Probed, sparse_probe
from .reconstruction import Measured, Reconstruction, Thresholded, at_l0, measure, reconstruction

__all__ = [
    "Downstream",
    "Interval",
    "Matching",
    "Measured",
    "Probed",
    "Reconstruction",
    "Splice",
    "Thresholded",
    "at_l0",
    "compare",
    "evaluate",
    "match_features",
    "mean_interval",
    "measure",
    "reconstruction",
    "sparse_probe",
    "splice_loss",
]
