"""How good a code is: reconstruction, sparsity, and what splicing it in costs the language model.

Every number is computed on the code that is shipped (exact zeros), and again at equal l0.
"""

from .compare import compare, evaluate
from .downstream import Downstream, Splice, splice_loss
from .reconstruction import Reconstruction, Thresholded, at_l0, reconstruction

__all__ = [
    "Downstream",
    "Reconstruction",
    "Splice",
    "Thresholded",
    "at_l0",
    "compare",
    "evaluate",
    "reconstruction",
    "splice_loss",
]
