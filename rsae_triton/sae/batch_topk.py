"""BatchTopK: k active features per token on average over the batch, and a fixed threshold at inference."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from rsae_triton.common.checks import check_number
from rsae_triton.common.errors import ConfigError
from rsae_triton.sae.base import SparseAutoencoder


class BatchTopKSAE(SparseAutoencoder):
    """Keeps the n_tokens * k largest pre-activations of a batch while training (arXiv:2412.06410).

    At inference (after `eval()`, the mode in which it is built and loaded) a token's code must not depend on the rest
    of the batch. Features above `topk_threshold` are then active; this is the running mean of the smallest value kept
    in training. `load_teacher` reads a saved BatchTopK SAE as the JumpReLU SAE that it is at inference, as SAELens
    does.

    Args:
        k: active features per token, on average; 1 to d_sae.
        memory: of the running mean, per batch.
    """

    architecture: ClassVar[str] = "batchtopk"
    compares_features: ClassVar[bool] = True
    topk_threshold: Tensor

    def __init__(self, d_in: int, d_sae: int, *, k: int = 32, memory: float = 0.9, **options: Any) -> None:
        super().__init__(d_in, d_sae, **options)
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= d_sae:
            raise ConfigError(f"k is {k!r}; give an integer from 1 to d_sae={d_sae}")
        check_number("memory", memory, least=0, most=1)
        self.k, self.memory = k, memory
        self.register_buffer("topk_threshold", torch.zeros((), dtype=torch.float32, device=self.W_enc.device))
        self.eval()

    def encode(self, x: Tensor) -> Tensor:
        h = self.hidden_pre(x)
        if not self.training or h.numel() == 0:
            return h * (h > self.topk_threshold)
        values = h.relu()
        kept = values.numel() // self.d_sae * self.k
        smallest = values.detach().flatten().topk(kept, sorted=False).values.min()
        self.remember_(smallest)
        return values * (values >= smallest)

    @torch.no_grad()
    def remember_(self, smallest: Tensor) -> None:
        """Updates the running mean with the smallest value that a training batch kept; NaN changes nothing."""
        old, new = self.topk_threshold, smallest.to(self.topk_threshold)
        mean = torch.where(old > 0, old * self.memory + new * (1 - self.memory), new)
        old.copy_(torch.where(new.isnan(), old, mean))  # without waiting for a GPU

    def config(self) -> dict[str, Any]:
        return {**super().config(), "k": self.k}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(k=config["k"], **cls.common_arguments(config))
