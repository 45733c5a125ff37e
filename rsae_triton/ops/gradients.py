"""Accumulates the gradients of a step that is computed in pieces."""

from __future__ import annotations

import torch
from torch import Tensor

from rsae_triton.ops import backends
from rsae_triton.ops.encode import through_encoder
from rsae_triton.ops.reference import GateTensors
from rsae_triton.ops.tiles import wide
from rsae_triton.ops.workspace import StepMemory


class GrowingGradients:
    """Gradients that grow from piece to piece, each in the precision that its sum needs."""

    def __init__(
        self,
        x: Tensor,
        W_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        gate: GateTensors,
        wanted: list[bool],
        one_token_part: bool,
        one_feature_part: bool,
        recycled: StepMemory,
    ) -> None:
        self._likes, self._wanted = (x, W_enc, W_enc[0], W_dec, b_dec, *gate[:6]), wanted

        def memory(place: int, one_term: bool) -> Tensor:
            like = self._likes[place]
            dtype = like.dtype if one_term else wide(like.dtype)
            return recycled.gradient(like, dtype) if wanted[place] else like.new_empty(0, dtype=dtype)

        self.dx, self.dW_enc, self.dW_dec = (
            memory(0, one_feature_part),
            memory(1, one_token_part),
            memory(3, one_token_part),
        )
        self.db_enc, self.db_dec = (one.new_zeros(one.shape, dtype=wide(one.dtype)) for one in (W_enc[0], b_dec))
        # Shared coefficients are sums over all features and all pieces.
        double = torch.float64 if x.device.type != "mps" else torch.float32
        self.gate = [one.new_zeros(one.shape, dtype=double) for one in gate[:6]]

    def decoder(self, tokens: slice, features: slice, z: Tensor, g: Tensor) -> None:
        if self._wanted[3]:
            add_product(self.dW_dec[features], z, g, fresh=tokens.start == 0)

    def encoder(self, tokens: slice, features: slice, x_c: Tensor, W_enc: Tensor, grads: backends.Gradients) -> None:
        if self._wanted[1]:
            add_product(self.dW_enc[:, features], x_c.t(), grads.dh.t(), fresh=tokens.start == 0)
        if self._wanted[0]:
            add_product(self.dx[tokens], grads.dh.t(), W_enc.t(), fresh=features.start == 0)
        self.db_enc[features] += grads.b_enc
        for total, one in zip(self.gate, grads.gate, strict=False):
            (total if len(total) == len(one) else total[features]).add_(one)

    def residual(self, tokens: slice, g: Tensor, *, of_x: bool, of_b_dec: bool) -> None:
        """Adds the gradients through the residual. g: the gradient of x_hat; if x is the target, minus g is part of its
        gradient."""
        if of_b_dec:
            self.db_dec += g.sum(0)
        if self._wanted[0] and of_x:
            self.dx[tokens] -= g

    def norms(self, W_dec: Tensor, scale: Tensor) -> None:
        """Adds the gradient of l1 by the decoder's row norms; scale [d_sae] is that gradient divided by the norms."""
        if self._wanted[3]:
            self.dW_dec.addcmul_(W_dec, scale.unsqueeze(1).to(self.dW_dec.dtype))

    def centre(self, W_enc: Tensor) -> None:
        if self._wanted[4]:
            self.db_dec -= through_encoder(W_enc, self.db_enc)

    def finish(self, rescale: float) -> list[Tensor]:
        """Returns the gradients, each in its parameter's dtype; empty tensors where not wanted."""
        found = (self.dx, self.dW_enc, self.db_enc, self.dW_dec, self.db_dec, *self.gate)
        return [
            (one if rescale == 1 else one.mul_(rescale)).to(like.dtype) if wanted else like.new_empty(0)
            for one, like, wanted in zip(found, self._likes, self._wanted, strict=True)
        ]


def add_product(total: Tensor, a: Tensor, b: Tensor, *, fresh: bool) -> None:
    """Computes total += a @ b, or total = a @ b for fresh memory; sums are in total's dtype."""
    if total.dtype == a.dtype:
        if fresh:
            torch.mm(a, b, out=total)
        else:
            torch.addmm(total, a, b, out=total)
    elif fresh:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)
