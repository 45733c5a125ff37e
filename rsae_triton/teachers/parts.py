"""Builds a teacher from the tensors of any format: what a reader fills in, the exact foldings, and the checks."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from rsae_triton.common.archives import read_torch
from rsae_triton.common.checks import check_finite
from rsae_triton.common.errors import ConfigError, FormatError
from rsae_triton.common.hub import address
from rsae_triton.sae.architectures import JumpReluSAE, ReluSAE, TopKSAE
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.transcoder import JumpReluTranscoder, ReluTranscoder, TopKTranscoder


@dataclass(frozen=True)
class Files:
    """The input of a reader: where the files are, and what the caller knows that the files may not say.

    path: a local folder or file. name: what the caller asked for (hub ids and folder names tell the model and layer).
    k: active features per token. activation_scale: the factor on the activations in training.
    registry_scale, overrides: the same factor, and settings that replace the file's, from SAELens' registry.
    kind: "sae" or "transcoder", where neither files nor name say which.
    """

    path: Path
    name: str
    k: int | None = None
    activation_scale: float | None = None
    registry_scale: float | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    kind: str | None = None

    @property
    def named(self) -> str:
        """The text that tells model and place: a hub id, or the whole local path; never the folder names of a cache."""
        if not Path(self.name).exists():
            there = address(self.name)
            return self.name if there is None else there.name
        whole = os.path.abspath(self.path)
        cached = re.search(r"models--([^/]+?)--([^/]+)/snapshots/[^/]+/?(.*)", whole)
        return "/".join(part for part in cached.groups() if part) if cached else whole

    def scale(self, own: float | None) -> float | None:
        """The factor on the activations: the caller's if given, else the file's (`own`), else the registry's."""
        return next((one for one in (self.activation_scale, own, self.registry_scale) if one is not None), None)

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def has(self, *names: str) -> bool:
        """Whether the folder holds all of these files. If the caller named a file, it must be one of them."""
        if self.path.is_file() and self.path.name not in names:
            return False
        return all((self.folder / name).is_file() for name in names)

    def torch_file(self) -> Path | None:
        """The .pt or .pth file that the caller named, or the only one in the folder; None if none or several."""
        if self.path.is_file():
            return self.path if self.path.suffix in (".pt", ".pth") else None
        found = sorted(one for one in self.folder.iterdir() if one.suffix in (".pt", ".pth"))
        return found[0] if len(found) == 1 else None

    def torch_keys(self) -> set[str]:
        """The top-level names in `torch_file`; empty if there is no file or it cannot be read."""
        path = self.torch_file()
        try:
            return set(map(str, read_torch(path))) if path is not None else set()
        except FormatError:
            return set()


@dataclass
class Parts:
    """The tensors of an SAE in SAELens' orientation, from which `build` makes a teacher.

    W_enc [d_in, d_sae], W_dec [d_sae, d_in], b_enc [d_sae], b_dec [d_in]; zeros where b_enc or b_dec is None. A
    threshold ([d_sae] or one number) makes a JumpReLU, k a TopK, neither a ReLU. metadata: where the SAE comes from.
    folded: what was folded into the weights, in words, for the metadata. transcoder: it writes at another place than it
    reads; W_dec [d_sae, d_out], b_dec [d_out], and maybe W_skip [d_out, d_in].
    """

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Any = None
    b_dec: Any = None
    apply_b_dec_to_input: bool = True
    threshold: Any = None
    k: int | None = None
    relu: bool = True
    normalize_activations: str = "none"
    transcoder: bool = False
    W_skip: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)
    folded: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.W_enc.dim() != 2 or self.W_dec.dim() != 2:
            raise FormatError(
                f"W_enc has shape {tuple(self.W_enc.shape)} and W_dec {tuple(self.W_dec.shape)}; "
                "the weights of an SAE are matrices"
            )
        self.d_in, self.d_sae = self.W_enc.shape
        self.d_out = self.W_dec.shape[1] if self.transcoder else self.d_in
        if self.b_enc is None:
            self.b_enc = self.W_enc.new_zeros(self.d_sae)
        if self.b_dec is None:
            self.b_dec = self.W_dec.new_zeros(self.d_out)
        if self.threshold is not None:
            threshold = torch.as_tensor(self.threshold).float()
            self.threshold = threshold.expand(self.d_sae).clone() if threshold.numel() == 1 else threshold
        shapes = {"W_dec": (self.d_sae, self.d_out), "b_dec": (self.d_out,), "W_skip": (self.d_out, self.d_in)}
        for name, tensor in self.tensors().items():
            expected = shapes.get(name, (self.d_in, self.d_sae) if name == "W_enc" else (self.d_sae,))
            if tuple(tensor.shape) != expected:
                raise FormatError(
                    f"{name} has shape {tuple(tensor.shape)}, but W_enc {tuple(self.W_enc.shape)} makes it {expected}; "
                    "the files do not belong together or are of another format"
                )
            if not tensor.is_floating_point():
                raise FormatError(f"{name} holds {tensor.dtype}; the weights of an SAE are floating-point numbers")

    def tensors(self) -> dict[str, Tensor]:
        names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold", "W_skip")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    # -- foldings: the same function with other weights. Done in float32 at least: in bfloat16 a factor would change
    # every weight by up to 0.4 %.

    def _widen(self) -> None:
        for name, tensor in self.tensors().items():
            setattr(self, name, tensor.to(torch.promote_types(tensor.dtype, torch.float32)))

    def fold_input_scale(self, scale: float, why: str) -> Self:
        """Turns an SAE of x * scale into the same SAE of x. Codes do not change."""
        if not 0 < scale < float("inf"):
            raise FormatError(f"{why}: the factor on the activations is {scale}; it must be a positive number")
        if scale != 1:
            self._widen()
            self.W_enc, self.W_dec, self.b_dec = self.W_enc * scale, self.W_dec / scale, self.b_dec / scale
            self.folded.append(f"{why}: activations * {scale:.9g}")
        return self

    def fold_scales(self, inside: float, outside: float, why: str) -> Self:
        """Turns a transcoder from x * inside to y * outside into the same one from x to y. Codes do not change."""
        for scale in (inside, outside):
            if not 0 < scale < float("inf"):
                raise FormatError(f"{why}: the factor on the activations is {scale}; it must be a positive number")
        if inside != 1 or outside != 1:
            self._widen()
            self.W_enc, self.W_dec, self.b_dec = self.W_enc * inside, self.W_dec / outside, self.b_dec / outside
            self.W_skip = None if self.W_skip is None else self.W_skip * (inside / outside)
            self.folded.append(f"{why}: activations * {inside:.9g} in, * {outside:.9g} out")
        return self

    def fold_whitening(self, mean: Tensor, matrix: Tensor, inverse: Tensor) -> Self:
        """Turns an SAE of (x - mean) @ matrix into the same SAE of x. Codes do not change."""
        dtype = torch.promote_types(self.W_enc.dtype, torch.float32)
        encoder = matrix.double() @ self.W_enc.double()
        if not self.apply_b_dec_to_input:
            self.b_enc = (self.b_enc.double() - mean.double() @ encoder).to(dtype)
        self.W_enc = encoder.to(dtype)
        self.W_dec = (self.W_dec.double() @ inverse.double()).to(dtype)
        self.b_dec = (self.b_dec.double() @ inverse.double() + mean.double()).to(dtype)
        self._widen()
        self.folded.append("whitening of the activations")
        return self

    def fold_decoder_norm(self, why: str) -> Self:
        """Scales decoder rows to unit norm and codes by the norms. Reconstructions do not change."""
        norm = self.W_dec.float().norm(dim=1)
        if not torch.allclose(norm, torch.ones_like(norm)):
            self._widen()
            norm = torch.where(norm > 0, norm, 1.0)
            self.W_enc, self.W_dec = self.W_enc * norm, self.W_dec / norm[:, None]
            self.b_enc = self.b_enc * norm
            if self.threshold is not None:
                self.threshold = self.threshold * norm
            self.folded.append(f"{why}: decoder norms; codes are in units of the reconstruction")
        return self

    def fold_code_scale(self, scale: Tensor, why: str) -> Self:
        """Absorbs a factor [d_sae] that codes are multiplied by before decoding. Reconstructions do not change."""
        self._widen()
        self.W_dec = self.W_dec * scale[:, None].float()
        self.folded.append(why)
        return self

    def gated(self, r_mag: Tensor, b_gate: Tensor, b_mag: Tensor) -> Self:
        """Turns a gated SAE into the JumpReLU SAE that it is equal to (arXiv:2404.16014, section 3.2).

        With v = x @ W_enc, z = 1[v + b_gate > 0] * relu(exp(r_mag) * v + b_mag). In terms of the magnitude
        h = exp(r_mag) * v + b_mag the gate is open where h > b_mag - exp(r_mag) * b_gate.
        """
        for name, tensor in (("r_mag", r_mag), ("b_gate", b_gate), ("b_mag", b_mag)):
            if tuple(tensor.shape) != (self.d_sae,):
                raise FormatError(f"{name} has shape {tuple(tensor.shape)}; a gated SAE has one per feature")
        self._widen()
        gain = r_mag.double().exp()
        self.W_enc = (self.W_enc.double() * gain).to(self.W_enc.dtype)
        self.b_enc = b_mag.to(self.W_enc.dtype)
        self.threshold = (b_mag.double() - gain * b_gate.double()).float()
        self.folded.append("gate and magnitude of a gated SAE: a JumpReLU with a threshold for each feature")
        return self

    def build(self, files: Files, format_name: str) -> SparseAutoencoder:
        """Returns the teacher, with its origin in the metadata.

        Raises:
            FormatError: sizes that do not fit.
            NumericsError: a weight is NaN or infinite.
        """
        provenance = {"format": format_name, "source": files.name, "folded": self.folded}
        metadata = {name: value for name, value in self.metadata.items() if value is not None}
        plain = {"apply_b_dec_to_input": self.apply_b_dec_to_input}
        options: dict[str, Any] = {
            **({"d_out": self.d_out, "skip": self.W_skip is not None} if self.transcoder else plain),
            "normalize_activations": self.normalize_activations,
            "dtype": torch.promote_types(self.W_enc.dtype, self.W_dec.dtype),
            # An SAE that was loaded, saved by us and loaded again keeps its first origin.
            "metadata": {"loaded_from": provenance, **metadata},
            "initialise": False,
        }
        try:
            teacher = self._empty(options)
        except ConfigError as error:
            raise FormatError(f"{files.name}: {error}") from error
        weights = self.tensors()
        if self.threshold is not None:
            # Every library applies a ReLU as well, so a threshold below zero acts as zero.
            weights["threshold"] = weights["threshold"].clamp_min(0)
        teacher.load_state_dict(weights)
        # Checked in the teacher's dtype: a number that is finite in the file can overflow in it.
        for name, tensor in teacher.state_dict().items():
            advice = f"the file is bad, or its numbers do not fit into {tensor.dtype}"
            check_finite(f"{name} of {files.name}", tensor, advice)
        return teacher

    def _empty(self, options: dict[str, Any]) -> SparseAutoencoder:
        if self.k is not None:
            topk = TopKTranscoder if self.transcoder else TopKSAE
            return topk(self.d_in, self.d_sae, k=self.k, relu=self.relu, **options)
        if self.threshold is not None:
            return (JumpReluTranscoder if self.transcoder else JumpReluSAE)(self.d_in, self.d_sae, **options)
        return (ReluTranscoder if self.transcoder else ReluSAE)(self.d_in, self.d_sae, **options)


def require(tensors: dict[str, Any], path: Path, *names: str, optional: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Returns the tensors in `tensors`, after checking that all of `names` are there and nothing unknown is.

    Raises:
        FormatError: a name is missing or not a tensor, or there is one that is neither required nor optional (its
            purpose is unknown, and ignoring it could change the code).
    """
    missing = [name for name in names if not isinstance(tensors.get(name), Tensor)]
    unknown = sorted(tensors.keys() - set(names) - set(optional))
    if missing or unknown:
        raise FormatError(
            f"{path} does not fit its format: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}"
        )
    return {name: value for name, value in tensors.items() if isinstance(value, Tensor)}


def layer_of(text: str, pattern: str) -> int | None:
    """Returns the number that `pattern` (with one group) finds in a name, or None."""
    found = re.search(pattern, text)
    return int(found[1]) if found else None
