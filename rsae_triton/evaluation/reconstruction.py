"""Scores the reconstruction and the sparsity of a code on held-out activations, as shipped and at a given l0."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rsae_triton.activations import ActivationStore, PairedStore
from rsae_triton.activations.pairs import row_width
from rsae_triton.common.checks import check_data, check_finite, check_number
from rsae_triton.common.errors import ConfigError, ShapeError
from rsae_triton.ops.sparse_ops import used
from rsae_triton.sae.added import unexplained
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.sparse import SparseCode, decode_sparse, encode_sparse

CHUNK = 2048
# A feature that is active on more than this fraction of the tokens is called dense.
DENSE, DENSE_HALF = 0.1, 0.5


class Codec(Protocol):
    """Anything that encodes and decodes: an SAE, or an SAE with a raised threshold (`Thresholded`)."""

    @property
    def W_dec(self) -> Tensor: ...  # noqa: N802

    def encode(self, x: Tensor) -> Tensor: ...

    def decode(self, feature_acts: Tensor, x: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Reconstruction:
    """Means over tokens, in the units the SAE works in.

    mse: ||x - x_hat||^2. fvu: mse over the variance of x around its mean. fvu_by_dimension: the same in each dimension,
    averaged over the dimensions (see `sae.added.unexplained`). cosine: of x and x_hat. l0: number of active features.
    l1: sum of |z| * ||W_dec row||. alive_fraction: fraction of the features that are active on at least one of the
    n_tokens; dead_features: how many are not. dense_features: active on more than 10 % of the tokens;
    dense_features_half: on more than half. negative: fraction of the active codes that are below zero. size_p5,
    size_p50, size_p95: quantiles of the active codes' |z| * ||W_dec row||, 0 where there are none.
    """

    mse: float
    fvu: float
    fvu_by_dimension: float
    cosine: float
    l0: float
    l1: float
    alive_fraction: float
    n_tokens: int
    dead_features: int
    dense_features: int
    dense_features_half: int
    negative: float = 0.0
    size_p5: float = 0.0
    size_p50: float = 0.0
    size_p95: float = 0.0


class Measured(NamedTuple):
    """Scores, with the values they are means of: squared_error [n_tokens] float64 (||x - x_hat||^2 of each token) and
    frequency [d_sae] float64 (the fraction of tokens on which each feature is active)."""

    scores: Reconstruction
    squared_error: Tensor
    frequency: Tensor


class Thresholded:
    """An SAE whose code is also set to zero where |z| * ||W_dec row|| <= `tau`, to reach a given l0.

    With tau = 0.0 and `cut` False the code is unchanged; with `cut` True, codes on all-zero decoder rows are removed.
    """

    def __init__(self, sae: Codec, tau: float, cut: bool = True) -> None:
        self.sae, self.tau, self.cut = sae, tau, cut

    @property
    def W_dec(self) -> Tensor:  # noqa: N802
        return self.sae.W_dec

    def encode(self, x: Tensor) -> Tensor:
        z = self.sae.encode(x)
        return z * (strength(z, self.W_dec) > self.tau) if self.cut else z

    def decode(self, feature_acts: Tensor, x: Tensor | None = None) -> Tensor:
        return self.sae.decode(feature_acts, x)


WIDE = 2048
"""From this many features on, codes are computed and decoded as lists of active features."""


def rows_of(codec: Codec, x: Tensor) -> SparseCode | None:
    """Returns the code of x [..., d_in] as lists of active features, without an [n_tokens, d_sae] tensor. None for
    narrow codecs and for those that are not of this package."""
    if isinstance(codec, Thresholded):
        code = rows_of(codec.sae, x)
        if code is None:
            return None
        size = code.values.abs() * codec.W_dec.norm(dim=1)[code.indices]
        return only(code, size > codec.tau)
    if not isinstance(codec, SparseAutoencoder) or codec.d_sae < WIDE or codec.architecture == "rational_topk":
        return None
    return encode_sparse(codec, x)


def only(code: SparseCode, keep: Tensor) -> SparseCode:
    """Keeps the entries of a code where `keep` [..., width] is true, moved to the front of each row."""
    keep = keep & used(code.counts, code.values.shape[-1])
    order = keep.int().argsort(dim=-1, descending=True, stable=True)
    counts = keep.sum(-1)
    width = max(int(counts.max()) if counts.numel() else 0, 1)
    values, indices = (torch.where(keep, one, 0).gather(-1, order)[..., :width] for one in code[:2])
    return SparseCode(values.contiguous(), indices.contiguous(), counts)


def reconstruct(codec: Codec, x: Tensor) -> Tensor:
    """Encodes and decodes x [..., d_in]."""
    code = rows_of(codec, x)
    return codec.decode(codec.encode(x), x) if code is None else decode_sparse(_inmost(codec), code, x)


def active_codes(codec: Codec, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Encodes and decodes x [n_tokens, d_in]. Returns x_hat [n_tokens, d_in], and the values and features [n_active] of
    the active codes."""
    code = rows_of(codec, x)
    if code is None:
        z = codec.encode(x)
        tokens, features = (z != 0).nonzero(as_tuple=True)
        return codec.decode(z, x), z[tokens, features], features
    mask = used(code.counts, code.values.shape[-1])
    return decode_sparse(_inmost(codec), code, x), code.values[mask], code.indices[mask]


def codes_of(codec: Codec, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the values and the features [n_active] of the active codes."""
    code = rows_of(codec, x)
    if code is None:
        z = codec.encode(x)
        tokens, features = (z != 0).nonzero(as_tuple=True)
        return z[tokens, features], features
    mask = used(code.counts, code.values.shape[-1])
    return code.values[mask], code.indices[mask]


def _inmost(codec: Codec) -> SparseAutoencoder:
    """The SAE inside any number of `Thresholded`."""
    while isinstance(codec, Thresholded):
        codec = codec.sae
    assert isinstance(codec, SparseAutoencoder)
    return codec


def strength(z: Tensor, W_dec: Tensor) -> Tensor:
    """|z| * ||W_dec row||: how far a feature moves the reconstruction, independent of the scale of its decoder row."""
    return z.abs() * W_dec.norm(dim=1)


def check_activations(sae: Codec, x: Tensor) -> Tensor:
    """Returns x if it is [n_tokens >= 1, d_in] for this SAE and finite; else raises ShapeError, ConfigError or
    NumericsError."""
    if not isinstance(getattr(sae, "W_dec", None), Tensor) or not hasattr(sae, "encode"):
        raise ConfigError(f"sae is a {type(sae).__name__}; give an SAE of this package, such as load_teacher returns")
    check_data("activations", x)
    d_in = getattr(getattr(sae, "sae", sae), "row_width", sae.W_dec.shape[1])
    if x.dim() != 2 or x.shape[1] != d_in:
        raise ShapeError(f"activations have shape {tuple(x.shape)}; give [n_tokens, d_in={d_in}]")
    if len(x) == 0:
        raise ShapeError("there are no activations to evaluate on; give at least one token")
    check_finite("activations", x, "drop those rows before evaluating")
    return x


def sides(sae: Codec, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Splits rows of activations into the SAE's input and its target; see `SparseAutoencoder.sides`."""
    of = getattr(sae, "sae", sae)
    return of.sides(rows) if isinstance(of, SparseAutoencoder) else (rows, rows)


def chunks_of(sae: Codec, x: Tensor | ActivationStore | PairedStore) -> Iterator[Tensor]:
    """Yields rows for the SAE, some at a time, checked as in `check_activations`; a store's rows are read from the
    disk."""
    if isinstance(x, ActivationStore | PairedStore):
        check_activations(sae, torch.zeros(1, row_width(x)))
        return map(partial(_ready, sae, "extract them again"), x.chunks(CHUNK))
    return map(partial(_ready, sae, None), check_activations(sae, x).detach().split(CHUNK))


def _ready(sae: Codec, advice: str | None, rows: Tensor) -> Tensor:
    if advice is not None:  # rows from the disk have not been checked yet
        check_finite("activations", rows, advice)
    return rows.to(device=sae.W_dec.device, dtype=sae.W_dec.dtype)


def reconstruction(sae: Codec, x: Tensor | ActivationStore | PairedStore) -> Reconstruction:
    """Scores the code of x [n_tokens, d_in] (for a transcoder: input and target beside each other); sums in float64.

    Raises:
        ShapeError, NumericsError: activations that do not fit or are not finite.
    """
    return measure(sae, x).scores


@torch.no_grad()
def measure(
    sae: Codec, x: Tensor | ActivationStore | PairedStore, progress: Callable[[int], None] | None = None
) -> Measured:
    """Computes what `reconstruction` does, and also the error of every token and the frequency of every feature.

    Args:
        progress: called with the number of tokens done.
    """
    pieces = chunks_of(sae, x)
    total = dict.fromkeys(("cosine", "l0", "l1", "negative"), 0.0)
    active = torch.zeros(sae.W_dec.shape[0], dtype=torch.long, device=sae.W_dec.device)
    squared_error, done = torch.empty(len(x), dtype=torch.float64), 0
    sizes, norms = _Numbers(most=1 << 23), sae.W_dec.norm(dim=1)
    pivot: Tensor | None = None
    zeros = torch.zeros(sae.W_dec.shape[1], dtype=torch.float64, device=sae.W_dec.device)
    squares, sums, errors = zeros, zeros, zeros
    for rows in pieces:
        own, target = sides(sae, rows)
        pivot = target.double().mean(0) if pivot is None else pivot
        around = target.double() - pivot
        squares, sums = squares + around.square().sum(0), sums + around.sum(0)
        x_hat, values, features = active_codes(sae, own)
        active += torch.bincount(features, minlength=len(active))
        error = (target - x_hat).double().square()
        squared_error[done : done + len(rows)], errors = error.sum(1), errors + error.sum(0)
        done += len(rows)
        total["cosine"] += float(torch.cosine_similarity(target, x_hat, dim=1).double().sum())
        total["l0"] += float(len(values))
        size = values.abs() * norms[features]
        total["l1"] += float(size.double().sum())
        total["negative"] += float((values < 0).sum())
        sizes.add(size.float().cpu())
        if progress is not None:
            progress(len(rows))
    negative, ranked = total.pop("negative") / max(total["l0"], 1), sizes.all().sort().values
    frequency = active.double().cpu() / len(x)
    mse = float(squared_error.mean())
    if not math.isfinite(mse) and isinstance(of := getattr(sae, "sae", sae), torch.nn.Module):
        for name, weight in of.named_parameters():
            check_finite(f"sae.{name}", weight, "its scores mean nothing; fetch or train it again")
    by_dimension = squares / len(x) - (sums / len(x)).square()
    variance = float(by_dimension.sum())
    scores = Reconstruction(
        **{name: value / len(x) for name, value in total.items()},
        mse=mse,
        fvu=mse / variance if variance > 0 else float("nan"),
        fvu_by_dimension=unexplained(errors / len(x), by_dimension) if variance > 0 else float("nan"),
        alive_fraction=float((frequency > 0).double().mean()),
        n_tokens=len(x),
        dead_features=int((frequency == 0).sum()),
        dense_features=int((frequency > DENSE).sum()),
        dense_features_half=int((frequency > DENSE_HALF).sum()),
        negative=negative,
        **{f"size_p{q}": _quantile(ranked, q / 100) for q in (5, 50, 95)},
    )
    return Measured(scores, squared_error, frequency)


class _Numbers:
    """Collects numbers that arrive a few at a time, in memory that grows by doubling. (Many small tensors, kept while
    large ones come and go, would fragment the memory.) Beyond `most` numbers, every second is kept, then every fourth,
    ..."""

    def __init__(self, most: int | None = None) -> None:
        self.held, self.count, self.step, self.most = torch.empty(1 << 12), 0, 1, most

    def add(self, values: Tensor) -> None:
        values = values.flatten()[:: self.step]
        if self.count == 0:
            self.held = self.held.to(torch.promote_types(values.dtype, torch.float32))
        total = self.count + len(values)
        if total > len(self.held):
            larger = torch.empty(max(total, 2 * len(self.held)), dtype=self.held.dtype)
            larger[: self.count] = self.held[: self.count]
            self.held = larger
        self.held[self.count : total] = values
        self.count = total
        while self.most is not None and self.count > self.most:
            kept = self.held[: self.count : 2].clone()
            self.held[: len(kept)], self.count, self.step = kept, len(kept), 2 * self.step

    def all(self) -> Tensor:
        return self.held[: self.count]


def _quantile(ranked: Tensor, q: float) -> float:
    """The q-quantile of sorted values; `torch.quantile` accepts at most 16 million."""
    return float(ranked[round(q * (len(ranked) - 1))]) if len(ranked) else 0.0


@torch.no_grad()
def at_l0(sae: Codec, x: Tensor | ActivationStore | PairedStore, l0: float) -> Thresholded:
    """Returns the code with its threshold raised until its mean l0 on x is `l0` (exactly, up to ties).

    A code that is sparser than that already is returned as it is (tau = 0, cut = False): nothing can be added to it.
    """
    check_number("l0", l0, above=0)
    return cut_to(sae, x, l0)


@torch.no_grad()
def cut_to(sae: Codec, x: Tensor | ActivationStore | PairedStore, l0: float) -> Thresholded:
    """Like `at_l0`, but for a measured l0, which may be 0 (of a dead SAE)."""
    strengths, active, norms = _Numbers(), 0, sae.W_dec.norm(dim=1)
    for rows in chunks_of(sae, x):
        values, features = codes_of(sae, sides(sae, rows)[0])
        value = values.abs() * norms[features]
        active += len(values)
        strengths.add(value[value > 0])
    kept = round(l0 * len(x))
    if active <= kept:
        return Thresholded(sae, 0.0, cut=False)
    ranked = strengths.all()
    # If it is enough to remove codes on all-zero decoder rows, tau = 0 does that.
    tau = float(ranked.kthvalue(len(ranked) - kept).values) if len(ranked) > kept else 0.0
    return Thresholded(sae, tau)
