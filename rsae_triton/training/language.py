"""The language model in the loop: a loss term for the effect of the reconstruction on the model's predictions.

    total = mse + weight * sparsity + kl_weight * (mse / KL) * KL(model || model with the reconstruction spliced in)

In the factor, mse and KL are running means without gradients: whatever the model and the place, the KL term is worth
kl_weight times the mse (the balance of arXiv:2503.17272). The KL is the mean over the predicted tokens of a few whole
sequences per step; the other terms use the shuffled rows. Only the SAE gets gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rsae_triton.activations.host import HostModel
from rsae_triton.activations.store import ActivationStore
from rsae_triton.common.errors import ConfigError
from rsae_triton.evaluation.downstream import splice_of
from rsae_triton.evaluation.listening import check_host
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.training.settings import TrainSettings

MEMORY = 0.9
"""Memory of the running means: about ten steps."""


class LanguageLoss:
    """The KL term of one run.

    Args:
        host: the model that the activations were read from. store: of these activations; its sequences are read again.
        settings: kl_weight, kl_sequences, kl_from and the seed of the order.

    Raises:
        ConfigError, ShapeError: activations without sequences, or a host that they were not read from.
    """

    def __init__(self, host: HostModel, store: Any, settings: TrainSettings) -> None:
        if not isinstance(host, HostModel):
            raise ConfigError(f"host is a {type(host).__name__}; give what load_host returns")
        if not isinstance(store, ActivationStore):
            raise ConfigError("objective='mse+kl' reads whole sequences; give an ActivationStore as activations")
        self.host, self.settings = host, settings
        sequences = store.sequences
        keep = sequences.counted.any(1)
        self.tokens, self.counted = sequences.tokens[keep], sequences.counted[keep]
        if not len(self.tokens):
            raise ConfigError("the activations' store has no sequence with a token to predict; extract more text")
        self.splice = splice_of(store)
        check_host(host, store)
        self.mse: float | None = None
        self.kl: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences per step, and tokens in each."""
        return min(self.settings.kl_sequences, len(self.tokens)), self.tokens.shape[1]

    def starts(self, step: int) -> bool:
        """Whether the term is used at this step."""
        return step >= self.settings.kl_from * self.settings.steps

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Returns tokens and counted of a step; the same whether or not the run was interrupted."""
        size, count = self.shape[0], len(self.tokens)
        per_epoch = count // size
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.settings.seed + 7919 * epoch))
        chosen = order[place * size : (place + 1) * size]
        return self.tokens[chosen], self.counted[chosen]

    def backward(self, sae: SparseAutoencoder, step: int, mse: float) -> float:
        """Adds the term's gradients to those of `sae`, and returns the KL."""
        tokens, counted = self.batch(step)

        def through(x: Tensor) -> Tensor:
            return sae(x.to(device=sae.W_dec.device, dtype=sae.W_dec.dtype)).to(x)

        left = self.splice.left(tokens, self.host.bos_token_id)
        per_token = self.host.kl(tokens, self.splice.hook_name, self.splice.replacement(through, left))
        use = counted.to(per_token)
        kl = (per_token * use).sum() / use.sum()
        value = float(kl.detach())
        self.mse, self.kl = _running(self.mse, mse), _running(self.kl, value)
        (kl * (self.settings.kl_weight * self.mse / max(self.kl, 1e-8))).backward()
        return value

    def state(self) -> dict[str, float | None]:
        return {"mse": self.mse, "kl": self.kl}

    def restore(self, state: Any) -> None:
        """Restores what `state` returned; if a checkpoint lacks it, the running means start again."""
        known = state if isinstance(state, dict) else {}
        self.mse, self.kl = (
            float(known[name]) if isinstance(known.get(name), int | float) else None for name in ("mse", "kl")
        )


class Cost(NamedTuple):
    """The most bytes that the term takes: for activations of the layers above the place, and for logits."""

    layers: int
    logits: int


def language_memory(host: HostModel, sequences: int, context: int) -> Cost:
    """Predicts what `LanguageLoss` keeps for its backward pass: fourteen tensors of the model's width per layer."""
    tokens, size = sequences * context, torch.finfo(host.dtype).bits // 8
    return Cost(14 * tokens * host.d_model * host.n_layers * size, tokens * host.vocab_size * (3 * size + 8))


@contextmanager
def only_the_sae(host: HostModel | None) -> Iterator[None]:
    """Switches off the gradients of the host's weights within the context, and restores them afterwards."""
    held = [one for one in host.model.parameters() if one.requires_grad] if host is not None else []
    for one in held:
        one.requires_grad_(False)
    try:
        yield
    finally:
        for one in held:
            one.requires_grad_(True)


def _running(before: float | None, now: float) -> float:
    return now if before is None else MEMORY * before + (1 - MEMORY) * now
