"""`Step`: the input of the three ways to compute a training step (`pieces`, `support`, `support_triton`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rsae_triton.ops.across import Across
from rsae_triton.ops.reference import GateSpec, GateTensors


class Step(NamedTuple):
    """A loss to compute together with its gradients; see `rational_autoencode` for the meanings.

    Attributes:
        x: [n_tokens, d_in]. W_enc: [d_in, d_sae]. b_enc: [d_sae]. W_dec: [d_sae, d_in]. b_dec: [d_in].
        subtract: whether b_dec is subtracted from x before encoding. target: [n_tokens, d_in], x when None.
        scale: [n_tokens, 1], multiplies each token's residual; or None. dtype: of the matrix products.
        wanted: which gradients, in the order of `likes`. across: the processes that hold other features.
    """

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    gate: GateTensors
    spec: GateSpec
    l1_weight: float
    l0_weight: float
    subtract: bool
    target: Tensor | None
    scale: Tensor | None
    dtype: torch.dtype
    wanted: list[bool]
    across: Across | None = None

    @property
    def likes(self) -> tuple[Tensor, ...]:
        """The tensors that have gradients: x, W_enc, b_enc, W_dec, b_dec and the gate's first six."""
        return (*self[:5], *self.gate[:6])

    @property
    def adds_b_dec(self) -> bool:
        """Whether this process adds b_dec to the reconstruction; one of the processes that share the features does."""
        return self.across is None or self.across.first
