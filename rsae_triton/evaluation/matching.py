"""Matches the features of two SAEs: by decoder direction, and by when they are active."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rsae_triton.common.checks import check_integer
from rsae_triton.common.errors import ConfigError, ShapeError
from rsae_triton.evaluation.reconstruction import CHUNK, check_activations, rows_of
from rsae_triton.ops.sparse_ops import used
from rsae_triton.sae.base import SparseAutoencoder, check_sae
from rsae_triton.sae.units import check_place, check_same_units, reading

KEPT = 0.9
# How many pairs of features are accumulated at once (float64); more pairs take more passes over the text.
_PAIRS = 1 << 26
_AT_ONCE = 1 << 22
"""Products of two active codes that are formed at a time."""


@dataclass(frozen=True)
class Matching:
    """Gives every feature f of the second SAE its partner in the first (the teacher).

    Attributes:
        partner: int [d_sae], the teacher's feature whose decoder row has the largest cosine with W_dec[f].
        cosine: [d_sae], the cosine of f and its partner. mutual: bool [d_sae], whether f is also the partner of its
            partner.
        correlation: [d_sae], Pearson correlation of the activations of f and its partner over all tokens (zeros
            included); NaN if one of them is constant on these tokens, such as never active.
        best_correlated: int [d_sae], the teacher's feature with the largest correlation, -1 where there is none;
            best_correlation: [d_sae], that correlation.
        frequency, partner_frequency: [d_sae], fraction of tokens on which f, and its partner, is active.
        overlap: [d_sae], the fraction of the tokens with f or its partner active that have both active; NaN if neither
            ever is.
        n_tokens: how many tokens were measured.
    """

    partner: Tensor
    cosine: Tensor
    mutual: Tensor
    correlation: Tensor
    best_correlated: Tensor
    best_correlation: Tensor
    frequency: Tensor
    partner_frequency: Tensor
    overlap: Tensor
    n_tokens: int

    @property
    def similarity(self) -> Tensor:
        """The smaller of cosine and correlation; NaN where there is no correlation."""
        return torch.minimum(self.cosine, self.correlation)

    def most_changed(self, count: int = 20) -> list[int]:
        """The `count` features least similar to their partners; those without a correlation are left out."""
        order = self.similarity.nan_to_num(nan=torch.inf).argsort()
        return [int(f) for f in order[:count] if bool(self.similarity[f].isfinite())]

    def summary(self) -> dict[str, Any]:
        """How many features kept their meaning (cosine and correlation above 0.9), and the distributions."""
        measured = self.correlation.isfinite()
        cosine, correlation = self.cosine > KEPT, self.correlation.nan_to_num(nan=-1.0) > KEPT
        indices = torch.arange(len(self.partner))
        quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)

        def spread(values: Tensor) -> dict[str, float]:
            if not len(values):
                return {}
            found = values.double().quantile(quantiles)
            return {f"p{round(100 * float(q))}": float(value) for q, value in zip(quantiles, found, strict=True)}

        return {
            "n_features": len(self.partner),
            "n_tokens": self.n_tokens,
            "never_active": int((~measured).sum()),
            "cosine_above_0.9": int(cosine.sum()),
            "correlation_above_0.9": int(correlation.sum()),
            "kept_meaning": int((cosine & correlation).sum()),
            "kept_meaning_fraction": float((cosine & correlation).sum() / measured.sum().clamp_min(1)),
            "same_index": int((self.partner == indices).sum()),
            "mutual": int(self.mutual.sum()),
            "partner_is_best_correlated": int((self.best_correlated == self.partner).sum()),
            "overlap": spread(self.overlap[self.overlap.isfinite()]),
            "cosine": spread(self.cosine),
            "correlation": spread(self.correlation[measured]),
            "best_correlation": spread(self.best_correlation[self.best_correlation.isfinite()]),
        }


@torch.no_grad()
def match_features(
    teacher: SparseAutoencoder,
    sae: SparseAutoencoder,
    x: Tensor | Any,
    *,
    pairs: int = _PAIRS,
    progress: Callable[[int], None] | None = None,
) -> Matching:
    """Matches every feature of `sae` with one of `teacher`.

    Codes are computed chunk by chunk and only sums are kept: co-moments of `pairs` pairs of features at a time. Memory
    is 8 * pairs bytes whatever the number of tokens; SAEs with more pairs take several passes.

    Args:
        teacher, sae: of one d_in. x: held-out activations, an `ActivationStore` or [n_tokens, d_in] in the units that
            both read.
        pairs: see above. progress: called with the number of tokens done (`passes` tells how often all are).

    Raises:
        ShapeError, NumericsError: SAEs of different widths, activations that do not fit or are not finite.
        ConfigError: fewer than two tokens, or fewer pairs than one row.
    """
    check_sae("teacher", teacher)
    check_sae("sae", sae)
    check_integer("pairs", pairs, 0)
    if teacher.d_in != sae.d_in:
        raise ShapeError(f"the SAEs have d_in={teacher.d_in} and {sae.d_in}; only SAEs of one place can be matched")
    if not isinstance(x, Tensor) and hasattr(x, "tensor"):
        check_place(teacher, x, "the teacher")
        check_place(sae, x)
        with reading(teacher, x), reading(sae, x):
            return match_features(teacher, sae, x.tensor(), pairs=pairs, progress=progress)
    check_same_units({"the teacher": teacher, "the SAE": sae})
    x = sae.sides(check_activations(sae, x))[0]  # a code is computed from what a transcoder reads
    if len(x) < 2:
        raise ConfigError(f"{len(x)} token gives no correlation; give at least 2, better 10000")
    partner, cosine, mutual = _by_direction(teacher, sae, pairs)
    # Rows of active features if both SAEs are wide: no [n_tokens, d_sae] code, and no product of two.
    rows = all(rows_of(one, _read(one, x[:1])) is not None for one in (sae, teacher))
    ours, theirs = _Moments(sae, x, rows), _Moments(teacher, x, rows)
    best = torch.full((sae.d_sae,), -torch.inf, dtype=torch.float64)
    best_at = torch.full((sae.d_sae,), -1)
    at_partner = torch.full((sae.d_sae,), torch.nan, dtype=torch.float64)
    both = torch.zeros(sae.d_sae, dtype=torch.float64)
    for first, last in _blocks(teacher.d_sae, sae.d_sae, pairs):
        device = "cpu" if rows else sae.W_dec.device
        total = torch.zeros(last - first, sae.d_sae, dtype=torch.float64, device=device)
        for chunk in x.split(CHUNK):
            if rows:
                mine, its = (_active(one, chunk) for one in (sae, teacher))
                _add_pairs(total, its, mine, first, len(chunk))
                if first == 0:
                    both += _together(mine, its, partner, teacher.d_sae)
            else:
                z, other = ours.codes(sae, chunk), theirs.codes(teacher, chunk)
                shifted, part = z - ours.shift, (other - theirs.shift)[:, first:last]
                total += (part.t().to(shifted.device) @ shifted).double()
                if first == 0:
                    both += ((z != 0).cpu() & (other != 0).cpu()[:, partner]).sum(0)
            if progress is not None:
                progress(len(chunk))
        correlation = total.cpu() - theirs.offset[first:last, None] * ours.offset * len(x)
        correlation /= theirs.norm[first:last, None] * ours.norm
        here = (partner >= first) & (partner < last)
        at_partner[here] = correlation[partner[here] - first, here.nonzero().flatten()]
        value, at = correlation.nan_to_num(nan=-torch.inf).max(0)
        better = value > best
        best[better], best_at[better] = value[better], at[better] + first
    return Matching(
        partner=partner,
        cosine=cosine,
        mutual=mutual,
        correlation=at_partner.clamp(-1, 1),
        best_correlated=best_at,
        best_correlation=best.clamp(max=1).masked_fill(best_at < 0, torch.nan),
        frequency=ours.frequency,
        partner_frequency=theirs.frequency[partner],
        overlap=both / ((ours.frequency + theirs.frequency[partner]) * len(x) - both).round(),
        n_tokens=len(x),
    )


def passes(teacher: SparseAutoencoder, sae: SparseAutoencoder, pairs: int = _PAIRS) -> int:
    """How many times `match_features` goes through the text for the co-moments."""
    return len(_blocks(teacher.d_sae, sae.d_sae, pairs))


def _blocks(d_teacher: int, d_sae: int, pairs: int) -> list[tuple[int, int]]:
    size = pairs // d_sae
    if size < 1:
        raise ConfigError(f"pairs={pairs} is less than the {d_sae} features of the SAE; give at least that many")
    return [(first, min(first + size, d_teacher)) for first in range(0, d_teacher, size)]


def _by_direction(teacher: SparseAutoencoder, sae: SparseAutoencoder, pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns each feature's partner, their cosine, and whether the choice is mutual; in blocks of teacher features."""
    own, other = (torch.nn.functional.normalize(one.W_dec.detach().float().cpu(), dim=1) for one in (sae, teacher))
    cosine = torch.full((len(own),), -torch.inf)
    partner = torch.zeros(len(own), dtype=torch.long)
    back = torch.zeros(len(other), dtype=torch.long)
    for first, last in _blocks(len(other), len(own), pairs):
        similar = other[first:last] @ own.t()
        back[first:last] = similar.argmax(1)
        value, at = similar.max(0)
        better = value > cosine
        cosine[better], partner[better] = value[better], at[better] + first
    return partner, cosine.clamp(-1, 1).double(), back[partner] == torch.arange(len(own))


class _Moments:
    """Moments of an SAE's codes on x: a shift close to each feature's mean, the mean minus the shift, the root of the
    summed squared deviations, and the frequency. Codes are shifted before they are multiplied, so that a large mean
    costs no precision. From rows (`rows`) everything is summed in float64 without a shift."""

    def __init__(self, sae: SparseAutoencoder, x: Tensor, rows: bool) -> None:
        self.shift = torch.zeros(sae.d_sae) if rows else self.codes(sae, x[:CHUNK]).mean(0)
        total = torch.zeros(sae.d_sae, dtype=torch.float64, device=self.shift.device)
        squares, active = torch.zeros_like(total), torch.zeros_like(total)
        for chunk in x.split(CHUNK):
            if rows:
                _, features, values = _active(sae, chunk)
                active += torch.bincount(features, minlength=sae.d_sae)
                total.index_add_(0, features, values)
                squares.index_add_(0, features, values.square())
                continue
            z = self.codes(sae, chunk)
            active += (z != 0).sum(0)
            z = (z - self.shift).double()
            total += z.sum(0)
            squares += z.square().sum(0)
        self.offset = (total / len(x)).cpu()
        # Rounding can leave a constant feature a tiny norm, so anything up to this counts as constant.
        square = (squares.cpu() - self.offset.square() * len(x)).clamp_min(0)
        constant = square <= 1e-12 * squares.cpu().clamp_min(1e-300) + 1e-30
        self.norm = square.sqrt().masked_fill(constant, torch.nan)
        self.frequency = (active / len(x)).cpu()

    @staticmethod
    def codes(sae: SparseAutoencoder, chunk: Tensor) -> Tensor:
        return sae.encode(_read(sae, chunk)).float()


_Active = tuple[Tensor, Tensor, Tensor]
"""Tokens, features (int64) and values (float64) of the active codes on the CPU, by token."""


def _read(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    return x.to(device=sae.W_dec.device, dtype=sae.W_dec.dtype)


def _active(sae: SparseAutoencoder, chunk: Tensor) -> _Active:
    code = rows_of(sae, _read(sae, chunk))
    assert code is not None
    mask = used(code.counts, code.values.shape[-1])
    tokens = mask.nonzero()[:, 0]
    return tokens.cpu(), code.indices[mask].cpu(), code.values[mask].double().cpu()


def _add_pairs(total: Tensor, other: _Active, mine: _Active, first: int, n_tokens: int) -> None:
    """Adds z_i z_j to total [block, d_sae] for the features i (from `first` on) and j that are active on one token."""
    inside = (other[1] >= first) & (other[1] < first + len(total))
    tokens, features, values = (one[inside] for one in other)
    counts = torch.bincount(mine[0], minlength=n_tokens)
    starts = counts.cumsum(0) - counts
    step = max(1, _AT_ONCE // max(int(counts.max()), 1))
    for at, row, value in zip(tokens.split(step), features.split(step), values.split(step), strict=True):
        each = counts[at]
        entry = torch.repeat_interleave(torch.arange(len(at)), each)
        place = torch.arange(len(entry)) - (each.cumsum(0) - each)[entry] + starts[at][entry]
        flat = (row[entry] - first) * total.shape[1] + mine[1][place]
        total.view(-1).index_add_(0, flat, value[entry] * mine[2][place])


def _together(mine: _Active, other: _Active, partner: Tensor, d_teacher: int) -> Tensor:
    """Returns for each feature on how many tokens its partner is active too, [d_sae]."""
    wanted = mine[0] * d_teacher + partner[mine[1]]
    there = other[0] * d_teacher + other[1]  # in order
    if not len(there):
        return torch.zeros(len(partner), dtype=torch.int64)
    at = torch.searchsorted(there, wanted).clamp(max=len(there) - 1)
    return torch.bincount(mine[1][there[at] == wanted], minlength=len(partner))
