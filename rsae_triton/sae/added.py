"""What rounds that were added reach on a sample, and what is said of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.like_teacher import LEAST_TOKENS, few_tokens

CHUNK = 2048
"""Tokens that are scored at a time."""
LEAST_VARIANCE = 1e-6
"""Dimensions whose variance is below this share of the mean one count as constant."""


class CodeScores(NamedTuple):
    """What a code reaches on a sample. unexplained: the error of a dimension of x as a share of its variance, averaged
    over the dimensions (almost constant ones left out). The mse weighs a dimension by its variance; a language model
    may read a small one too."""

    l0: float
    mse: float
    unexplained: float


@dataclass(frozen=True)
class AddedRounds:
    """What adding rounds did; kept in the SAE's metadata under "rounds".

    rounds: the number of rounds. a, b, eta: the values that all features start from; None if the SAE had rounds
    already.
    target_l0: what the thresholds were set for. l0, mse, unexplained (see `CodeScores`): on the sample of n_tokens.
    l0_before, mse_before, unexplained_before: of the original SAE on the same sample.
    weighed: whether dimensions have weights. delta_ce: the change of a language model's loss, if one was asked.
    """

    rounds: int
    a: float | None
    b: float | None
    eta: float | None
    target_l0: float
    l0: float
    mse: float
    l0_before: float
    mse_before: float
    n_tokens: int
    unexplained: float = 0.0
    unexplained_before: float = 0.0
    weighed: bool = False
    delta_ce: float | None = None

    @property
    def change(self) -> str:
        """The change of the mse in per cent, as text."""
        return f"{100 * (self.mse / self.mse_before - 1):+.1f} %" if self.mse_before > 0 else "0 %"

    @property
    def caution(self) -> str | None:
        """What to say if the mse falls but the error relative to each dimension's variance does not; else None."""
        falls = self.mse < self.mse_before and self.unexplained > self.unexplained_before
        if self.n_tokens < LEAST_TOKENS or self.weighed or not falls:
            return None
        return (
            f"a round changes the mse by {self.change}, but some dimensions of small variance get worse: the error as "
            f"a share of a dimension's variance, averaged over dimensions, goes from {self.unexplained_before:.3f} to "
            f"{self.unexplained:.3f}. The loss of the language model may not fall, or may rise: "
            "upgrade(..., host=host) lets the model choose, and can weigh the dimensions"
        )

    @property
    def summary(self) -> str:
        if self.n_tokens < LEAST_TOKENS:
            return f"{self.rounds} rounds, untrained; only {few_tokens(self.n_tokens)}"
        return (
            f"{self.rounds} rounds, untrained{self.asked}: mse {self.mse_before:.4g} -> {self.mse:.4g} ({self.change}) "
            f"at l0 {self.l0:.2f} (before: {self.l0_before:.2f})"
        )

    @property
    def asked(self) -> str:
        """What a language model said of these rounds, as text."""
        how = ", dimensions weighed" if self.weighed else ""
        return how if self.delta_ce is None else f"{how}, the model's loss {self.delta_ce:+.4f} nats from the teacher's"


@torch.no_grad()
def scores(sae: SparseAutoencoder, x: Tensor) -> CodeScores:
    """The scores of `sae` on x [n, d_in], computed on some rows at a time."""
    active, squares, n = 0.0, torch.zeros(x.shape[1], dtype=torch.float64, device=x.device), max(len(x), 1)
    for rows in x.split(CHUNK):
        z = sae.encode(rows)
        active += float((z != 0).sum())
        squares += (rows - sae.decode(z, rows)).double().square().sum(0)
    variance = x.double().var(0, correction=0) if len(x) > 1 else torch.zeros_like(squares)
    return CodeScores(active / n, float(squares.sum()) / n, unexplained(squares / n, variance))


def unexplained(errors: Tensor, variance: Tensor) -> float:
    """The error of a dimension as a share of its variance, averaged over dimensions; almost constant ones are left out.

    Args:
        errors, variance: of each dimension, [d_in], the mean squared error and the variance.
    """
    varies = variance > LEAST_VARIANCE * variance.mean()
    return float((errors[varies] / variance[varies]).mean()) if bool(varies.any()) else 0.0
