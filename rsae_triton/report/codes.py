"""Sparse codes of held-out activations, computed once for all plots and snippets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rsae_triton.common.errors import ShapeError
from rsae_triton.evaluation.reconstruction import CHUNK
from rsae_triton.sae.base import SparseAutoencoder

if TYPE_CHECKING:  # it takes a second to import, and is only needed where codes are looked at
    from scipy import sparse

MAX_TOKENS = 20_000
CURVE = np.linspace(0.25, 1.0, 10)


@dataclass(frozen=True)
class Codes:
    """The shipped code of x and its decoding, all float32: x_hat = scale * (z @ W_dec) + empty.

    Attributes:
        z: sparse [n_tokens, d_sae]. W_dec: [d_sae, d_in].
        empty: [n_tokens, d_in], the decoding of an all-zero code: b_dec, with each token's mean and scale if the SAE
            normalises. scale: [n_tokens, 1], the token's scale; 1 for most SAEs.
    """

    z: sparse.csr_array
    W_dec: np.ndarray
    empty: np.ndarray
    scale: np.ndarray

    @property
    def l0(self) -> float:
        """Mean number of active features per token."""
        return self.z.nnz / self.z.shape[0]

    def firing_frequency(self) -> np.ndarray:
        """The fraction of tokens on which each feature is active, [d_sae]."""
        return np.bincount(self.z.indices, minlength=self.z.shape[1]) / self.z.shape[0]

    def feature(self, index: int) -> np.ndarray:
        """One feature's code on every token, [n_tokens]."""
        return self.z[:, [index]].toarray()[:, 0]


def subset(n_tokens: int, seed: int, limit: int = MAX_TOKENS) -> Tensor:
    """Up to `limit` of n_tokens row numbers, in order; a random choice by `seed` if there are more."""
    if n_tokens <= limit:
        return torch.arange(n_tokens)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(n_tokens, generator=generator)[:limit].sort().values


@torch.no_grad()
def codes_of(sae: SparseAutoencoder, x: Tensor) -> Codes:
    """Computes the shipped code of x [n_tokens, d_in] (for a transcoder: input and target beside each other).

    Raises:
        ShapeError: x is not two-dimensional, has another width, or is empty.
    """
    if x.dim() != 2 or x.shape[1] != sae.row_width or len(x) == 0:
        raise ShapeError(f"x has shape {tuple(x.shape)}; give held-out activations [n_tokens, d_in={sae.row_width}]")
    from scipy import sparse

    parts, empty, scale = [], [], []
    for chunk in x.split(CHUNK):
        rows = sae.sides(chunk.to(device=sae.W_dec.device, dtype=sae.W_dec.dtype))[0]
        parts.append(sparse.csr_array(sae.encode(rows).float().cpu().numpy()))
        affine = sae.normalization(rows)
        empty.append(sae.denormalize(sae.b_dec.expand(len(rows), -1), rows).float().cpu().numpy())
        scale.append(torch.as_tensor(affine.scale).float().cpu().expand(len(rows), 1).numpy())
    decoder = sae.W_dec.detach().float().cpu().numpy()
    return Codes(sparse.csr_array(sparse.vstack(parts)), decoder, np.concatenate(empty), np.concatenate(scale))


def mse_against_l0(codes: Codes, x: Tensor, fractions: np.ndarray = CURVE) -> tuple[np.ndarray, np.ndarray]:
    """Returns l0 and mse of a code as its threshold is raised: one of each per fraction of its own l0.

    The threshold is on |z| * ||W_dec row||, as everywhere. Entries are added from the strongest to the weakest, so all
    points together cost one sparse decoding.
    """
    from scipy import sparse

    entries = codes.z.tocoo()
    order = np.argsort(-np.abs(entries.data) * np.linalg.norm(codes.W_dec, axis=1)[entries.col], kind="stable")
    residual = x.float().cpu().numpy() - codes.empty
    ends = np.round(fractions * len(order)).astype(int)
    mse, start = [], 0
    for end in ends:
        new = order[start:end]
        part = sparse.csr_array((entries.data[new], (entries.row[new], entries.col[new])), shape=codes.z.shape)
        residual -= codes.scale * (part @ codes.W_dec)
        mse.append(float(np.square(residual, dtype=np.float64).sum(1).mean()))
        start = end
    return ends / len(residual), np.array(mse)
