"""Saving and loading: cfg.json and sae_weights.safetensors in SAELens' layout, in folders and on the hub.

The two files belong together: the weights' file also holds the configuration, and cfg.json is a copy of it for other
libraries. Both carry one mark (`metadata.saved_as`), so that a reader finds a matching pair even between two renames,
or after a kill there.
"""

from __future__ import annotations

import abc
import copy
import hashlib
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rsae_triton.common.checks import check_data, check_finite, parse_device
from rsae_triton.common.errors import (
    ConfigError,
    FormatError,
    NumericsError,
    RsaeError,
    ShapeError,
    StorageError,
)
from rsae_triton.common.files import (
    alone_in,
    as_path,
    as_utf8,
    check_inside,
    make_folder,
    read_json,
    read_with_metadata,
    write_together,
)
from rsae_triton.common.hub import local_path, upload
from rsae_triton.sae.card import model_card, write_card
from rsae_triton.sae.units import UNITS

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
# The version of SAELens whose layout this follows; its readers check this field first.
SAE_LENS_VERSION = "6.54.0"
_MARK = "saved_as"
# Entries of a configuration's metadata that are not provenance.
NOT_KEPT = ("sae_lens_version", _MARK)
# The name of the units in checkpoints of version 0.1.
_UNITS_BEFORE = "trained_at_scale"


class Pretrained(nn.Module, abc.ABC):
    """The part of `SparseAutoencoder` that deals with files."""

    architecture: ClassVar[str]
    d_in: int
    d_sae: int
    apply_b_dec_to_input: bool
    normalize_activations: str
    metadata: dict[str, Any]
    W_enc: nn.Parameter

    @property
    @abc.abstractmethod
    def units(self) -> float | None:
        """See `SparseAutoencoder`."""

    @units.setter
    def units(self, value: float | None) -> None: ...

    @abc.abstractmethod
    def to_units_(self, units: float) -> Self:
        """See `SparseAutoencoder`."""

    def config(self) -> dict[str, Any]:
        """The content of cfg.json: enough to build an empty SAE of this kind."""
        return {
            "architecture": self.architecture,
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "dtype": str(self.W_enc.dtype).removeprefix("torch."),
            "device": "cpu",
            "apply_b_dec_to_input": self.apply_b_dec_to_input,
            "normalize_activations": self.normalize_activations,
            # The caller flattens activations of attention heads [..., head, d_head].
            "reshape_activations": "hook_z" if str(self.metadata.get("hook_name")).endswith("hook_z") else "none",
            "metadata": {
                "sae_lens_version": SAE_LENS_VERSION,
                **{name: value for name, value in self.metadata.items() if name != UNITS or value != 1.0},
            },
        }

    @classmethod
    def architectures(cls) -> set[str]:
        """The architecture names in cfg.json that this class loads."""
        return {cls.architecture}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Makes an SAE of this kind with the sizes in `config`, whose weights are still to be loaded."""
        return cls(**cls.common_arguments(config))

    @staticmethod
    def common_arguments(config: dict[str, Any]) -> dict[str, Any]:
        """The constructor's arguments that are common to all kinds."""
        return {
            "d_in": config["d_in"],
            "d_sae": config["d_sae"],
            "apply_b_dec_to_input": config.get("apply_b_dec_to_input", True),
            "normalize_activations": config.get("normalize_activations") or "none",
            "initialise": False,
            "dtype": parse_dtype(config.get("dtype", "float32")),
            "metadata": {k: v for k, v in config.get("metadata", {}).items() if k not in NOT_KEPT},
        }

    def save_pretrained(self, folder: str | Path, *, metrics: Mapping[str, Any] | None = None) -> Path:
        """Writes cfg.json and sae_weights.safetensors (SAELens' layout), both or neither, and a model card.

        The saved SAE takes raw activations, in the model's units, whatever `units` this SAE reads.

        Args:
            metrics: scores for the card, as in a run's metrics.json. A README.md that is not such a card is not
                changed.

        Returns:
            The folder.

        Raises:
            NumericsError: a weight is NaN or infinite; nothing is written.
            ConfigError: metadata that JSON cannot hold; nothing is written.
            StorageError: the files cannot be written.
        """
        folder = as_path("folder", folder)
        check_data("W_enc", self.W_enc)
        if self.units not in (None, 1.0):
            dtype = self.W_enc.dtype  # the scale is applied in float32, so that weights are rounded only once
            wide = copy.deepcopy(self).to(torch.promote_types(dtype, torch.float32))
            return wide.to_units_(1.0).to(dtype).save_pretrained(folder, metrics=metrics)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        for name, tensor in weights.items():
            check_finite(name, tensor, f"nothing was written to {folder}")
        config = self.config()
        try:
            text = _marked(config)
        except (TypeError, ValueError, RecursionError) as error:
            if isinstance(error, RsaeError):
                raise
            raise ConfigError(f"metadata holds what JSON cannot ({error}); nothing was written to {folder}") from error
        try:
            card = model_card(config, metrics)
            as_utf8("README.md", card)
        except (AttributeError, TypeError, LookupError, ValueError) as error:
            raise ConfigError(
                f"metrics is not what a run's metrics.json holds ({error}); nothing was written to {folder}"
            ) from error
        make_folder(folder)
        files: dict[str, Callable[[Path], Any]] = {
            WEIGHTS_FILE: lambda path: save_file(weights, path, metadata={"format": "pt", "config": text}),
            CONFIG_FILE: lambda path: path.write_text(text + "\n", encoding="utf-8"),
        }
        write_together(folder, files)
        try:
            write_card(folder, card)
        except (StorageError, OSError) as error:
            warnings.warn(f"the SAE is saved in {folder}; its card is not: {error}", stacklevel=2)
        return folder

    def push_to_hub(
        self,
        repo: str,
        *,
        metrics: Mapping[str, Any] | None = None,
        private: bool = False,
        revision: str | None = None,
        message: str = "Upload a sparse autoencoder",
        token: str | None = None,
    ) -> str:
        """Saves to a repository of the Hugging Face hub, which is created if it does not exist.

        Args:
            repo: "owner/name". metrics: for the card. private: for a repository that is created. revision: a branch,
                created if it does not exist. token: for the hub; not needed after `hf auth login`.

        Returns:
            The address of the commit.

        Raises:
            SourceError: the hub cannot be reached, or refuses.
            NumericsError, ConfigError: see `save_pretrained`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, metrics=metrics)
            return upload(Path(folder), repo, private=private, revision=revision, message=message, token=token)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, device: torch.device | str = "cpu", *, revision: str | None = None
    ) -> Self:
        """Loads an SAE that `save_pretrained` or `push_to_hub` wrote.

        Args:
            source: a folder, or a hub id "owner/name" or "owner/name/folder". revision: of a hub id.

        Raises:
            FormatError: a file is missing, truncated or of another architecture, or a tensor is missing.
            SourceError: a hub id cannot be fetched.
        """
        device = parse_device(device) or torch.device("cpu")
        folder = local_path(source, revision)
        config, weights = read_folder(folder)
        if config["architecture"] not in cls.architectures():
            raise FormatError(
                f"{folder} holds an SAE of architecture {config['architecture']!r}, not {cls.architecture!r}; "
                "use rsae_triton.load_teacher for teachers, FusedRationalSAE.from_pretrained for rational SAEs"
            )
        return cls.from_files(config, weights, folder).to(device)

    @classmethod
    def from_files(cls, config: dict[str, Any], weights: dict[str, Tensor], source: str | Path) -> Self:
        """Makes an SAE from a parsed configuration and its tensors. `source` is for error messages."""
        # Checked before anything of the claimed size is allocated; the file bounds it.
        found, claimed = getattr(weights.get("W_enc"), "shape", None), (config.get("d_in"), config.get("d_sae"))
        if found is None or tuple(found) != claimed:
            raise FormatError(
                f"W_enc in {Path(source) / WEIGHTS_FILE} has shape {found and tuple(found)}; {CONFIG_FILE} makes it "
                f"{claimed}"
            )
        try:
            sae = cls.from_config(config)
        except (ConfigError, ShapeError, NumericsError) as error:
            raise FormatError(f"{Path(source) / CONFIG_FILE}: {error}") from error
        except RsaeError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise FormatError(f"{Path(source) / CONFIG_FILE} lacks or misuses the field {error}") from error
        expected = sae.state_dict()
        missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
        if missing or unknown:
            raise FormatError(
                f"{Path(source) / WEIGHTS_FILE} does not fit its cfg.json: missing {missing or 'nothing'}, "
                f"unknown {unknown or 'nothing'}"
            )
        for name, tensor in weights.items():
            if tensor.shape != expected[name].shape:
                raise FormatError(
                    f"{name} in {Path(source) / WEIGHTS_FILE} has shape {tuple(tensor.shape)}; "
                    f"cfg.json implies {tuple(expected[name].shape)}"
                )
            if tensor.is_floating_point() != expected[name].is_floating_point():
                raise FormatError(f"{name} in {Path(source) / WEIGHTS_FILE} is {tensor.dtype}; the file is bad")
        sae.load_state_dict(weights)
        # Checked in the dtype of the weights, because a finite number in the file can overflow in a narrower one.
        for name, tensor in sae.state_dict().items():
            check_finite(
                f"{name} in {Path(source) / WEIGHTS_FILE}",
                tensor,
                f"the file is bad, or its numbers do not fit into {tensor.dtype}",
            )
        try:
            sae.check_values()
        except NumericsError as error:
            raise NumericsError(f"{Path(source) / WEIGHTS_FILE}: {error}") from error
        before = sae.metadata.pop(_UNITS_BEFORE, 1.0)
        try:
            sae.units = sae.metadata.get(UNITS, before)
        except ConfigError as error:
            raise FormatError(f"{Path(source) / CONFIG_FILE}: {error}") from error
        return sae

    def check_values(self) -> None:
        """Raises NumericsError for finite weights that are impossible for this kind of SAE, such as a negative
        threshold."""


def parse_dtype(name: str) -> torch.dtype:
    """Converts "float32" or "torch.float32" to torch.float32."""
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise FormatError(f"dtype {name!r} is not one torch knows; use float32, bfloat16 or float16")
    return dtype


def read_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads cfg.json and the tensors of a saved SAE (`read_pair`).

    Raises:
        FormatError: missing or unreadable files, or a configuration without an architecture.
    """
    config, weights = read_pair(Path(folder))
    if not isinstance(config.get("architecture"), str):
        raise FormatError(f"{Path(folder) / CONFIG_FILE} names no architecture; it is not the configuration of an SAE")
    return config, weights


def read_pair(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the configuration and the tensors of a saved SAE, which belong together.

    If cfg.json is not the one that the weights were saved with (a save is in progress, or was killed), the copy in the
    weights' file is returned, with a warning. Changes that the user makes in cfg.json are respected, since its mark
    stays.

    Raises:
        FormatError: missing or unreadable files.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        check_inside(folder, name)
    for attempt in range(3):
        weights, own = _own(folder)
        if not (folder / CONFIG_FILE).is_file() and own is None:
            raise FormatError(
                f"{folder / CONFIG_FILE} does not exist; an SAE folder holds {CONFIG_FILE} and {WEIGHTS_FILE}"
            )
        config = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else None
        if config is not None and (own is None or _mark(config) == _mark(own)):
            break
        if attempt < 2:
            with alone_in(folder):  # waits for a process that is between the two renames
                pass
            continue
        warnings.warn(
            f"{folder / CONFIG_FILE} is {'missing' if config is None else 'of another SAE'}, as after a save that was "
            f"killed; the configuration in {WEIGHTS_FILE} is used. Save the SAE again for other libraries",
            stacklevel=3,
        )
        config = own
    assert config is not None
    return config, weights


def carries_config(path: Path) -> bool:
    """Whether a weights' file is one of ours, which can be read without its cfg.json."""
    try:
        return "config" in read_with_metadata(path)[1]
    except FormatError:
        return False


def _own(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors, and for files of ours the configuration that they were saved with."""
    if not (folder / WEIGHTS_FILE).is_file():
        raise FormatError(
            f"{folder / WEIGHTS_FILE} does not exist; an SAE folder holds {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    weights, metadata = read_with_metadata(folder / WEIGHTS_FILE)
    if "config" not in metadata:
        return weights, None
    try:
        own = json.loads(metadata["config"])
        if not isinstance(own, dict) or not isinstance(_mark(own), str):
            raise ValueError("no mark")
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{folder / WEIGHTS_FILE} holds a damaged configuration ({error})") from error
    return weights, own


def _mark(config: dict[str, Any]) -> Any:
    metadata = config.get("metadata")
    return metadata.get(_MARK) if isinstance(metadata, dict) else None


def _marked(config: dict[str, Any]) -> str:
    """The text of cfg.json, with a mark that no other configuration has."""
    plain = json.dumps(config, sort_keys=True, ensure_ascii=False)
    mark = hashlib.sha256(as_utf8(CONFIG_FILE, plain)).hexdigest()[:16]
    marked = {**config, "metadata": {**config["metadata"], _MARK: mark}}
    return json.dumps(marked, indent=2, sort_keys=True)
