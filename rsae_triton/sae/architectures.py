"""The common SAEs: ReLU, JumpReLU and TopK, in SAELens' layout and under its architecture names."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from rsae_triton.common.checks import as_tensor, check_flag, check_number
from rsae_triton.common.errors import ConfigError, NumericsError, ShapeError
from rsae_triton.sae.base import SparseAutoencoder


class ReluSAE(SparseAutoencoder):
    """z = relu(h); SAELens' "standard"."""

    architecture: ClassVar[str] = "standard"

    def encode(self, x: Tensor) -> Tensor:
        return self.hidden_pre(x).relu()

    def _scale_nonlinearity_(self, scale: Tensor) -> None:
        """Nothing to do: a ReLU is homogeneous."""


class _Rectangle(torch.autograd.Function):
    """1[h > theta] with a rectangle of width `bandwidth` at theta as its derivative (arXiv:2407.14435, eq. 11-12).

    `to_h` also passes that derivative to h; the published JumpReLU passes it to theta only.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, theta: Tensor, bandwidth: float, to_h: bool) -> Tensor:
        return (h > theta).to(h.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        h, theta, ctx.bandwidth, ctx.to_h = inputs
        ctx.save_for_backward(h, theta)
        ctx.save_for_forward(h, theta)

    @staticmethod
    def slope(ctx: Any) -> Tensor:
        h, theta = ctx.saved_tensors
        return ((h - theta).abs() < ctx.bandwidth / 2).to(h.dtype) / ctx.bandwidth

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        slope = _Rectangle.slope(ctx) * grads[0]
        return slope if ctx.to_h else None, -slope.reshape(-1, slope.shape[-1]).sum(0), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        slope, dh, dtheta = _Rectangle.slope(ctx), tangents[0], tangents[1]
        moved = torch.zeros_like(slope)
        if ctx.to_h and dh is not None:
            moved = moved + slope * dh
        return moved if dtheta is None else moved - slope * dtheta


def opened(h: Tensor, theta: Tensor, bandwidth: float, to_h: bool) -> Tensor:
    """1[h > theta] at a list of places [n], with the rectangle's derivative."""
    return _Rectangle.apply(h.unsqueeze(0), theta, bandwidth, to_h).squeeze(0)


class JumpReluSAE(SparseAutoencoder):
    """z = h * 1[h > threshold_f]; thresholds are trained through a rectangle (arXiv:2407.14435).

    Args:
        threshold: initial threshold of all features, or [d_sae]; not negative.
        bandwidth: width of the rectangle, in units of h.
        slope_to_h: also pass the rectangle's slope to h (not in the paper; a control for the rational's slope).
    """

    architecture: ClassVar[str] = "jumprelu"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        threshold: float | Tensor = 0.1,
        bandwidth: float = 0.5,
        slope_to_h: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(d_in, d_sae, **options)
        check_number("bandwidth", bandwidth, above=0)
        check_flag("slope_to_h", slope_to_h)
        initial = as_tensor("threshold", threshold, torch.float32, self.W_enc.device)
        if initial.numel() not in (1, d_sae) or initial.dim() > 1:
            raise ShapeError(f"threshold has shape {tuple(initial.shape)}; give a number, or one for each of {d_sae}")
        if not bool(((initial >= 0) & initial.isfinite()).all()):
            raise ConfigError("a JumpReLU threshold must be a finite number and not negative")
        self.threshold = nn.Parameter(initial.expand(d_sae).clone())
        self.bandwidth, self.slope_to_h = bandwidth, slope_to_h

    def encode(self, x: Tensor) -> Tensor:
        return self.encode_with_counts(x)[0]

    def encode_with_counts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.hidden_pre(x)
        opened = _Rectangle.apply(h, self.threshold.to(h.dtype), self.bandwidth, self.slope_to_h)
        return h * opened, opened.reshape(-1, self.d_sae).sum(0).float()

    @torch.no_grad()
    def constrain_(self) -> None:
        self.threshold.clamp_(min=0)

    def check_values(self) -> None:
        if bool((self.threshold < 0).any()):
            raise NumericsError(
                f"threshold must not be negative; got a smallest value of {float(self.threshold.detach().min()):g}"
            )

    def _scale_nonlinearity_(self, scale: Tensor) -> None:
        self.threshold.mul_(scale)


class TopKSAE(SparseAutoencoder):
    """Keeps each token's k largest pre-activations, through a ReLU (arXiv:2406.04093).

    Args:
        k: active features per token, 1 to d_sae.
        relu: False keeps the k largest even if they are negative (in tokens with fewer than k positive
            pre-activations).
    """

    architecture: ClassVar[str] = "topk"
    compares_features: ClassVar[bool] = True

    def __init__(self, d_in: int, d_sae: int, *, k: int = 32, relu: bool = True, **options: Any) -> None:
        super().__init__(d_in, d_sae, **options)
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= d_sae:
            raise ConfigError(f"k is {k!r}; give an integer from 1 to d_sae={d_sae}")
        check_flag("relu", relu)
        self.k, self.relu = k, relu

    def encode(self, x: Tensor) -> Tensor:
        z = keep_largest(self.hidden_pre(x), self.k)
        return z.relu() if self.relu else z

    def config(self) -> dict[str, Any]:
        return {**super().config(), "k": self.k, **({} if self.relu else {"relu": False})}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(k=config["k"], relu=config.get("relu", True), **cls.common_arguments(config))


def keep_largest(values: Tensor, k: int) -> Tensor:
    """Sets everything but the k largest values of the last dimension to zero."""
    kept = values.topk(min(k, values.shape[-1]), dim=-1, sorted=False)
    return torch.zeros_like(values).scatter(-1, kept.indices, kept.values)
