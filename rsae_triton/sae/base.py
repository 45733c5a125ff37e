"""`SparseAutoencoder`, the base class: weights in SAELens' layout, shape checks, encoding, decoding, scaling."""

from __future__ import annotations

import abc
import importlib
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rsae_triton.common.checks import (
    check_flag,
    check_integer,
    check_number,
    check_room,
    check_tensor,
    parse_device,
    shown,
)
from rsae_triton.common.errors import ConfigError, NumericsError, ResourceError, ShapeError
from rsae_triton.ops.encode import product_like
from rsae_triton.ops.reference import transformed
from rsae_triton.sae.normalization import MODES, Affine, normalize
from rsae_triton.sae.pretrained import Pretrained
from rsae_triton.sae.units import UNITS


class SparseAutoencoder(Pretrained):
    """Base of teachers and of `FusedRationalSAE`.

    Attributes:
        W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in]: trainable.
        compares_features: whether a feature's code depends on the token's other features (TopK). If so, neither the
            features nor a loss over them can be split into pieces.
        metadata: provenance (hook_name, model_name, activation_scale, ...), which is saved and loaded with the weights.
        units: the factor on the model's activations that this SAE expects (1.0: none), or None if unknown.

    Args:
        d_in, d_sae: width of the activations and number of features, both at least 1.
        apply_b_dec_to_input: whether b_dec is subtracted from the input before encoding.
        normalize_activations: the normalisation of every token before encoding, which is undone on the reconstruction
            (see `normalization`); h, z and the weights are then in normalised units; x and x_hat never are.
        dtype, device: of the weights. generator: seeds the random initial weights.
        initialise: False leaves the weights uninitialised, to be loaded.
    """

    compares_features: ClassVar[bool] = False

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        apply_b_dec_to_input: bool = True,
        normalize_activations: str = "none",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        metadata: dict[str, Any] | None = None,
        generator: torch.Generator | None = None,
        initialise: bool = True,
    ) -> None:
        super().__init__()
        for name, size in (("d_in", d_in), ("d_sae", d_sae)):
            check_integer(name, size, 1)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
            raise ConfigError(f"dtype is {dtype!r}; give one of floating point, such as torch.float32")
        check_flag("apply_b_dec_to_input", apply_b_dec_to_input)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ConfigError(f"generator is {shown(generator)}; give torch.Generator().manual_seed(...)")
        if metadata is not None and not isinstance(metadata, Mapping):
            raise ConfigError(f"metadata is a {type(metadata).__name__}; give a dictionary")
        check_room(f"W_enc [d_in={d_in}, d_sae={d_sae}]", (d_in, d_sae), dtype)
        device = parse_device(device)
        if normalize_activations not in MODES:
            raise ConfigError(f"normalize_activations is {normalize_activations!r}; choose one of {', '.join(MODES)}")
        self.d_in, self.d_sae = d_in, d_sae
        self.apply_b_dec_to_input = apply_b_dec_to_input
        self.normalize_activations = normalize_activations
        self.metadata = dict(metadata or {})
        try:
            encoder, decoder = _weights(d_in, d_sae, dtype, device, generator, initialise)
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            raise ResourceError(f"no memory for an SAE of d_in={d_in}, d_sae={d_sae} on {device or 'cpu'}") from error
        self.W_dec = nn.Parameter(decoder)
        self.W_enc = nn.Parameter(encoder)
        self.b_enc = nn.Parameter(torch.zeros(d_sae, dtype=dtype, device=device))
        self.b_dec = nn.Parameter(torch.zeros(d_in, dtype=dtype, device=device))

    # -- the forward pass

    @abc.abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Encodes activations [..., d_in] as a sparse code [..., d_sae]."""

    def encode_with_counts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the code, and on how many tokens each feature is active, [d_sae].

        If an SAE has trainable thresholds, the counts are differentiable, so that l0 can be penalised.
        """
        z = self.encode(x)
        return z, (z != 0).reshape(-1, self.d_sae).sum(0).float()

    def decode(self, feature_acts: Tensor, x: Tensor | None = None) -> Tensor:
        """Decodes codes [..., d_sae] to reconstructions [..., d_in].

        Args:
            x: the activations [..., d_in] that the codes were made from. An SAE that normalises every token needs it,
                to give the reconstruction the token's own mean and scale; others ignore it.

        Raises:
            ConfigError: x is needed and missing.
            ShapeError: a wrong width.
        """
        feature_acts = self._check_last(feature_acts, "feature_acts", "d_sae", self.d_sae)
        return self.denormalize(feature_acts @ self.W_dec + self.b_dec, x)

    def denormalize(self, x_hat: Tensor, x: Tensor | None) -> Tensor:
        """Restores each token's own mean and scale in x_hat [..., d_in], as `decode` returns it."""
        if self.normalize_activations == "none":
            return x_hat
        if x is not None:
            check_tensor("x", x, x_hat.device)
            if x.shape != x_hat.shape:
                raise ShapeError(f"x has shape {tuple(x.shape)}; the code is of activations {tuple(x_hat.shape)}")
        else:
            raise ConfigError(
                f"this SAE normalises every token ({self.normalize_activations}) and a code alone does not say what "
                "to undo; use decode(feature_acts, x) or forward(x)"
            )
        return self.normalization(x).undo(x_hat)

    def forward(self, x: Tensor) -> Tensor:
        """Encodes and decodes activations [..., d_in]; returns reconstructions [..., d_in]."""
        return self.decode(self.encode(x), x)

    def normalization(self, x: Tensor) -> Affine:
        """The normalisation of every token of x [..., d_in] before the encoder; the identity for most SAEs."""
        return normalize(x, self.normalize_activations)

    def hidden_pre(self, x: Tensor) -> Tensor:
        """Returns the pre-activations h [..., d_sae] of activations [..., d_in]."""
        x = self._check_last(x, "x", "d_in", self.d_in)
        x = self.normalization(x).apply(x)
        if not self.apply_b_dec_to_input:
            return x @ self.W_enc + self.b_enc
        if torch.is_autocast_enabled(x.device.type) or x.requires_grad or transformed():
            return (x - self.b_dec) @ self.W_enc + self.b_enc
        return _CentredLinear.apply(x, self.W_enc, self.b_enc, self.b_dec)

    def _check_last(self, tensor: Tensor, name: str, size_name: str, size: int) -> Tensor:
        """Returns the tensor if it fits. A tensor of lower precision (from a bfloat16 model) is converted to the
        weights' dtype."""
        weights = self.W_dec
        check_tensor(name, tensor, weights.device)
        if tensor.dim() == 0 or tensor.shape[-1] != size:
            raise ShapeError(f"{name} has shape {tuple(tensor.shape)}; its last dimension must be {size_name}={size}")
        if tensor.dtype == weights.dtype or torch.is_autocast_enabled(weights.device.type):
            return tensor
        if torch.promote_types(tensor.dtype, weights.dtype) == weights.dtype:
            return tensor.to(weights.dtype)
        raise ConfigError(f"{name} is {tensor.dtype} but the SAE is {weights.dtype}; convert one of them with .to(...)")

    def with_rounds(
        self,
        rounds: int,
        activations: Any,
        *,
        target_l0: float | None = None,
        weights: Tensor | None = None,
        n_tokens: int = 8192,
        seed: int = 0,
    ) -> Any:
        """Returns this SAE as a `FusedRationalSAE` with an encoder of `rounds` rounds. Nothing is trained.

        See `rsae_triton.sae.adding.with_rounds` for the arguments.
        """
        # Imported here, because the module that adds rounds imports this one.
        adding = importlib.import_module("rsae_triton.sae.adding")
        options = {"target_l0": target_l0, "weights": weights, "n_tokens": n_tokens, "seed": seed}
        return adding.with_rounds(self, rounds, activations, **options)

    def extra_repr(self) -> str:
        """Sizes, place, units and, where known, l0 and the scale of the activations."""
        said = [f"d_in={self.d_in}, d_sae={self.d_sae}"]
        said += [f"{key}={value}" for key in ("k",) if (value := getattr(self, key, None)) is not None]
        for key in ("model_name", "hook_name"):
            if self.metadata.get(key):
                said.append(f"{key.removesuffix('_name')}={self.metadata[key]}")
        if isinstance(stage := self.metadata.get("stage1"), Mapping) and isinstance(stage.get("l0"), int | float):
            said.append(f"l0={stage['l0']:.1f}")
        if self.units not in (None, 1.0):
            said.append(f"units={self.units:.4g}")
        return ", ".join(said)

    # -- weights

    @torch.no_grad()
    def scale_decoder_rows_(self, norms: Tensor) -> None:
        """Gives every decoder row the norm in `norms` [d_sae, 1]; rows of zeros stay."""
        self.W_dec.mul_(norms / self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))

    @torch.no_grad()
    def constrain_(self) -> None:
        """Projects the parameters onto their valid range after an optimiser step; nothing to do for most SAEs."""

    @property
    def row_width(self) -> int:
        """Width of the rows that it is trained and scored on: d_in, or d_in + d_out for a transcoder."""
        return self.d_in

    def sides(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Splits such rows into input and target, which are the same except for a transcoder."""
        return rows, rows

    @property
    def units(self) -> float | None:
        """The factor on the model's activations that this SAE expects; None if unknown.

        It is 1.0 for SAEs that were loaded, and the store's scale for one trained on a store from the beginning.
        Functions that take a store and an SAE convert between the two themselves.
        """
        value = self.metadata.get(UNITS)
        return None if value is None else float(value)

    @units.setter
    def units(self, value: float | None) -> None:
        if value is None:
            self.metadata.pop(UNITS, None)
            return
        check_number("units", value, above=0)
        self.metadata[UNITS] = float(value)

    @property
    def all_units(self) -> tuple[float, ...] | None:
        """The arguments with which `to_units_` restores the present units: one number, two for a transcoder; None if
        unknown."""
        return None if self.units is None else (self.units,)

    @torch.no_grad()
    def to_units_(self, units: float) -> Self:
        """Changes the SAE so that it reads the model's activations times `units` (1.0: unscaled). Codes do not change.

        Raises:
            ConfigError: the present units are unknown (set `sae.units`).
        """
        check_number("units", units, above=0)
        before = self.units
        if before is None:
            raise ConfigError(
                "the units that this SAE reads are unknown; set sae.units (1.0: raw activations, "
                "store.scale: a store's rows)"
            )
        if units != before:
            self.fold_activation_scale_(before / units)
            self.units = units  # exactly, without rounding
        return self

    @torch.no_grad()
    def fold_activation_scale_(self, scale: float) -> Self:
        """Turns an SAE of x * scale into the same SAE of x. Codes do not change; reconstructions are in x's units.

        `to_units_` calls this, so there is seldom a reason to call it directly. An SAE that normalises every token
        gives the same result either way, and its weights are not changed.
        """
        try:
            check_number("activation scale", scale, above=0)
            both = torch.tensor([scale, 1 / scale], dtype=self.W_enc.dtype)
        except ConfigError as error:
            raise NumericsError(str(error)) from error
        if not bool(((both > 0) & both.isfinite()).all()):
            raise NumericsError(f"activation scale is {scale:g}; weights of {self.W_enc.dtype} cannot take it")
        if self.units is not None:
            self.units = self.units / scale
        if self.normalize_activations != "none":
            return self
        self.W_enc.mul_(scale)
        self.W_dec.div_(scale)
        self.b_dec.div_(scale)
        self._scale_activations_(scale)
        return self

    @torch.no_grad()
    def fold_decoder_norm_(self) -> Self:
        """Gives every decoder row norm 1 and multiplies its feature's codes by the norm it had.

        Reconstructions do not change. Rows of zeros stay.

        Raises:
            ConfigError: norms are not 1 and this kind of SAE cannot be rescaled (a TopK would choose other features).
        """
        norms = self.W_dec.float().norm(dim=1)
        norms = torch.where(norms > 0, norms, 1.0)
        if torch.allclose(norms, torch.ones_like(norms), rtol=0, atol=1e-6):
            return self
        self._scale_nonlinearity_(norms)
        norms = norms.to(self.W_dec.dtype)
        self.W_dec.div_(norms[:, None])
        self.W_enc.mul_(norms)
        self.b_enc.mul_(norms)
        return self

    def _scale_activations_(self, scale: float) -> None:
        """Adapts everything else when W_enc is multiplied by scale and the decoder divided by it; nothing in most
        SAEs."""

    def _scale_nonlinearity_(self, scale: Tensor) -> None:
        """Changes the nonlinearity f of every feature to scale * f(h / scale), scale [d_sae]."""
        raise ConfigError(f"the decoder norms of a {type(self).__name__} cannot be folded into its codes")


def _weights(
    d_in: int,
    d_sae: int,
    dtype: torch.dtype,
    device: torch.device | None,
    generator: torch.Generator | None,
    initialise: bool,
) -> tuple[Tensor, Tensor]:
    """Returns W_enc and W_dec: random directions and their transpose, or uninitialised memory.

    W_enc [d_in, d_sae] is stored feature by feature, like W_dec. All work on a feature (its column of a product, its
    gradient, its optimiser step, its shard) then reads contiguous memory. In files it is stored row by row.
    """
    if not initialise:
        encoder, decoder = (torch.empty(d_sae, d_in, device=device, dtype=dtype) for _ in range(2))
        return encoder.t(), decoder
    decoder = torch.randn(d_sae, d_in, generator=generator)
    decoder = (decoder / decoder.norm(dim=1, keepdim=True)).to(device=device, dtype=dtype)
    return decoder.clone().t(), decoder


class _CentredLinear(torch.autograd.Function):
    """(x - b_dec) @ W_enc + b_enc for an x without gradient. The gradient of b_dec is then a mat-vec, not a third
    GEMM."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
        centred = (x - b_dec).reshape(-1, x.shape[-1])
        ctx.save_for_backward(centred, W_enc)
        return torch.addmm(b_enc, centred, W_enc).reshape(*x.shape[:-1], W_enc.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        centred, W_enc = ctx.saved_tensors
        dh = grads[0].reshape(-1, W_enc.shape[1])
        db_enc = dh.sum(0)
        return None, product_like(W_enc, centred.t(), dh), db_enc, -(W_enc @ db_enc)


def check_sae(name: str, value: Any) -> None:
    """Raises ConfigError unless `value` is an SAE of this package."""
    if not isinstance(value, SparseAutoencoder):
        raise ConfigError(
            f"{name} is a {type(value).__name__}; give an SAE of this package, such as load_teacher returns"
        )
