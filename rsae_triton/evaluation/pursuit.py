"""Orthogonal matching pursuit on an SAE's dictionary: how well its decoder could do at an l0 with a better encoder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsae_triton.common.checks import check_integer
from rsae_triton.common.errors import ConfigError, SourceError
from rsae_triton.common.install import advice
from rsae_triton.evaluation.reconstruction import at_l0, reconstruction
from rsae_triton.sae.base import SparseAutoencoder, check_sae

TOKENS = 2000
"""`pursuit_bound` runs on this many tokens, because pursuit takes a hundredth of a second per token."""


class Pursuit:
    """An SAE whose code is found by orthogonal matching pursuit (scikit-learn): k features per token, added one at a
    time, with amplitudes by least squares. Codes may be negative. It shows how far encoders could improve, but is far
    too slow to be used as one.

    Args:
        sae: provides W_dec and b_dec. k: features per token.

    Raises:
        ConfigError: an SAE that normalises every token, or k above d_in or d_sae.
        SourceError: scikit-learn is not installed.
    """

    def __init__(self, sae: SparseAutoencoder, k: int) -> None:
        check_sae("sae", sae)
        check_integer("k", k, 1)
        if sae.normalize_activations != "none":
            raise ConfigError(f"the SAE normalises every token ({sae.normalize_activations}); pursuit is for others")
        if k > min(sae.d_in, sae.d_sae):
            raise ConfigError(f"k is {k}; pursuit takes at most d_in={sae.d_in} and d_sae={sae.d_sae}")
        try:
            from sklearn.linear_model import orthogonal_mp_gram
        except ImportError as error:
            raise SourceError(f"pursuit needs the package scikit-learn; install it with: {advice('probe')}") from error
        self.sae, self.k, self._solve = sae, k, orthogonal_mp_gram
        rows = sae.W_dec.detach().double().cpu()
        self._norms = rows.norm(dim=1).clamp_min(1e-12)
        self._rows = rows / self._norms[:, None]
        self._gram = np.ascontiguousarray((self._rows @ self._rows.t()).numpy())

    @property
    def W_dec(self) -> Tensor:  # noqa: N802
        return self.sae.W_dec

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        rows = (x.double().cpu() - self.sae.b_dec.detach().double().cpu()).reshape(-1, self.sae.d_in)
        with warnings.catch_warnings():  # scikit-learn warns if a token needs fewer than k features
            warnings.filterwarnings("ignore", "Orthogonal matching pursuit ended prematurely", RuntimeWarning)
            z = self._solve(self._gram, (self._rows @ rows.t()).numpy(), n_nonzero_coefs=self.k, copy_Xy=False)
        z = torch.as_tensor(z).reshape(self.sae.d_sae, -1).t() / self._norms
        return z.to(x).reshape(*x.shape[:-1], self.sae.d_sae)

    def decode(self, feature_acts: Tensor, x: Tensor | None = None) -> Tensor:
        return self.sae.decode(feature_acts, x)


def pursuit_bound(saes: Mapping[str, SparseAutoencoder], x: torch.Tensor) -> dict[str, Any]:
    """The mse of matching pursuit on the teacher's dictionary, and of every SAE at its l0, on the same few tokens."""
    x = x[:TOKENS]
    teacher = saes["teacher"]
    bound = Pursuit(teacher, max(1, round(reconstruction(teacher, x).l0)))
    found = asdict(reconstruction(bound, x))
    mse = {name: reconstruction(at_l0(sae, x, found["l0"]), x).mse for name, sae in saes.items()}
    return {
        "n_tokens": len(x),
        "l0": found["l0"],
        "negative": found["negative"],
        "mse": {"pursuit": found["mse"], **mse},
    }
