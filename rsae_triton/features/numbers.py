"""Computes the numbers on a feature's card: codes, pre-activation histograms, the gate over them, similar rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rsae_triton.features.source import Source, logits_of
from rsae_triton.report.codes import codes_of
from rsae_triton.report.gates import thresholds
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.rational import FusedRationalSAE
from rsae_triton.sae.topk_rational import TopKRationalSAE
from rsae_triton.sae.units import reading

if TYPE_CHECKING:  # it takes a second to import, and is only needed where codes are looked at
    from scipy import sparse

BINS = 40
LENS = 8
SIMILAR = 5
_CHUNK = 256


@dataclass(frozen=True)
class Numbers:
    """The numbers of k chosen features of an SAE on a text.

    Attributes:
        indices: [k]. z: sparse [n_tokens, k], their codes. low, high: [k], the range of the pre-activations.
        counts, active: [k, BINS], tokens by pre-activation in that range: all, and those on which it is active.
        gate: [k, BINS + 1], the gate at the bins' edges; None if a code depends on the token's other features.
        threshold: [k], or None. promoted, suppressed: [k, LENS] token ids, strongest first, and logits [k, LENS] of
            both; None without a lens.
        similar: [k, SIMILAR] features with the most similar decoder rows, and their cosines.
    """

    indices: np.ndarray
    z: sparse.csc_array
    low: np.ndarray
    high: np.ndarray
    counts: np.ndarray
    active: np.ndarray
    gate: np.ndarray | None
    threshold: np.ndarray | None
    promoted: tuple[np.ndarray, np.ndarray] | None
    suppressed: tuple[np.ndarray, np.ndarray] | None
    similar: tuple[np.ndarray, np.ndarray]

    @property
    def frequency(self) -> np.ndarray:
        """[k], the fraction of tokens on which each is active."""
        return np.diff(self.z.indptr) / self.z.shape[0]

    def column(self, place: int) -> np.ndarray:
        """The codes of one feature, [n_tokens]; `place` is its position among the chosen ones."""
        return self.z[:, [place]].toarray()[:, 0]

    @property
    def largest(self) -> np.ndarray:
        """[k], the largest |code| of each; 0 where it is never active."""
        peaks = np.zeros(len(self.indices))
        at = np.repeat(np.arange(len(self.indices)), np.diff(self.z.indptr))
        np.maximum.at(peaks, at, np.abs(self.z.data))
        return peaks


@torch.no_grad()
def numbers_of(sae: SparseAutoencoder, source: Source, indices: np.ndarray, *, lens: bool = True) -> Numbers:
    """Measures the features `indices` of `sae` on a text. lens: whether to add the logit lens, if there is a host."""
    from scipy import sparse

    with reading(sae, source.store):
        z = sparse.csc_array(codes_of(sae, source.x).z[:, indices])
        z.eliminate_zeros()
        low, high, counts, active = _histograms(sae, source.x, indices, z)
        gate = _gate(sae, indices, low, high)
    limit = thresholds(sae)
    promoted, suppressed = _lens(sae, source, indices) if lens else (None, None)
    return Numbers(
        indices, z, low, high, counts, active, gate, None if limit is None else limit[indices], promoted, suppressed,
        _similar(sae.W_dec, indices),
    )  # fmt: skip


_Side = tuple[np.ndarray, np.ndarray] | None


def _lens(sae: SparseAutoencoder, source: Source, indices: np.ndarray) -> tuple[_Side, _Side]:
    """Returns the token ids and logits [k, LENS] that the decoder rows promote, and those that they suppress."""
    if source.host is None:
        return None, None
    sides: tuple[list[Tensor], ...] = ([], [], [], [])
    for part in torch.from_numpy(indices).split(_CHUNK):
        logits = logits_of(source.host, sae.W_dec[part])
        if logits is None:
            return None, None
        for place, largest in ((0, True), (2, False)):
            top = logits.topk(min(LENS, logits.shape[1]), dim=1, largest=largest)
            sides[place].append(top.indices)
            sides[place + 1].append(top.values)
    ids, values, lower, least = (torch.cat(one).cpu().numpy() for one in sides)
    return (ids, values), (lower, least)


def _histograms(
    sae: SparseAutoencoder, x: Tensor, indices: np.ndarray, z: sparse.csc_array
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    x = x.to(device=sae.W_dec.device, dtype=sae.W_dec.dtype)
    x = sae.normalization(x).apply(x)
    x = x - sae.b_dec if sae.apply_b_dec_to_input else x
    parts: tuple[list[np.ndarray], ...] = ([], [], [], [])
    for start in range(0, len(indices), _CHUNK):
        chosen = torch.from_numpy(indices[start : start + _CHUNK]).to(sae.W_enc.device)
        h = (x @ sae.W_enc[:, chosen] + sae.b_enc[chosen]).float().cpu()
        low, high = h.amin(0), h.amax(0)
        bins = ((h - low) / (high - low).clamp_min(1e-12) * BINS).long().clamp(0, BINS - 1)
        open_ = torch.from_numpy(z[:, start : start + _CHUNK].toarray() != 0)
        counts = [
            torch.zeros(BINS, len(chosen)).scatter_add_(0, bins, weight).t()
            for weight in (torch.ones_like(h), open_.float())
        ]
        for into, found in zip(parts, (low, high, *counts), strict=True):
            into.append(found.numpy())
    lows, highs, every, on = (np.concatenate(one) for one in parts)
    return lows, highs, every, on


def _gate(sae: SparseAutoencoder, indices: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray | None:
    """The scalar gate at the edges of the bins, [k, BINS + 1]; None if a code is not a function of its h alone."""
    if isinstance(sae, FusedRationalSAE) and sae.rounds > 1:
        return None
    grid = torch.from_numpy(np.linspace(low, high, BINS + 1)).float().to(sae.W_enc.device)
    if isinstance(sae, FusedRationalSAE) and not isinstance(sae, TopKRationalSAE):
        whole = torch.zeros(len(grid), sae.d_sae, device=grid.device)
        whole[:, torch.from_numpy(indices)] = grid
        return sae.gate(whole)[:, torch.from_numpy(indices)].float().cpu().numpy().T
    limit = thresholds(sae)
    if limit is None:
        return None
    return (grid.cpu().numpy() * (grid.cpu().numpy() > limit[indices])).T


def _similar(W_dec: Tensor, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = torch.nn.functional.normalize(W_dec.detach().float(), dim=1)
    size = min(SIMILAR, len(rows) - 1)
    found: list[np.ndarray] = []
    values: list[np.ndarray] = []
    for part in torch.from_numpy(indices).split(_CHUNK):
        cosine = rows[part] @ rows.t()
        cosine[torch.arange(len(part)), part] = -2.0
        top = cosine.topk(size, dim=1)
        found.append(top.indices.cpu().numpy())
        values.append(top.values.cpu().numpy())
    return np.concatenate(found), np.concatenate(values)
