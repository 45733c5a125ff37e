"""The sample of activations that stage 1 works on."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from rsae_triton.sae.base import SparseAutoencoder

WORTH_TOKENS = 2048
"""Number of tokens on which the worth of a feature is measured."""


class Sample(NamedTuple):
    """Activations x [n, d_in], the teacher's pre-activations h and codes z [n, d_sae], its thresholds [d_sae], and the
    target y [n, d_out] of the reconstruction (x itself, except for a transcoder)."""

    x: Tensor
    h: Tensor
    z: Tensor
    thresholds: Tensor
    y: Tensor


def worth_of(teacher: SparseAutoencoder, seen: Sample) -> float | None:
    """How much the squared error rises per feature that is left out, if the weaker half of the active ones is.

    In units of the squared mean norm, as the weight of an l0 penalty. None if no feature is active, or if the error
    does not rise.
    """
    x, y, z = (one[:WORTH_TOKENS] for one in (seen.x, seen.y, seen.z))
    strength = z.abs() * teacher.W_dec.norm(dim=1)
    active = strength > 0
    if not bool(active.any()):
        return None
    kept = strength > strength[active].median()

    def error(code: Tensor) -> float:
        return float((teacher.decode(code, x) - y).double().square().sum())

    rise = (error(z * kept) - error(z)) / float((active & ~kept).sum()) / float(y.double().norm(dim=1).mean()) ** 2
    return rise if 0 < rise < math.inf else None
