"""The further rounds of a Rational SAE's encoder: their parameters, and encoding with them.

`ops/rounds.py` and docs/rounds.md say what a round is. All parameters are per feature; none is [d_in, d_sae].
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rsae_triton.common.checks import check_integer, check_room
from rsae_triton.common.errors import ConfigError, NumericsError
from rsae_triton.ops import rounds as ops
from rsae_triton.ops.across import Across
from rsae_triton.ops.autoencode import Autoencoded
from rsae_triton.ops.encode import check_inputs, product_dtype, resolve_backend
from rsae_triton.ops.reference import Encoded, GateSpec, GateTensors, refuse_transforms, transformed
from rsae_triton.ops.rounds import RoundCode, RoundTensors
from rsae_triton.ops.tiles import wide
from rsae_triton.sae.gate import Precise, RationalGate
from rsae_triton.sae.normalization import Affine

MOST_ROUNDS = 64
STARTS: tuple[float, float, float] = (0.3, 0.7, 0.7)
"""Default a, b, eta; a search on activations starts from them."""
EPSILON = 1.7e-6
"""The epsilon of the line search, in units of the activations' mean squared norm."""
TOKENS = 4096
"""Number of tokens that are encoded at a time if no gradient is needed."""


class Refinement(Precise):
    """The parameters of the rounds after the first; float32 whatever dtype the module is moved to.

    Attributes:
        a, b, eta: [rounds - 1, d_sae], the weights of the last pre-activation, the code and the residual's correction
            in the next pre-activation. threshold: [rounds - 1, d_sae], of the gates after the first. p: [rounds,
            d_sae], each feature's weight in a round's search. All of these are trained.
        unit: [d_sae], 1 / ||W_dec row||^2 when the rounds were added. epsilon: of the search, in squared units of x.
        weights: [d_in], how much an error counts in each dimension of x (unit is then of weighed rows); None if it
            counts the same in all.
    """

    unit: Tensor
    epsilon: Tensor
    weights: Tensor | None

    def __init__(
        self, d_sae: int, rounds: int, *, weights: Tensor | None = None, device: torch.device | None = None
    ) -> None:
        super().__init__()
        check_integer("rounds", rounds, 2, MOST_ROUNDS)
        check_room(f"{rounds} rounds of d_sae={d_sae}", (5, rounds, d_sae), torch.float32)

        def full(rows: int, value: float) -> nn.Parameter:
            return nn.Parameter(torch.full((rows, d_sae), value, device=device))

        self.a, self.b, self.eta = (full(rounds - 1, value) for value in STARTS)
        self.threshold, self.p = full(rounds - 1, 0.0), full(rounds, 1.0)
        self.register_buffer("unit", torch.ones(d_sae, device=device))
        self.register_buffer("epsilon", torch.ones((), device=device))
        self.register_buffer("weights", None if weights is None else weights.detach().float().to(device))

    @property
    def rounds(self) -> int:
        return len(self.p)

    def tensors(self) -> RoundTensors:
        return RoundTensors(self.a, self.b, self.eta, self.threshold, self.p, self.unit, self.epsilon, self.weights)

    @torch.no_grad()
    def constrain_(self) -> None:
        """Projects the thresholds onto theta >= 0 after an optimiser step."""
        self.threshold.clamp_(min=0)

    @torch.no_grad()
    def scale_features_(self, scale: Tensor) -> None:
        """Adapts to an SAE whose codes are multiplied by scale [d_sae] and whose decoder rows are divided by it."""
        self.threshold.mul_(scale)
        self.unit.mul_(scale.square())

    @torch.no_grad()
    def scale_activations_(self, scale: float) -> None:
        """Adapts to an SAE whose decoder is divided by scale, so that x has other units and the codes have not."""
        self.unit.mul_(scale**2)
        self.epsilon.div_(scale**2)

    @torch.no_grad()
    def with_rounds(self, rounds: int) -> Refinement:
        """Returns these parameters for another number of rounds: the first of them, or all with the last one
        repeated."""
        made = Refinement(self.p.shape[1], rounds, weights=self.weights, device=self.p.device)
        own = [*range(self.rounds), *[self.rounds - 1] * rounds][:rounds]
        for name in ("a", "b", "eta", "threshold"):
            getattr(made, name).copy_(getattr(self, name)[[max(k - 1, 0) for k in own[1:]]])
        made.p.copy_(self.p[own])
        made.unit.copy_(self.unit)
        made.epsilon.copy_(self.epsilon)
        return made

    def check_values(self) -> None:
        """Raises NumericsError for impossible values."""
        for name, values in (("unit", self.unit), ("threshold", self.threshold.detach())):
            if bool((values < 0).any()):
                raise NumericsError(f"refinement.{name} must not be negative; got {float(values.min()):g}")
        if self.weights is not None and not bool((self.weights > 0).all()):
            raise NumericsError(f"refinement.weights must be positive; got {float(self.weights.min()):g}")
        if not bool(self.epsilon > 0):
            raise NumericsError(f"refinement.epsilon must be positive; got {float(self.epsilon):g}")

    def extra_repr(self) -> str:
        return f"rounds={self.rounds}"


class Refined(Protocol):
    """The attributes of an SAE that its rounds need."""

    @property
    def W_enc(self) -> Tensor: ...  # noqa: N802
    @property
    def b_enc(self) -> Tensor: ...
    @property
    def W_dec(self) -> Tensor: ...  # noqa: N802
    @property
    def b_dec(self) -> Tensor: ...
    @property
    def gate(self) -> RationalGate: ...
    @property
    def refinement(self) -> Refinement | None: ...
    @property
    def backend(self) -> str: ...
    @property
    def apply_b_dec_to_input(self) -> bool: ...


class Normalizing(Refined, Protocol):
    """An SAE with rounds that may normalise its input."""

    @property
    def normalize_activations(self) -> str: ...
    def normalization(self, x: Tensor) -> Affine: ...


@dataclass(frozen=True)
class Weights:
    """The weights of an SAE of another library, in the form that rounds need."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    gate: RationalGate
    refinement: Refinement | None
    backend: str = "auto"
    apply_b_dec_to_input: bool = False


def encode(sae: Refined, x: Tensor, *, hidden: Tensor | None = None) -> Encoded:
    """Encodes x [..., d_in], in the SAE's normalised units, as the dense code, with sums as in `encode_with_sums`.

    hidden: [..., d_sae], the first pre-activations, if the caller has inspected or changed them.
    """
    rows = x.reshape(-1, sae.W_enc.shape[0])
    hidden = None if hidden is None else hidden.reshape(-1, sae.W_enc.shape[1])
    if sae.backend == "eager" or transformed():
        encoded = ops.reference(*_arguments(sae, rows), hidden=hidden, **_options(sae, rows))
    else:
        encoded = _dense(sae, rows, hidden)
    return encoded if x.dim() == 2 else encoded._replace(z=encoded.z.reshape(*x.shape[:-1], sae.W_enc.shape[1]))


def entries(sae: Refined, x: Tensor, **options: Any) -> RoundCode:
    """Encodes x [n_tokens, d_in], in the SAE's normalised units; returns the code by its candidates."""
    if "torch._dynamo" in sys.modules:  # breaks the graph, because the number of entries is not known beforehand
        return torch.compiler.disable(_entries)(sae, x, options)
    return _entries(sae, x, options)


def _entries(sae: Refined, x: Tensor, options: dict[str, Any]) -> RoundCode:
    refuse_transforms("a code by its entries")
    options = {**_options(sae, x), **options}
    options["triton"] = resolve_backend(sae.backend, x.device, options["dtype"]).startswith("triton")
    with torch.autocast(x.device.type, enabled=False):
        return ops.on_entries(*_arguments(sae, x), **options)


def _dense(sae: Refined, x: Tensor, hidden: Tensor | None) -> Encoded:
    dtype, d_sae, parts = product_dtype(x), sae.W_enc.shape[1], []
    size = max(len(x), 1) if torch.is_grad_enabled() else TOKENS
    for first in range(0, max(len(x), 1), size):
        part = slice(first, first + size)
        code = entries(sae, x[part], hidden=None if hidden is None else hidden[part])
        place = code.there.tokens * d_sae + code.there.features
        z = code.values.new_zeros(len(x[part]) * d_sae).index_put((place,), code.values)
        parts.append(Encoded(z.to(dtype).view(len(x[part]), d_sae), code.counts, code.l1))
    if len(parts) == 1:
        return parts[0]
    counts, l1 = (torch.stack([one[k] for one in parts]).sum(0) for k in (1, 2))
    return Encoded(torch.cat([one.z for one in parts]), counts, l1)


def reconstruct(sae: Refined, x: Tensor) -> Tensor:
    """Returns x_hat for x [..., d_in], both in normalised units: x minus what the last search has left unexplained."""
    rows = x.reshape(-1, sae.W_enc.shape[0])
    size = max(len(rows), 1) if torch.is_grad_enabled() else TOKENS
    parts = [part.to(wide(part.dtype)) - entries(sae, part).residual for part in rows.split(size)]
    return torch.cat(parts).to(product_dtype(x)).reshape(x.shape)


def autoencode(
    sae: Normalizing, x: Tensor, *, l1_weight: float, l0_weight: float, across: Across | None, exact: bool = False
) -> Autoencoded:
    """Computes the training loss of x [..., d_in], as `FusedRationalSAE.autoencode` does; only `total` is
    differentiable."""
    affine = sae.normalization(x)
    rows = affine.apply(x).reshape(-1, sae.W_enc.shape[0])
    if sae.backend == "eager" and across is None:
        z, *sums = ops.reference(*_arguments(sae, rows), **_options(sae, rows))
        e, size = rows - (z @ sae.W_dec + sae.b_dec), -1
        counts, l1_sums = sums
    else:
        code = entries(sae, rows, across=across, screened=not exact)
        e, counts, l1_sums, size = code.residual, code.counts, code.l1, len(code.values)
    if sae.normalize_activations != "none":
        # The target is then not what was encoded, because normalising and undoing it use different epsilons.
        e = x.reshape(-1, sae.W_enc.shape[0]).to(e.dtype) - affine.undo((rows - e).reshape(x.shape)).reshape(
            -1, sae.W_enc.shape[0]
        )
    mean = 1 / max(len(rows), 1)
    mse, l0 = e.square().sum() * mean, counts.sum() * mean
    # without a penalty, the gradient would pass over W_dec for nothing
    with torch.set_grad_enabled(torch.is_grad_enabled() and l1_weight > 0):
        l1 = torch.dot(l1_sums, torch.linalg.vector_norm(sae.W_dec, dim=1, dtype=e.dtype)) * mean
    total = mse + l1_weight * l1 + l0_weight * l0
    x_hat = (x - e.detach().reshape(x.shape)).to(x.dtype)
    return Autoencoded(total, mse.detach(), l1.detach(), l0.detach(), counts.detach(), x_hat, torch.tensor(size))


def _arguments(
    sae: Refined, x: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, GateTensors, GateSpec, RoundTensors]:
    refinement = sae.refinement
    if refinement is None:
        raise ConfigError("this SAE has one round; add some with sae.with_rounds(2, activations)")
    gate, spec = sae.gate.tensors(), sae.gate.spec()
    check_inputs(x, sae.W_enc, sae.b_enc, sae.b_dec, sae.W_dec, gate, spec)
    exact = wide(product_dtype(x))
    gate = GateTensors(*(one.to(exact) for one in gate))
    more = refinement.tensors().to(exact)
    return x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, gate, spec, more


def _options(sae: Refined, x: Tensor) -> dict[str, Any]:
    return {"subtract": sae.apply_b_dec_to_input, "dtype": product_dtype(x)}


def check_rounds(rounds: Any, spec: GateSpec) -> None:
    """Raises ConfigError unless an SAE with this gate can have this number of rounds."""
    check_integer("rounds", rounds, 1, MOST_ROUNDS)
    if rounds > 1:
        ops.check_spec(spec)
