"""The sample of activations that stage 1 works on."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Sample(NamedTuple):
    """Activations x [n, d_in], the teacher's pre-activations h and codes z [n, d_sae], its thresholds [d_sae], and the
    target y [n, d_out] of the reconstruction (x itself, except for a transcoder)."""

    x: Tensor
    h: Tensor
    z: Tensor
    thresholds: Tensor
    y: Tensor
