"""Whether labels survive: how similar every feature of the other codes is to its partner in the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rsae_triton.evaluation.matching import KEPT
from rsae_triton.report.codes import Codes
from rsae_triton.report.plots import finish
from rsae_triton.report.style import COLOURS, NAMES, line
from rsae_triton.sae.base import SparseAutoencoder


@dataclass(frozen=True)
class Survival:
    """Compares each feature of an SAE with the teacher's feature that has the most similar decoder row.

    Attributes:
        cosine: [d_sae], of the two rows. correlation: [d_sae], of their activations; NaN if one of them is never
            active.
        same_rows: whether every decoder row is the teacher's, bit for bit.
    """

    cosine: np.ndarray
    correlation: np.ndarray
    same_rows: bool

    @property
    def kept(self) -> float:
        """The share of features (among those with a correlation) whose cosine and correlation both exceed 0.9."""
        known = np.isfinite(self.correlation)
        return float((self.cosine[known] > KEPT).astype(float) @ (self.correlation[known] > KEPT) / max(1, known.sum()))


def survival(
    teacher: SparseAutoencoder, saes: Mapping[str, SparseAutoencoder], codes: Mapping[str, Codes]
) -> dict[str, Survival]:
    """Computes `Survival` for each of `saes`. codes: theirs and the teacher's, on the same tokens."""
    from scipy import sparse

    found = {}
    for name, sae in saes.items():
        partner, cosine = partners(teacher, sae, np.arange(sae.d_sae))
        correlation = correlations(codes[name].z, sparse.csc_array(codes["teacher"].z)[:, partner])
        same = teacher.W_dec.shape == sae.W_dec.shape and torch.equal(teacher.W_dec, sae.W_dec)
        found[name] = Survival(cosine, correlation, same)
    return found


@torch.no_grad()
def partners(teacher: SparseAutoencoder, sae: SparseAutoencoder, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns, for the features `indices` of `sae`, the teacher's features with the most similar decoder rows, and the
    cosines."""
    rows = torch.nn.functional.normalize(teacher.W_dec.float(), dim=1)
    best = []
    for part in torch.from_numpy(indices).split(256):
        mine = torch.nn.functional.normalize(sae.W_dec[part.to(sae.W_dec.device)].float(), dim=1)
        best.append((mine.to(rows.device) @ rows.t()).max(1))
    cosine = torch.cat([one.values for one in best]).clamp(-1, 1)
    return torch.cat([one.indices for one in best]).cpu().numpy(), cosine.cpu().numpy()


def correlations(ours: Any, theirs: Any) -> np.ndarray:
    """Pearson correlation of column f of one sparse code with column f of the other; NaN if one of them is constant."""
    from scipy import sparse

    a, b = (sparse.csc_array(one).astype(np.float64) for one in (ours, theirs))
    n = a.shape[0]
    mean_a, mean_b = a.sum(axis=0) / n, b.sum(axis=0) / n
    var_a = a.multiply(a).sum(axis=0) / n - mean_a**2
    var_b = b.multiply(b).sum(axis=0) / n - mean_b**2
    both = a.multiply(b).sum(axis=0) / n - mean_a * mean_b
    known = (var_a > 1e-12) & (var_b > 1e-12)
    return np.divide(both, np.sqrt(var_a * var_b), out=np.full(len(both), np.nan), where=known).clip(-1, 1)


def answer(found: Mapping[str, Survival]) -> str:
    """One line that says, for every code, what share of its features keep the teacher's meaning."""
    parts = []
    for name, one in found.items():
        label = NAMES.get(name, name)
        parts.append(f"{label} {one.kept:.0%}" + (" (every decoder row is the teacher's)" if one.same_rows else ""))
    return f"Features that keep the teacher's meaning: {', '.join(parts)}."


def labels_figure(found: Mapping[str, Survival]) -> Any:
    """Plots the share of features above each similarity to their partner: of decoder rows, and of activations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key, label in ((left, "cosine", "cosine of rows"), (right, "correlation", "correlation of codes")):
        for name, one in found.items():
            known = np.sort(getattr(one, key)[np.isfinite(getattr(one, key))])
            share = 1 - np.arange(len(known)) / max(1, len(known))
            axes.step(np.r_[known, 1.0], np.r_[share, 0.0], where="pre", **line(name))
        axes.axvline(KEPT, color=COLOURS["ink"], linewidth=0.8, linestyle=":")
        axes.set(xlabel=label, xlim=(0, 1.02), ylim=(0, 1.02))
    left.set_ylabel("share of features above")
    legend = figure.legend(
        *left.get_legend_handles_labels(), fontsize="small", frameon=False, loc="outside lower center", ncols=2
    )
    for entry in legend.get_texts():
        entry.set_color(COLOURS["ink"])
    finish(left, right)
    return figure
