"""What replacing the residual stream by its reconstruction costs the language model, in nats per token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import NumericsError
from .reconstruction import Codec

Z95 = 1.959964


@dataclass(frozen=True)
class Splice:
    """How host activations become SAE inputs: x = scale * residual, at the positions an SAE can have seen.

    The BOS position and those with a norm above `norm_limit` (host units; None: no limit) are left as they are,
    for SAEs and ablations alike: training dropped them.
    """

    hook_name: str
    scale: float = 1.0
    norm_limit: float | None = None

    def replacement(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """What to hand the host as `replace`: function maps [n, d_in] in SAE units to the same."""

        def replace(resid: Tensor) -> Tensor:
            norms = resid.float().norm(dim=-1)
            seen = torch.ones_like(norms, dtype=torch.bool)
            seen[:, 0] = False
            if self.norm_limit is not None:
                seen &= norms <= self.norm_limit
            out = resid.clone()
            out[seen] = (function(resid[seen].float() * self.scale) / self.scale).to(out.dtype)
            return out

        return replace


@dataclass(frozen=True)
class Downstream:
    """Means over sequences; the interval is 95 %, from the paired differences of the sequences.

    delta_ce: cross-entropy with the reconstruction minus without. loss_recovered: 1 - delta_ce / (the same for
    ablating to zero), loss_recovered_mean: against ablating to the mean activation.
    """

    ce: float
    delta_ce: float
    delta_ce_low: float
    delta_ce_high: float
    loss_recovered: float
    loss_recovered_mean: float
    n_sequences: int


@torch.no_grad()
def splice_loss(
    host: Any,
    codecs: Mapping[str, Codec],
    tokens: Tensor,
    splice: Splice,
    mean: Tensor,
    *,
    counted: Tensor | None = None,
    batch: int = 8,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Downstream]:
    """Splices every codec into the host in one pass over the text, so that all see the same sequences.

    Args:
        host: a `HostModel`. codecs: by name. tokens: [n_sequences, context], BOS first.
        splice: where and in which units. mean: [d_in] in SAE units, for mean ablation.
        counted: bool [n_sequences, context - 1], False where a prediction does not count; all when None.
        batch: sequences at once. progress: called with the number of sequences done.

    Raises:
        NumericsError: fewer than two sequences (no interval), or a loss that is not finite.
    """
    if len(tokens) < 2:
        raise NumericsError(f"{len(tokens)} held-out sequences give no interval; use at least 2, better 100")

    def reconstruct(codec: Codec) -> Callable[[Tensor], Tensor]:
        return lambda x: codec.decode(codec.encode(x.to(codec.W_dec.dtype))).float()

    replacements: dict[str, Callable[[Tensor], Tensor] | None] = {
        "clean": None,
        "zero": splice.replacement(torch.zeros_like),
        "mean": splice.replacement(lambda x: mean.to(x).expand_as(x)),
        **{f"sae:{name}": splice.replacement(reconstruct(codec)) for name, codec in codecs.items()},
    }
    losses: dict[str, list[Tensor]] = {name: [] for name in replacements}
    for start in range(0, len(tokens), batch):
        part = tokens[start : start + batch]
        use = torch.ones(part.shape[0], part.shape[1] - 1) if counted is None else counted[start : start + batch]
        for name, result in host.splice(part, splice.hook_name, replacements).items():
            weights = use.to(result.nll)
            losses[name].append((result.nll * weights).sum(1) / weights.sum(1))
        if progress is not None:
            progress(len(part))
    ce = {name: torch.cat(values).double().cpu() for name, values in losses.items()}
    for name, values in ce.items():
        if not bool(torch.isfinite(values).all()):
            raise NumericsError(f"the language model's loss under {name!r} is not finite on some sequence")
    clean, zero, average = ce["clean"].mean(), ce["zero"].mean(), ce["mean"].mean()
    scores = {}
    for name in codecs:
        values = ce[f"sae:{name}"]
        paired = values - ce["clean"]
        delta, half = float(paired.mean()), Z95 * float(paired.std()) / len(paired) ** 0.5
        scores[name] = Downstream(
            ce=float(values.mean()),
            delta_ce=delta,
            delta_ce_low=delta - half,
            delta_ce_high=delta + half,
            loss_recovered=float((zero - values.mean()) / (zero - clean)),
            loss_recovered_mean=float((average - values.mean()) / (average - clean)),
            n_sequences=len(paired),
        )
    return scores
