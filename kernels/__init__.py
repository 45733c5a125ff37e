"""Triton device code of rsae_triton, one file per kernel. Imports nothing of `rsae_triton`.

Installed as the package `rsae_triton.kernels` (setup.py maps the folder). docs/kernels.md has the formulas, the memory
layout and a table of each kernel's machine code.

    encode_forward      x_c, W_enc, b_enc -> z [d_sae, n_tokens]: matrix product with the gate as its epilogue
    encode_backward     g, W_dec, h -> dh and every gradient of the gate: matrix product and backward in one
    rational_forward    h -> z, pointwise, after a library's matrix product rational_backward   h, dz -> dh and every
    gradient of the gate, in one pass, bit-reproducible sparse_encode       x_c, W_enc, b_enc -> rows of values and
    feature indices: no dense code; also the k largest sparse_decode       such rows -> reconstructions, and
    (`_dvalues`, `_dweight`) their gradients

The sparse step, on the entries of the support alone (docs/kernels.md):

    support_mark        h without its bias -> bits of the support and of what is active, counts; one pass over h
    list_entries        bits -> entries (token, feature, h) by feature; list_rows: active codes by token
    entry_gate_forward  entries -> codes; entry_gate_backward: their gradients
    threshold_forward, threshold_backward: the same of ReLU, JumpReLU and TopK SAEs
    support_decode      rows of codes -> reconstructions; support_residual: compared with x in the same pass
    entry_dots          the gradient of every entry's code
    feature_sums        entries -> gradients of both weight matrices, the bias and the thresholds
    support_totals      the loss, the gradient of b_dec, the norms of the gradients
    narrow_rows         a matrix in a narrow dtype, for a product that only finds candidates
    adam_rows           the optimiser's step on a weight matrix in one pass
    round_search        a round's search and correction by entries, and their gradients (`_back`)

Every [d_sae, n_tokens] tensor is feature-major: the tokens of one feature are contiguous.
"""

import triton

if tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 3):
    raise ImportError(
        f"the kernels keep coefficients in tuples, which Triton knows from 3.3 on; this is {triton.__version__}. "
        "Upgrade torch to 2.7 or later, or use another backend"
    )

from .adam_rows import adam_numbers, adam_rows, remove_radial, row_norms
from .configs import MOST_COLUMNS
from .encode_backward import encode_backward
from .encode_forward import encode_forward
from .interpreter import INTERPRETED
from .narrow_rows import Narrow, narrow_rows
from .rational_backward import GateGrads, rational_backward
from .rational_forward import rational_forward
from .round_search import SEARCH_COLUMNS, Search, SearchGrads, round_search, round_search_back
from .sparse_decode import sparse_decode, sparse_decode_dvalues, sparse_decode_dweight
from .sparse_encode import SparseRows, sparse_encode
from .support_gate import entry_gate_backward, entry_gate_forward
from .support_list import Entries, Rows, list_entries, list_rows
from .support_mark import Marks, support_mark
from .support_products import Residual, entry_dots, support_decode, support_residual
from .support_sums import FeatureSums, feature_sums
from .support_threshold import threshold_backward, threshold_forward
from .support_totals import support_totals

__all__ = [
    "INTERPRETED",
    "MOST_COLUMNS",
    "SEARCH_COLUMNS",
    "Entries",
    "FeatureSums",
    "GateGrads",
    "Marks",
    "Narrow",
    "Residual",
    "Rows",
    "Search",
    "SearchGrads",
    "SparseRows",
    "adam_numbers",
    "adam_rows",
    "encode_backward",
    "encode_forward",
    "entry_dots",
    "entry_gate_backward",
    "entry_gate_forward",
    "feature_sums",
    "list_entries",
    "list_rows",
    "narrow_rows",
    "rational_backward",
    "rational_forward",
    "remove_radial",
    "round_search",
    "round_search_back",
    "row_norms",
    "sparse_decode",
    "sparse_decode_dvalues",
    "sparse_decode_dweight",
    "sparse_encode",
    "support_decode",
    "support_mark",
    "support_residual",
    "support_totals",
    "threshold_backward",
    "threshold_forward",
]
