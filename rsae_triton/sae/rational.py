"""`FusedRationalSAE`: the drop-in Rational SAE, whose encoder runs fused."""

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

    `encode`, `decode` and `forward` take any leading shape; the codes carry exact zeros. On a CUDA device the encoder
    runs in Triton kernels, forward and backward; elsewhere it uses the CPU backend.

    Args:
        d_in, d_sae: width of the activations, number of features.
        degree, groups, form, domain, amplitude, backward: of the gate, see `RationalGate`. groups=1 shares one
            rational, groups=d_sae gives every feature its own.
        gate: a ready `RationalGate`, from which the six arguments above are then taken.
        rounds: how many rounds the encoder makes (docs/rounds.md); more than one needs form="gated". Their numbers are
            first guesses: `upgrade` and `with_rounds` search for them on activations. weighed: whether the further
            rounds weigh the dimensions of x; the weights are then in `refinement.weights`, at first all 1.
        backend: "auto", "triton", "cpu" or "eager" (see `rsae_triton.ops.encode`).
        apply_b_dec_to_input, normalize_activations, dtype, device, metadata, generator, initialise: see
            `SparseAutoencoder`.

    Without `gate`, a direct gate starts as the minimax fit of ReLU and a gated one as that of the ramp, both of degree
    (3, 2) by default.
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
        weighed: bool = False,
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
        if weighed and rounds == 1:
            raise ConfigError("weighed=True is for further rounds, and there are none: give rounds=2 or more")
        self.refinement = self._refinement(rounds, torch.ones(d_in) if weighed else None) if rounds > 1 else None
        self.backend = backend
        resolve_backend(backend if backend != "triton" else "auto", self.W_enc.device, dtype)

    def _refinement(self, rounds: int, weights: Tensor | None = None) -> Refinement:
        made = Refinement(self.d_sae, rounds, weights=weights, device=self.gate.threshold.device)
        with torch.no_grad():
            made.threshold.copy_(self.gate.threshold)
            made.epsilon.fill_(EPSILON * self.d_in)
            # Uninitialised weights have no norms yet.
            squares = (
                (self.W_dec.float() if made.weights is None else self.W_dec.float() * made.weights).square().sum(1)
            )
            made.unit.copy_(torch.where((squares > 0) & squares.isfinite(), 1 / squares, 0))
        return made

    @property
    def rounds(self) -> int:
        """The number of rounds of the encoder: 1, or as many as `with_rounds` has added."""
        return 1 if self.refinement is None else self.refinement.rounds

    def encode(self, x: Tensor, *, hard: bool = True) -> Tensor:
        """Encodes activations [..., d_in] as a sparse code [..., d_sae]; hard=False gives the dense rational code."""
        return self.encode_with_counts(x, hard=hard)[0]

    def encode_with_counts(self, x: Tensor, *, hard: bool = True) -> tuple[Tensor, Tensor]:
        """Returns the code as `encode` does, and the differentiable activity counts [d_sae] (float32)."""
        encoded = self.encode_with_sums(x, hard=hard)
        return encoded.z, encoded.counts  # torch 2.6 cannot compile a slice of this tuple

    def encode_with_sums(self, x: Tensor, *, hard: bool = True) -> Encoded:
        """Returns the code as `encode` does, with the sums for a sparsity penalty: counts and sums of |z|, [d_sae]."""
        x = self._check_last(x, "x", "d_in", self.d_in)
        x = self.normalization(x).apply(x)
        if self.refinement is not None:
            check_spec(self.gate.spec(hard))
            return rounds_of.encode(self, x)
        b_dec = self.b_dec if self.apply_b_dec_to_input else None
        gate, spec = self.gate.tensors(), self.gate.spec(hard)
        return rational_encode(x, self.W_enc, self.b_enc, b_dec, gate, spec, self.backend)

    def forward(self, x: Tensor) -> Tensor:
        """Encodes and decodes activations [..., d_in]; returns reconstructions [..., d_in]."""
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
        """Computes the training loss of activations [..., d_in] and its gradients in pieces; see `rational_autoencode`.

        The result equals, up to rounding, the same loss built from `encode_with_sums` and `decode`, and takes a
        fraction of the memory. `target` is what is reconstructed; x when None.

        Raises:
            ConfigError: x requires a gradient and the SAE normalises every token; or there is a target and the SAE
                normalises every token or has several rounds; or it has several rounds, which always work on entries,
                and is to be cut into pieces.
        """
        refuse_transforms("autoencode")
        x = self._check_last(x, "x", "d_in", self.d_in)
        normalized = self.normalize_activations != "none"
        if normalized and x.requires_grad:
            raise ConfigError("autoencode gives no gradient through a token's normalisation; detach x, or use encode")
        if target is not None and (normalized or self.refinement is not None):
            raise ConfigError("an SAE that normalises every token, or has several rounds, has no target but x")
        if self.refinement is not None:
            if (chunk_tokens, chunk_features, most_entries) != (None, None, None):
                raise ConfigError(
                    "chunk_tokens, chunk_features and most_entries are for one round; an encoder with more works on "
                    "entries, which take little memory: leave them out"
                )
            check_spec(self.gate.spec(hard))
            weights = {"l1_weight": l1_weight, "l0_weight": l0_weight}
            return rounds_of.autoencode(self, x, **weights, across=across, exact=exact)
        affine = self.normalization(x)
        own, scale = affine.target(x)
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
            target=target if own is None else own,
            residual_scale=scale,
            backend=self.backend,
            across=across,
        )
        return result._replace(x_hat=affine.undo(result.x_hat)) if normalized else result

    def encode_sparse(self, x: Tensor, capacity: int | None = None, *, k: int | None = None) -> SparseCode:
        """Encodes x [..., d_in] as rows of values and feature indices; see `rsae_triton.encode_sparse`."""
        return encode_sparse(self, x, capacity, k=k)

    def decode_sparse(self, code: SparseCode, x: Tensor | None = None) -> Tensor:
        """Decodes rows of values and indices to reconstructions [..., d_in]; see `rsae_triton.decode_sparse`."""
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
        """Returns the nearest JumpReLU SAE, for tools that only know that, and how much it loses; see `export.py`.

        For a transcoder, with `targets` as in `upgrade`, it is the nearest JumpReLU transcoder.
        """
        from rsae_triton.sae.export import to_jumprelu

        return to_jumprelu(self, activations, targets)

    def empty_jumprelu(self, **options: Any) -> JumpReluSAE:
        """Makes a JumpReLU SAE with the sizes of this one, to be filled with weights."""
        return JumpReluSAE(
            self.d_in,
            self.d_sae,
            apply_b_dec_to_input=self.apply_b_dec_to_input,
            normalize_activations=self.normalize_activations,
            **options,
        )

    def config(self) -> dict[str, Any]:
        more: dict[str, Any] = {}  # files of SAEs with one round, or without weights, stay as they were
        if self.refinement is not None:
            more = {"rounds": self.rounds, **({} if self.refinement.weights is None else {"rounds_weighed": True})}
        return {**super().config(), **self.gate.config(), **more}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        more = {"rounds": config.get("rounds", 1), "weighed": config.get("rounds_weighed", False)}
        return cls(gate=RationalGate.from_config(config), **more, **cls.common_arguments(config))

    @classmethod
    def from_files(cls, config: dict[str, Any], weights: dict[str, Tensor], source: str | Path) -> Self:
        """See `SparseAutoencoder.from_files`. Also raises FormatError if a feature refers to a missing coefficient
        set."""
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
        """Loads an SAE that `save_pretrained` or `push_to_hub` wrote; see `SparseAutoencoder.from_pretrained`."""
        resolve_backend(backend, parse_device(device) or torch.device("cpu"), torch.float32)
        sae = super().from_pretrained(source, device, revision=revision)
        sae.backend = backend
        return sae

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backend={self.backend}" + (
            f", rounds={self.rounds}" if self.rounds > 1 else ""
        )


def initial_gate(d_sae: int, degree: tuple[int, int] | None, form: str, options: dict[str, Any]) -> RationalGate:
    """The default gate: ReLU's minimax fit, or the ramp at threshold 0."""
    fit = fit_gate("ramp" if form == "gated" else "relu", (3, 2) if degree is None else degree)
    return RationalGate.from_fit(fit, d_sae, form=form, **options)
