"""FusedRationalSAE: the drop-in Rational SAE over the fused encoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from rsae_triton.common.checks import parse_device
from rsae_triton.common.errors import ConfigError, FormatError, NumericsError, ShapeError
from rsae_triton.ops.across import Across
from rsae_triton.ops.autoencode import Autoencoded, rational_autoencode
from rsae_triton.ops.encode import rational_encode, resolve_backend
from rsae_triton.ops.reference import Encoded, refuse_transforms, transformed
from rsae_triton.ops.rounds import check_spec
from rsae_triton.remez import fit_gate
from rsae_triton.sae import rounds as rounds_of
from rsae_triton.sae.architectures import JumpReluSAE
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.gate import RationalGate
from rsae_triton.sae.rounds import EPSILON, Refinement, check_rounds
from rsae_triton.sae.sparse import SparseCode, decode_sparse, encode_sparse

if TYPE_CHECKING:
    from rsae_triton.sae.export import DenseExport


class FusedRationalSAE(SparseAutoencoder):
    """A sparse autoencoder whose nonlinearity is a trainable rational function (arXiv:2606.14990).

    `encode`, `decode` and `forward` take any leading shape; the codes carry exact zeros. Where a CUDA device is
    there the encoder runs as one Triton kernel, forward and backward, elsewhere through the CPU backend.

    Args:
        d_in, d_sae: width of the activations, number of features.
        degree, groups, form, domain, amplitude, backward: of the gate, see `RationalGate`. groups=1 shares one
            rational, groups=d_sae gives every feature its own.
        gate: a ready `RationalGate`; then the six arguments above are taken from it.
        backend: "auto", "triton", "cpu" or "eager" (see `rsae_triton.ops.encode`).
        apply_b_dec_to_input, normalize_activations, dtype, device, metadata, generator, initialise: see
            `SparseAutoencoder`.

    Without `gate` a direct gate starts at the minimax fit of ReLU, a gated one at that of the ramp; both of degree
    (3, 2) unless another is given.
    """

    architecture: ClassVar[str] = "rational"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        degree: tuple[int, int] | None = None,
        groups: int = 1,
        form: str = "direct",
        domain: str = "clamp",
        amplitude: str = "rational",
        backward: str = "soft",
        gate: RationalGate | None = None,
        rounds: int = 1,
        backend: str = "auto",
        apply_b_dec_to_input: bool = True,
        normalize_activations: str = "none",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        metadata: dict[str, Any] | None = None,
        generator: torch.Generator | None = None,
        initialise: bool = True,
    ) -> None:
        super().__init__(
            d_in,
            d_sae,
            apply_b_dec_to_input=apply_b_dec_to_input,
            normalize_activations=normalize_activations,
            dtype=dtype,
            device=device,
            metadata=metadata,
            generator=generator,
            initialise=initialise,
        )
        if gate is None:
            options = {"groups": groups, "domain": domain, "amplitude": amplitude, "backward": backward}
            gate = initial_gate(d_sae, degree, form, options)
        elif not isinstance(gate, RationalGate):
            raise ConfigError(f"gate is a {type(gate).__name__}; give a RationalGate")
        elif gate.d_sae != d_sae:
            raise ConfigError(f"the gate has d_sae={gate.d_sae}, the SAE d_sae={d_sae}; they must agree")
        self.gate = gate.to(device) if device is not None else gate
        check_rounds(rounds, self.gate.spec())
        self.refinement = self._refinement(rounds) if rounds > 1 else None
        self.backend = backend
        resolve_backend(backend if backend != "triton" else "auto", self.W_enc.device, dtype)

    def _refinement(self, rounds: int) -> Refinement:
        made = Refinement(self.d_sae, rounds, device=self.gate.threshold.device)
        with torch.no_grad():
            made.threshold.copy_(self.gate.threshold)
            made.epsilon.fill_(EPSILON * self.d_in)
            # Weights to be loaded are not there yet, and neither are their norms.
            squares = self.W_dec.float().square().sum(1)
            made.unit.copy_(torch.where((squares > 0) & squares.isfinite(), 1 / squares, 0))
        return made

    @property
    def rounds(self) -> int:
        """How often the encoder looks: 1, or as many as `with_rounds` has given it."""
        return 1 if self.refinement is None else self.refinement.rounds

    def encode(self, x: Tensor, *, hard: bool = True) -> Tensor:
        """Activations [..., d_in] -> the sparse code [..., d_sae]; hard=False gives the dense rational code."""
        return self.encode_with_counts(x, hard=hard)[0]

    def encode_with_counts(self, x: Tensor, *, hard: bool = True) -> tuple[Tensor, Tensor]:
        """As `encode`, with the differentiable activity counts [d_sae] (float32)."""
        encoded = self.encode_with_sums(x, hard=hard)
        return encoded.z, encoded.counts  # a slice of it is more than torch 2.6 can compile

    def encode_with_sums(self, x: Tensor, *, hard: bool = True) -> Encoded:
        """As `encode`, with what a sparsity penalty needs: counts and the sums of |z|, [d_sae], differentiable."""
        x = self._check_last(x, "x", "d_in", self.d_in)
        x = self.normalization(x).apply(x)
        if self.refinement is not None:
            check_spec(self.gate.spec(hard))
            return rounds_of.encode(self, x)
        b_dec = self.b_dec if self.apply_b_dec_to_input else None
        gate, spec = self.gate.tensors(), self.gate.spec(hard)
        return rational_encode(x, self.W_enc, self.b_enc, b_dec, gate, spec, self.backend)

    def forward(self, x: Tensor) -> Tensor:
        """Activations [..., d_in] -> reconstructions [..., d_in]."""
        if self.refinement is None or self.backend == "eager" or transformed():
            return super().forward(x)
        x = self._check_last(x, "x", "d_in", self.d_in)
        affine = self.normalization(x)
        return affine.undo(rounds_of.reconstruct(self, affine.apply(x)))

    def autoencode(
        self,
        x: Tensor,
        *,
        hard: bool = True,
        l1_weight: float = 0.0,
        l0_weight: float = 0.0,
        chunk_tokens: int | None = None,
        chunk_features: int | None = None,
        memory: str = "dense",
        exact: bool = False,
        most_entries: int | None = None,
        across: Across | None = None,
        target: Tensor | None = None,
    ) -> Autoencoded:
        """The training loss of activations [..., d_in] and its gradients, piece by piece; see `rational_autoencode`.

        Equal to rounding to the same loss built from `encode_with_sums` and `decode`, in a fraction of the memory.
        `target` is what is to be reconstructed, x when None.

        Raises:
            ConfigError: x requires a gradient and the SAE normalises every token, or a target for an SAE that does, or
                that has several rounds.
        """
        refuse_transforms("autoencode")
        x = self._check_last(x, "x", "d_in", self.d_in)
        normalized = self.normalize_activations != "none"
        if normalized and x.requires_grad:
            raise ConfigError("autoencode gives no gradient through a token's normalisation; detach x, or use encode")
        if target is not None and (normalized or self.refinement is not None):
            raise ConfigError("an SAE that normalises every token, or has several rounds, has no target but x")
        if self.refinement is not None:
            check_spec(self.gate.spec(hard))
            return rounds_of.autoencode(self, x, l1_weight=l1_weight, l0_weight=l0_weight, across=across)
        affine = self.normalization(x)
        scale = None
        if normalized:
            # Undone by another number than it was applied with (`normalization`): the target is not what is encoded.
            scale = torch.as_tensor(affine.scale)
            target = ((x - affine.shift) / scale.clamp_min(torch.finfo(scale.dtype).tiny)).to(x.dtype)
        result = rational_autoencode(
            affine.apply(x),
            self.W_enc,
            self.b_enc,
            self.W_dec,
            self.b_dec,
            self.gate.tensors(),
            self.gate.spec(hard),
            l1_weight=l1_weight,
            l0_weight=l0_weight,
            chunk_tokens=chunk_tokens,
            chunk_features=chunk_features,
            memory=memory,
            exact=exact,
            most_entries=most_entries,
            apply_b_dec_to_input=self.apply_b_dec_to_input,
            target=target,
            residual_scale=scale,
            backend=self.backend,
            across=across,
        )
        return result._replace(x_hat=affine.undo(result.x_hat)) if normalized else result

    def encode_sparse(self, x: Tensor, capacity: int | None = None, *, k: int | None = None) -> SparseCode:
        """The code of x [..., d_in] as rows of values and feature indices: `rsae_triton.encode_sparse`."""
        return encode_sparse(self, x, capacity, k=k)

    def decode_sparse(self, code: SparseCode, x: Tensor | None = None) -> Tensor:
        """A code as rows -> reconstructions [..., d_in]; see `rsae_triton.decode_sparse`."""
        return decode_sparse(self, code, x)

    @torch.no_grad()
    def constrain_(self) -> None:
        """Projects the gates' thresholds onto theta >= 0 after an optimiser step."""
        self.gate.constrain_()
        if self.refinement is not None:
            self.refinement.constrain_()

    def _scale_nonlinearity_(self, scale: Tensor) -> None:
        self.gate.scale_features_(scale)
        if self.refinement is not None:
            self.refinement.scale_features_(scale.to(self.refinement.unit))

    def _scale_activations_(self, scale: float) -> None:
        if self.refinement is not None:
            self.refinement.scale_activations_(scale)

    def to_jumprelu(self, activations: Any, targets: Tensor | None = None) -> tuple[JumpReluSAE, DenseExport]:
        """The nearest JumpReLU SAE, for tools that know nothing else, and how much it loses; see `export.py`.

        Of a transcoder, with `targets` as in `upgrade`, the nearest JumpReLU transcoder.
        """
        from rsae_triton.sae.export import to_jumprelu

        return to_jumprelu(self, activations, targets)

    def empty_jumprelu(self, **options: Any) -> JumpReluSAE:
        """A JumpReLU SAE of this one's sizes, for weights to be put into."""
        return JumpReluSAE(
            self.d_in,
            self.d_sae,
            apply_b_dec_to_input=self.apply_b_dec_to_input,
            normalize_activations=self.normalize_activations,
            **options,
        )

    def config(self) -> dict[str, Any]:
        rounds = {"rounds": self.rounds} if self.rounds > 1 else {}  # files of one round stay what they were
        return {**super().config(), **self.gate.config(), **rounds}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        rounds = config.get("rounds", 1)
        return cls(gate=RationalGate.from_config(config), rounds=rounds, **cls.common_arguments(config))

    @classmethod
    def from_files(cls, config: dict[str, Any], weights: dict[str, Tensor], source: str | Path) -> Self:
        """As `SparseAutoencoder.from_files`; FormatError also for features of a coefficient set that is not there."""
        sae = super().from_files(config, weights, source)
        try:
            sae.gate.check_groups()
            sae.gate.check_values()
            if sae.refinement is not None:
                sae.refinement.check_values()
        except (ConfigError, ShapeError) as error:
            raise FormatError(f"gate.group_of in {source}: {error}") from error
        except NumericsError as error:
            raise NumericsError(f"the gate in {source}: {error}") from error
        return sae

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        device: torch.device | str = "cpu",
        *,
        revision: str | None = None,
        backend: str = "auto",
    ) -> Self:
        """Loads what `save_pretrained` or `push_to_hub` wrote; see `SparseAutoencoder.from_pretrained`."""
        resolve_backend(backend, parse_device(device) or torch.device("cpu"), torch.float32)
        sae = super().from_pretrained(source, device, revision=revision)
        sae.backend = backend
        return sae

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backend={self.backend}" + (
            f", rounds={self.rounds}" if self.rounds > 1 else ""
        )


def initial_gate(d_sae: int, degree: tuple[int, int] | None, form: str, options: dict[str, Any]) -> RationalGate:
    """The gate that nothing has been said about: ReLU's minimax fit, or the ramp at threshold 0."""
    fit = fit_gate("ramp" if form == "gated" else "relu", (3, 2) if degree is None else degree)
    return RationalGate.from_fit(fit, d_sae, form=form, **options)
