"""Transcoders: they read activations at one place of a model and reconstruct those at another.

    z = gate(x @ W_enc + b_enc),   y_hat = z @ W_dec + b_dec  (+ x @ W_skip.T)

For example, x is the input of an MLP and y its output (arXiv:2406.11944; with the skip: arXiv:2501.18823). Each kind is
the SAE with that nonlinearity and another decoder, under SAELens' name if it has one.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from rsae_triton.common.checks import check_flag, check_integer, check_number, check_tensor
from rsae_triton.common.errors import ConfigError, NumericsError, ShapeError
from rsae_triton.ops.autoencode import Autoencoded
from rsae_triton.sae.architectures import JumpReluSAE, ReluSAE, TopKSAE
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.rational import FusedRationalSAE


class Transcoder(SparseAutoencoder):
    """Base of all transcoders; each kind is a subclass.

    Attributes:
        d_out: width of what is reconstructed. W_dec [d_sae, d_out], b_dec [d_out].
        W_skip: [d_out, d_in] (SAELens' layout), or None. Decoding then needs x.
        metadata: hook_name is where x is read, hook_name_out where y is.

    Args:
        d_in, d_sae, options: those of the SAE with this nonlinearity; b_dec is never subtracted from x, and tokens are
            not normalised.
        d_out: the width that is written; d_in when None. skip: whether there is a W_skip; it starts as zeros.
    """

    def __init__(self, d_in: int, d_sae: int, *, d_out: int | None = None, skip: bool = False, **options: Any) -> None:
        if options.pop("apply_b_dec_to_input", False):
            raise ConfigError("b_dec of a transcoder belongs to its output; it cannot be subtracted from its input")
        if options.get("normalize_activations", "none") != "none":
            raise ConfigError("a transcoder does not normalise tokens: its input and its output have different scales")
        if options.get("rounds", 1) != 1:
            raise ConfigError(NO_ROUNDS)
        check_flag("skip", skip)
        super().__init__(d_in, d_sae, apply_b_dec_to_input=False, **options)
        self.d_out = d_in if d_out is None else d_out
        check_integer("d_out", self.d_out, 1)
        if self.d_out != d_in:
            decoder = self.W_dec.new_empty(d_sae, self.d_out)
            if options.get("initialise", True):
                drawn = torch.randn(d_sae, self.d_out, generator=options.get("generator"))
                decoder = (drawn / drawn.norm(dim=1, keepdim=True)).to(decoder)
            self.W_dec = nn.Parameter(decoder)
            self.b_dec = nn.Parameter(self.b_dec.new_zeros(self.d_out))
        self.W_skip = nn.Parameter(self.W_dec.new_zeros(self.d_out, d_in)) if skip else None

    # -- the forward pass

    def decode(self, feature_acts: Tensor, x: Tensor | None = None) -> Tensor:
        """Decodes codes [..., d_sae] to reconstructions y_hat [..., d_out].

        Args:
            x: the input that the codes were made from [..., d_in]; needed with a W_skip, otherwise ignored.

        Raises:
            ConfigError: there is a W_skip, and no x.
        """
        feature_acts = self._check_last(feature_acts, "feature_acts", "d_sae", self.d_sae)
        return self.denormalize(feature_acts @ self.W_dec + self.b_dec, x)

    def denormalize(self, x_hat: Tensor, x: Tensor | None) -> Tensor:
        """Adds the skip connection's part to the decoded code."""
        return x_hat if self.W_skip is None else x_hat + self.skipped(x)

    def skipped(self, x: Tensor | None) -> Tensor:
        """x @ W_skip.T [..., d_out]. Raises ConfigError without x."""
        if self.W_skip is None:
            raise ConfigError("this transcoder has no skip connection")
        if x is None:
            raise ConfigError(
                "this transcoder adds x @ W_skip.T, which a code alone does not say; use decode(feature_acts, x) or "
                "forward(x)"
            )
        check_tensor("x", x, self.W_skip.device)
        return x @ self.W_skip.t()

    @property
    def row_width(self) -> int:
        return self.d_in + self.d_out

    def sides(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Splits rows [n, d_in + d_out], which hold x and y beside each other as batches of pairs do."""
        if rows.shape[-1] != self.row_width:
            raise ShapeError(
                f"rows have shape {tuple(rows.shape)}; a transcoder takes x beside y, [n, d_in + d_out = "
                f"{self.row_width}]: give inputs and targets=, or a PairedStore"
            )
        return rows[..., : self.d_in], rows[..., self.d_in :]

    # -- scales

    @property
    def units_out(self) -> float | None:
        """Like `units`, for the activations that it writes."""
        value = self.metadata.get(UNITS_OUT)
        return None if value is None else float(value)

    @units_out.setter
    def units_out(self, value: float | None) -> None:
        if value is None:
            self.metadata.pop(UNITS_OUT, None)
            return
        check_number("units_out", value, above=0)
        self.metadata[UNITS_OUT] = float(value)

    @property
    def all_units(self) -> tuple[float, ...] | None:
        return None if self.units is None else (self.units, self.units if self.units_out is None else self.units_out)

    @torch.no_grad()
    def to_units_(self, units: float, units_out: float | None = None) -> Self:
        """Changes the transcoder to read the model's activations times `units` and to write them times `units_out`.

        Raises:
            ConfigError: the present units are unknown, or units other than 1.0 (raw activations) without units_out.
        """
        if units_out is None and units != 1.0:
            raise ConfigError("a transcoder has two units; give to_units_(units, units_out), such as *store.scales")
        units_out = 1.0 if units_out is None else units_out
        for name, value in (("units", units), ("units_out", units_out)):
            check_number(name, value, above=0)
        before = self.all_units
        if before is None:
            raise ConfigError("the units of this transcoder are unknown; set .units and .units_out (1.0: the model's)")
        if (units, units_out) != before:
            self.fold_activation_scale_(before[0] / units, before[1] / units_out)
        self.units, self.units_out = units, units_out  # exactly, without rounding
        if units == units_out == 1.0:
            self.units_out = None
        return self

    @torch.no_grad()
    def fold_activation_scale_(self, scale: float, scale_out: float | None = None) -> Self:
        """Turns a transcoder from x * scale to y * scale_out into the same one from x to y. Codes do not change.

        Raises:
            ConfigError: scale_out is missing, since input and output have different scales.
        """
        if scale_out is None:
            raise ConfigError("a transcoder has two scales; give fold_activation_scale_(scale, scale_out)")
        for name, one in (("scale", scale), ("scale_out", scale_out)):
            try:
                check_number(name, one, above=0)
            except ConfigError as error:
                raise NumericsError(str(error)) from error
        factors = torch.tensor([scale, 1 / scale_out, scale / scale_out], dtype=self.W_enc.dtype)
        if not bool(((factors > 0) & factors.isfinite()).all()):
            raise NumericsError(f"scales are {scale:g}, {scale_out:g}; weights of {self.W_enc.dtype} cannot take them")
        if (known := self.all_units) is not None:
            self.units, self.units_out = known[0] / scale, known[1] / scale_out
        self.W_enc.mul_(scale)
        self.W_dec.div_(scale_out)
        self.b_dec.div_(scale_out)
        if self.W_skip is not None:
            self.W_skip.mul_(scale / scale_out)
        return self

    def with_rounds(self, *_: Any, **__: Any) -> Any:
        """Not available for a transcoder (ConfigError): a further round needs the residual, and so the target."""
        raise ConfigError(NO_ROUNDS)

    # -- files

    def config(self) -> dict[str, Any]:
        name = self.architecture if self.W_skip is None else with_skip(self.architecture)
        return {**super().config(), "architecture": name, "d_out": self.d_out}

    @staticmethod
    def common_arguments(config: dict[str, Any]) -> dict[str, Any]:
        skip = "skip_" in str(config["architecture"])
        return {**SparseAutoencoder.common_arguments(config), "d_out": config.get("d_out"), "skip": skip}

    @classmethod
    def architectures(cls) -> set[str]:
        return {cls.architecture, with_skip(cls.architecture)}

    def extra_repr(self) -> str:
        skip = ", with a skip connection" if self.W_skip is not None else ""
        return f"d_in={self.d_in}, d_sae={self.d_sae}, d_out={self.d_out}{skip}"


UNITS_OUT = "units_out"
NO_ROUNDS = (
    "rounds are for SAEs: a further round encodes what the first left of its target, and where a transcoder encodes it "
    "does not have its target; gate, thresholds and training are the same as an SAE's"
)


def with_skip(architecture: str) -> str:
    """SAELens' name of an architecture with a skip connection."""
    return architecture.replace("transcoder", "skip_transcoder")


class ReluTranscoder(Transcoder, ReluSAE):
    """z = relu(h); SAELens' "transcoder" and "skip_transcoder"."""

    architecture: ClassVar[str] = "transcoder"


class JumpReluTranscoder(Transcoder, JumpReluSAE):
    """z = h * 1[h > threshold_f]; SAELens' "jumprelu_transcoder" and "jumprelu_skip_transcoder"."""

    architecture: ClassVar[str] = "jumprelu_transcoder"


class TopKTranscoder(Transcoder, TopKSAE):
    """z keeps each token's k largest pre-activations; sparsify's transcoders. SAELens does not have this kind."""

    architecture: ClassVar[str] = "topk_transcoder"


class RationalTranscoder(Transcoder, FusedRationalSAE):
    """A transcoder with a rational gate: the result of `upgrade(teacher, inputs, targets=...)`."""

    architecture: ClassVar[str] = "rational_transcoder"

    def autoencode(self, x: Tensor, *, target: Tensor | None = None, **options: Any) -> Autoencoded:
        """See `FusedRationalSAE.autoencode`; `target` [..., d_out] is what is reconstructed.

        Raises:
            ConfigError: no target, or widths that differ (then train with memory="saved").
        """
        if target is None:
            raise ConfigError("a transcoder reconstructs something other than x; give target=")
        if self.d_out != self.d_in:
            raise ConfigError(
                f"a loss in pieces takes d_out = d_in, not {self.d_out} and {self.d_in}; use memory='saved'"
            )
        if self.W_skip is None:
            return super().autoencode(x, target=target, **options)
        # The pieces get what the skip leaves over; the gradient of the skip comes from the final error.
        rest = (target - self.skipped(x)).detach()
        cut = super().autoencode(x, target=rest, **options)
        error = (target - cut.x_hat.detach() - self.skipped(x)).square().sum(-1).mean()
        y_hat = cut.x_hat + self.skipped(x).detach()
        return cut._replace(total=cut.total + (error - error.detach()), x_hat=y_hat)

    def empty_jumprelu(self, **options: Any) -> JumpReluTranscoder:
        skip = self.W_skip is not None
        return JumpReluTranscoder(self.d_in, self.d_sae, d_out=self.d_out, skip=skip, **options)


KINDS: dict[str, type[Transcoder]] = {
    kind.architecture: kind for kind in (ReluTranscoder, JumpReluTranscoder, TopKTranscoder, RationalTranscoder)
}
"""The kinds by their name in cfg.json, without "skip_"."""


def kind_of(architecture: str) -> type[Transcoder] | None:
    """The class for an architecture's name, with or without a skip connection; None if it is not a transcoder."""
    return KINDS.get(architecture.replace("skip_", ""))
