"""What stage 1 looks at: a sample of the activations, with the teacher's pre-activations and codes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Sample(NamedTuple):
    """What stage 1 looks at: activations x [n, d_in], the teacher's h and z [n, d_sae], its thresholds [d_sae], and y
    [n, d_out], what is to be reconstructed: x, but for a transcoder."""

    x: Tensor
    h: Tensor
    z: Tensor
    thresholds: Tensor
    y: Tensor
