"""Converts a Rational SAE into the nearest JumpReLU SAE, for tools that only know that, and measures the loss."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rsae_triton.common.checks import check_data, check_finite
from rsae_triton.common.errors import ConfigError, ShapeError
from rsae_triton.sae.architectures import JumpReluSAE
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.gate import RationalGate
from rsae_triton.sae.sides import side_by_side
from rsae_triton.sae.units import check_place, reading, scales_of

_FEATURES = 512  # how many are fitted at once; each needs a sorted column of the sample


@dataclass(frozen=True)
class DenseExport:
    """What the JumpReLU SAE loses, on the half of the activations that it was not fitted to.

    code_error: ||z_jumprelu - z|| / ||z|| over all tokens. mse, l0: of the Rational SAE and of the JumpReLU SAE; mse is
    the mean over tokens of ||x - x_hat||^2. n_tokens: the number of tokens measured.
    """

    code_error: float
    mse: float
    mse_jumprelu: float
    l0: float
    l0_jumprelu: float
    n_tokens: int

    @property
    def summary(self) -> str:
        return (
            f"code off by {100 * self.code_error:.2f} %, mse {self.mse_jumprelu:.4g} against {self.mse:.4g}, "
            f"l0 {self.l0_jumprelu:.2f} against {self.l0:.2f}"
        )


def to_jumprelu(
    sae: SparseAutoencoder, activations: Any, targets: Tensor | None = None
) -> tuple[JumpReluSAE, DenseExport]:
    """Returns the JumpReLU SAE whose codes are nearest to `sae`'s in least squares, feature by feature.

    A JumpReLU computes g * h + c where that exceeds a threshold. For each feature, g and c are the regression of its
    active codes on their pre-activations (or 1 and 0, if those fit better), and the threshold is the best of all cuts
    of the sample. g and c go into W_enc and b_enc; the decoder is the same. With several rounds a code depends on what
    the other features have explained, which a JumpReLU cannot express: expect the error of one round.

    Args:
        activations: an `ActivationStore`, or [n_tokens, d_in] in the SAE's units, a few thousand or more. Half are used
            to fit, half to measure.
        targets: for a transcoder, the activations that it should write; see `upgrade`.

    Returns:
        The JumpReLU SAE (a `JumpReluTranscoder` for a transcoder) in float32, and what it loses.

    Raises:
        ShapeError, NumericsError: activations that do not fit, are fewer than two or are not finite.
    """
    gate = getattr(sae, "gate", None)
    if not isinstance(gate, RationalGate):
        raise ConfigError(f"sae is a {type(sae).__name__}; give a FusedRationalSAE")
    if sae.architecture == "rational_topk":
        raise ConfigError("a JumpReLU SAE has thresholds per feature; use upgrade(..., thresholds='feature')")
    activations = side_by_side(sae, activations, targets)
    check_place(sae, activations)
    with reading(sae, activations), torch.no_grad():
        rows = activations.tensor() if scales_of(activations) is not None else activations
        jumprelu, loss = _fit_all(sae, gate, rows)
    if sae.all_units is not None:
        jumprelu.to_units_(*sae.all_units)
    return jumprelu, loss


def _fit_all(sae: SparseAutoencoder, gate: RationalGate, activations: Tensor) -> tuple[JumpReluSAE, DenseExport]:
    check_data("activations", activations)
    if activations.dim() != 2 or activations.shape[1] != sae.row_width or len(activations) < 2:
        raise ShapeError(
            f"activations have shape {tuple(activations.shape)}; give [n_tokens >= 2, d_in={sae.row_width}]"
        )
    x = activations.to(device=sae.W_enc.device, dtype=sae.W_enc.dtype)
    check_finite("activations", x, "drop those tokens first")
    fitted, held = sae.sides(x[0::2])[0], x[1::2]
    h, z = sae.hidden_pre(fitted).float(), sae.encode(fitted).float()
    theta = gate.threshold.double()
    parts = [
        _fit(h[:, part], z[:, part], theta[part]) for part in torch.arange(sae.d_sae, device=h.device).split(_FEATURES)
    ]
    gain, offset, threshold = (torch.cat(one) for one in zip(*parts, strict=True))
    jumprelu: JumpReluSAE = sae.empty_jumprelu(  # type: ignore[operator]  # whoever has a gate has it
        device=sae.W_enc.device,
        metadata={name: value for name, value in sae.metadata.items() if name != "stage1"},
        initialise=False,
    )
    jumprelu.W_enc.copy_(sae.W_enc.float() * gain)
    jumprelu.b_enc.copy_(sae.b_enc.float() * gain + offset)
    jumprelu.threshold.copy_(threshold)
    jumprelu.W_dec.copy_(sae.W_dec)
    jumprelu.b_dec.copy_(sae.b_dec)
    if (skip := getattr(sae, "W_skip", None)) is not None:
        jumprelu.get_parameter("W_skip").copy_(skip)
    loss = _loss(sae, jumprelu, held)
    jumprelu.metadata["exported_from"] = {"architecture": sae.architecture, "form": gate.form, **asdict(loss)}
    return jumprelu, loss


def _fit(h: Tensor, z: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns g, c and threshold [n_features] from pre-activations and codes [n_tokens, n_features]; theta is the
    gate's."""
    h, order = h.double().sort(dim=0, descending=True)
    z = z.double().gather(0, order)
    active = (z != 0).double()
    count = active.sum(0).clamp_min(1)
    mean_h, mean_z = (active * h).sum(0) / count, (active * z).sum(0) / count
    variance = (active * (h - mean_h).square()).sum(0)
    slope = (active * (h - mean_h) * (z - mean_z)).sum(0) / variance.clamp_min(1e-12)
    regression = (slope, mean_z - slope * mean_h)
    usable = (variance > 1e-9) & (slope > 0)
    identity = (torch.ones_like(slope), torch.zeros_like(slope))
    cost_r, theta_r = _cut(h, z, *regression, theta)
    cost_1, theta_1 = _cut(h, z, *identity, theta)
    use = usable & (cost_r < cost_1)
    gain, offset = (torch.where(use, r, one) for r, one in zip(regression, identity, strict=True))
    return gain.float(), offset.float(), torch.where(use, theta_r, theta_1).float()


def _cut(h: Tensor, z: Tensor, gain: Tensor, offset: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the least squared error over all thresholds, and the threshold; h is sorted, largest first."""
    value = gain * h + offset
    # The change in error if the k largest are kept instead of set to zero. Values must be positive.
    change = torch.where(value > 0, (z - value).square() - z.square(), torch.inf)
    cost = torch.cat([torch.zeros_like(change[:1]), change.cumsum(0)])
    best, k = cost.min(dim=0)
    padded = torch.cat([value, value[-1:] - 1])
    inside = padded.gather(0, (k - 1).clamp_min(0)[None])[0].where(k > 0, torch.inf)
    outside = padded.gather(0, k[None])[0]
    # All thresholds between the last kept value and the first dropped one fit the sample equally. The gate's own is
    # taken if it is among them, else the middle; for a feature that keeps none, its largest value.
    own, middle = gain * theta + offset, torch.where(k > 0, (inside + outside) / 2, outside)
    threshold = torch.where((outside <= own) & (own < inside), own, middle).clamp_min(0)
    return best + z.square().sum(0), threshold


def _loss(sae: SparseAutoencoder, jumprelu: JumpReluSAE, x: Tensor) -> DenseExport:
    sums = torch.zeros(6, dtype=torch.float64)
    for both in x.split(2048):
        rows, y = sae.sides(both)
        z, dense = sae.encode(rows), jumprelu.encode(rows.float())
        error, dense_error = y - sae.decode(z, rows), y.float() - jumprelu.decode(dense, rows.float())
        parts = (dense - z, z, error, dense_error)
        sums[:4] += torch.stack([one.double().square().sum() for one in parts]).cpu()
        sums[4:] += torch.stack([(one != 0).double().sum() for one in (z, dense)]).cpu()
    difference, norm, mse, mse_dense, l0, l0_dense = sums.tolist()
    return DenseExport(
        code_error=(difference / norm) ** 0.5 if norm > 0 else float("nan"),
        mse=mse / len(x),
        mse_jumprelu=mse_dense / len(x),
        l0=l0 / len(x),
        l0_jumprelu=l0_dense / len(x),
        n_tokens=len(x),
    )
