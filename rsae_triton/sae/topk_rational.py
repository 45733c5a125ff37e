"""A Rational SAE with a threshold for each token: exact for TopK teachers, at the cost of a sort."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rsae_triton.common.checks import check_flag
from rsae_triton.common.errors import ConfigError
from rsae_triton.ops.reference import Encoded, rational_gate
from rsae_triton.sae.gate import RationalGate
from rsae_triton.sae.rational import FusedRationalSAE


class TopKRationalSAE(FusedRationalSAE):
    """z = h * r((h - tau) / C_in) where h > tau, tau halfway between a token's k-th and (k+1)-th pre-activation.

    Given tau, a TopK gate is a JumpReLU (arXiv:2606.14990, section 3.1), so one rational fits all tokens. tau is never
    below 0 (unless relu=False) and has no gradient. Among equal pre-activations, which are frequent in 16 bits, it
    keeps those that a TopK keeps. It sorts in plain PyTorch; `FusedRationalSAE` with thresholds per feature
    (`upgrade`'s default, calibrated to fire as often as the teacher) needs no sort and runs in the fused kernels.

    Args:
        d_in, d_sae, gate, ...: as for `FusedRationalSAE`; the gate must be gated. k: active features per token.
        relu: False keeps a token's k largest even if they are negative, as a `TopKSAE` with relu=False does.

    Raises:
        ConfigError: a direct gate, or a k that is not from 1 to d_sae.
    """

    architecture: ClassVar[str] = "rational_topk"
    compares_features: ClassVar[bool] = True

    def __init__(self, d_in: int, d_sae: int, *, k: int, gate: RationalGate, relu: bool = True, **options: Any) -> None:
        super().__init__(d_in, d_sae, gate=gate, **options)
        if gate.form != "gated":
            raise ConfigError("thresholds that are supplied token by token need form='gated'")
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= d_sae:
            raise ConfigError(f"k is {k!r}; give an integer from 1 to d_sae={d_sae}")
        if self.refinement is not None:
            raise ConfigError("rounds take thresholds per feature; use upgrade(..., thresholds='feature')")
        check_flag("relu", relu)
        self.k, self.relu = k, relu
        # Replaced by tau for each token: as a parameter it would have no gradient, which DDP refuses.
        if isinstance(self.gate.threshold, nn.Parameter):
            unused = self.gate.threshold.detach()
            del self.gate.threshold
            self.gate.register_buffer("threshold", unused)

    def encode_with_sums(self, x: Tensor, *, hard: bool = True) -> Encoded:
        """See `FusedRationalSAE.encode_with_sums`; the thresholds are those of this batch."""
        x = self._check_last(x, "x", "d_in", self.d_in)
        h = self.hidden_pre(x).reshape(-1, self.d_sae)
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        tau = self.token_thresholds(wide.detach())
        gate = self.gate.tensors()._replace(threshold=tau)
        z, active = rational_gate(wide, gate, self.gate.spec(hard))
        if hard and self.k < self.d_sae:
            kept = torch.zeros_like(wide).scatter(-1, wide.topk(self.k, dim=-1, sorted=False).indices, 1.0)
            z, active = z * kept, active * kept
        return Encoded(z.to(h.dtype).reshape(*x.shape[:-1], self.d_sae), active.sum(0), z.abs().sum(0))

    def token_thresholds(self, h: Tensor) -> Tensor:
        """Returns tau [n_tokens, 1] (>= 0 with relu) for pre-activations h [n_tokens, d_sae]."""
        if self.k == self.d_sae:
            return h.new_zeros(len(h), 1) if self.relu else h.new_full((len(h), 1), torch.finfo(h.dtype).min / 2)
        last, following = h.topk(self.k + 1, dim=1).values[:, -2:].split(1, dim=1)
        between = torch.where(
            last > following, (last + following) / 2, last.nextafter(torch.full_like(last, -torch.inf))
        )
        return between.clamp_min(0) if self.relu else between

    def autoencode(self, x: Tensor, **options: Any) -> Any:
        """Not available, because a threshold depends on the token's whole row (ConfigError); train with
        memory="saved"."""
        raise ConfigError("a loss in pieces cannot rank whole tokens; use memory='saved', or thresholds per feature")

    def encode_sparse(self, x: Tensor, capacity: int | None = None, *, k: int | None = None) -> Any:
        """Not available with thresholds by token (ConfigError); use upgrade(..., thresholds="feature")."""
        raise ConfigError("sparse encoding takes thresholds per feature; use upgrade(..., thresholds='feature')")

    def to_jumprelu(self, activations: Any, targets: Tensor | None = None) -> Any:
        """Not available with thresholds by token (ConfigError); use upgrade(..., thresholds="feature")."""
        raise ConfigError("a JumpReLU SAE has thresholds per feature; use upgrade(..., thresholds='feature')")

    def _scale_nonlinearity_(self, scale: Tensor) -> None:
        if not bool(torch.isclose(scale, scale[:1]).all()):
            raise ConfigError("a scale per feature would change which k are largest; give one scale for all features")
        self.gate.scale_features_(scale)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "k": self.k, **({} if self.relu else {"relu": False})}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TopKRationalSAE:
        relu = config.get("relu", True)
        return cls(gate=RationalGate.from_config(config), k=config["k"], relu=relu, **cls.common_arguments(config))


RATIONAL: tuple[type[FusedRationalSAE], ...] = (FusedRationalSAE, TopKRationalSAE)
"""The kinds of Rational SAE, each with its own `architecture` in cfg.json."""
