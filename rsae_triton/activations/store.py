"""Activations on disk: a folder of safetensors shards with a manifest that is written last."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from rsae_triton.activations.order import EpochOrder, mix_seed
from rsae_triton.activations.prefetch import prefetched
from rsae_triton.common.checks import check_integer, check_seed, parse_device, shown
from rsae_triton.common.errors import ConfigError, FormatError, StorageError
from rsae_triton.common.files import as_path, check_inside, file_sha256, read_json

SCHEMA = 1
MANIFEST = "manifest.json"
# Smaller stores are checksummed when opened and held in memory when read at random. For larger ones, sizes are compared
# and rows are read from the mapped files.
_SMALL_BYTES = 2 << 30


def _check_dtype(dtype: torch.dtype) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype is {shown(dtype)}; give one of floating point, such as torch.float32")


class Sequences(NamedTuple):
    """Whole contexts, for losses and snippets: `tokens` and `documents` int64 [n_sequences, context]; `counted` bool
    [n_sequences, context - 1] is False where the token to predict is a BOS between two documents."""

    tokens: torch.Tensor
    documents: torch.Tensor
    counted: torch.Tensor


class ActivationStore:
    """Rows of activations in SAE units (mean norm sqrt(d_in) on the training tokens), and where each comes from.

    Open one with `ActivationStore(folder)`; `extract` makes them.

    Args:
        verify: compare every checksum (default: only for stores below 2 GiB).
        shards: (rank, size) opens only every size-th shard, beginning with number rank: the share of one of several
            processes, which then needs no other shard on its disk.
        in_memory: hold the rows in memory, once, when they are first read at random, as `batches` and so training do
            (default: only in stores below 2 GiB); otherwise rows are read from the mapped files, some batches ahead.

    Raises:
        FormatError: something is missing, foreign or damaged; the message names the file and the folder to delete.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        verify: bool | None = None,
        shards: tuple[int, int] | None = None,
        in_memory: bool | None = None,
    ) -> None:
        self.folder, self.share, self.in_memory = as_path("folder", folder), shards, in_memory
        if in_memory is not None and not isinstance(in_memory, bool):
            raise ConfigError(f"in_memory is {shown(in_memory)}; give True, False or None")
        if shards is not None and not (isinstance(shards, tuple) and [type(one) for one in shards] == [int, int]):
            raise ConfigError(f"shards is {shown(shards)}; give two integers (rank, size)")
        # The state of each file when the store was opened; a file made since has other rows and another scale.
        self._opened: dict[str, tuple[int, ...]] = {}
        if not (self.folder / MANIFEST).is_file():
            raise FormatError(f"{self.folder} holds no {MANIFEST}, so it is no activation store; check the path")
        self._opened[MANIFEST] = self._looks(MANIFEST)
        try:
            self.manifest: dict[str, Any] = read_json(self.folder / MANIFEST)
        except (FormatError, OSError) as error:
            raise self._broken(MANIFEST, "cannot be read") from error
        if self.manifest.get("schema") != SCHEMA:
            raise self._broken(MANIFEST, f"is not of schema {SCHEMA}")
        try:
            self.d_in = int(self.manifest["d_in"])
            self.n_tokens = int(self.manifest["n_tokens"])
            self.scale = float(self.manifest["scale"])
            self._check_manifest()
            self._shares(self.n_tokens)
            self._check_files(verify)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, FormatError | ConfigError):
                raise
            raise self._broken(MANIFEST, f"lacks or garbles {error}") from error
        except OSError as error:
            raise StorageError(f"{self.folder} cannot be read ({error.strerror or error})") from error
        self._check_unchanged(MANIFEST)

    def __repr__(self) -> str:
        return f"ActivationStore({str(self.folder)!r}, n_tokens={self.n_tokens}, d_in={self.d_in})"

    def __len__(self) -> int:
        return self.n_tokens

    # --- rows -------------------------------------------------------------------------------------------------

    @cached_property
    def mean(self) -> torch.Tensor:
        """The mean row, float32 [d_in], in SAE units."""
        mean = self._load(self.manifest["mean_file"], mean=(self.d_in,))["mean"] * self.scale
        if not bool(mean.isfinite().all()):
            raise self._broken(self.manifest["mean_file"], "holds NaN or infinity")
        return mean

    def tensor(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """All rows in memory, [n_tokens, d_in], in SAE units."""
        _check_dtype(dtype)
        shards = self._shards  # checked against the manifest before memory is allocated
        rows = torch.empty(self.n_tokens, self.d_in, dtype=dtype)
        start = 0
        for shard in shards:
            part = shard["activations"]
            rows[start : start + len(part)] = part.float() * self.scale
            start += len(part)
        return rows

    def rows(self, which: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Returns rows by their numbers, int64 [n] -> [n, d_in], in SAE units; other rows are not read from disk."""
        _check_dtype(dtype)
        return (self._from_files(which).float() * self.scale).to(dtype)

    def chunks(self, size: int) -> Iterator[torch.Tensor]:
        """Yields all rows in order, float32 [<= size, d_in] at a time, in SAE units."""
        for shard in self._shards:
            for part in shard["activations"].split(size):
                yield part.float() * self.scale

    def batches(
        self,
        batch_size: int,
        seed: int = 0,
        *,
        epochs: int | None = None,
        start: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        part: tuple[int, int] = (0, 1),
        prefetch: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """Yields batches [batch_size, d_in] of rows in SAE units, shuffled anew each epoch, for ever or for `epochs`.

        Batch number i depends only on seed and batch_size, so `start` = number of batches already used resumes a run.
        Rows left over at the end of an epoch are skipped (different ones each epoch).

        Args:
            part: (rank, size), for one of several processes: its batch_size / size rows of every batch; in a store
                opened with shards=(rank, size), of its own shards' rows.
            prefetch: number of batches that a thread reads ahead; by default 4 if rows are read from files, 0 if they
                are in memory.
        """
        rank, size = part
        check_integer("batch_size", batch_size, 1)
        check_integer("start", start, 0)
        check_integer("size of part", size, 1)
        check_integer("rank of part", rank, 0, size - 1)
        check_seed(seed)
        parse_device(device)
        _check_dtype(dtype)
        if self.share is not None:
            if self.share != part:
                raise ConfigError(f"the store was opened for part {self.share} of its shards, not {part}")
            batch_size, rank, size = batch_size // size, 0, 1
        per_epoch = self.n_tokens // batch_size
        if per_epoch == 0 or batch_size % size:
            raise ConfigError(
                f"batch_size={batch_size} does not fit {self.n_tokens} rows and {size} processes; choose a multiple "
                f"of {size}, at most {self.n_tokens}"
            )
        mine = slice(rank * (batch_size // size), (rank + 1) * (batch_size // size))

        def read() -> Iterator[torch.Tensor]:
            epoch, first = divmod(start, per_epoch)
            while epochs is None or epoch < epochs:
                order = EpochOrder([shard["rows"] for shard in self.manifest["shards"]], mix_seed(seed, epoch))
                for number in range(first, per_epoch):
                    yield self._gather(order.rows(number * batch_size, (number + 1) * batch_size)[mine])
                epoch, first = epoch + 1, 0

        ahead = (0 if self._resident is not None else 4) if prefetch is None else prefetch
        for rows in prefetched(read, ahead) if ahead else read():
            yield (rows.to(device).float() * self.scale).to(dtype)

    @cached_property
    def _resident(self) -> torch.Tensor | None:
        parts = [shard["activations"] for shard in self._shards]
        hold = sum(part.nbytes for part in parts) <= _SMALL_BYTES if self.in_memory is None else self.in_memory
        return torch.cat(parts) if hold else None

    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        return self._from_files(rows) if self._resident is None else self._resident[rows]

    def _from_files(self, rows: torch.Tensor) -> torch.Tensor:
        out = torch.empty(len(rows), self.d_in, dtype=self._shards[0]["activations"].dtype)
        shard_of = torch.searchsorted(self._ends, rows, right=True)
        for number in shard_of.unique().tolist():
            here = (shard_of == number).nonzero().squeeze(1)
            begin = int(self._ends[number - 1]) if number else 0
            out[here] = self._shards[number]["activations"][rows[here] - begin]
        return out

    # --- where rows come from ---------------------------------------------------------------------------------

    @cached_property
    def tokens(self) -> torch.Tensor:
        """The token at each row, int64 [n_tokens]."""
        return self._column("tokens")

    @cached_property
    def documents(self) -> torch.Tensor:
        """The document of each row, int64 [n_tokens]: an index into `document_info`."""
        return self._column("documents")

    @cached_property
    def positions(self) -> torch.Tensor:
        """The position of each row in its context, int64 [n_tokens]; 0 is BOS, which is kept only if the manifest says
        so."""
        return self._column("positions")

    @cached_property
    def contexts(self) -> torch.Tensor:
        """The context of each row, int64 [n_tokens]: an index into `sequences`, as far as these are kept."""
        return self._column("contexts")

    @cached_property
    def sequences(self) -> Sequences:
        """The first contexts that the rows were read from (all of them in a store of held-out text)."""
        loaded = self._load(self._text_file("sequences_file"))
        tokens = loaded.get("tokens", torch.empty(0)).long()
        if tokens.dim() != 2 or "documents" not in loaded or loaded["documents"].shape != tokens.shape:
            raise self._broken(self.manifest["sequences_file"], "holds no sequences [n_sequences, context]")
        return Sequences(tokens, loaded["documents"].long(), tokens[:, 1:] != self.manifest["bos_token_id"])

    @cached_property
    def document_info(self) -> list[dict[str, Any]]:
        """Source, title, group and labels of every document."""
        file = self._text_file("documents_file")
        self._check_unchanged(file)
        try:
            # JSON escapes everything else that could end a line within a title.
            documents = [
                json.loads(line) for line in (self.folder / file).read_text(encoding="utf-8").split("\n") if line
            ]
        except (OSError, ValueError, RecursionError) as error:
            raise self._broken(file, "cannot be read") from error
        if not all(isinstance(one, dict) and isinstance(one.get("labels"), dict) for one in documents):
            raise self._broken(file, "describes no documents")
        return documents

    def labels(self, name: str) -> list[str | None]:
        """The label `name` ("source", "author", "party", ...) of every document, or None."""
        return [info["labels"].get(name) for info in self.document_info]

    # --- files ------------------------------------------------------------------------------------------------

    @cached_property
    def _shards(self) -> list[dict[str, torch.Tensor]]:
        # load_file maps the files into memory, so this costs nothing until rows are read.
        shards = [self._load(shard["file"]) for shard in self.manifest["shards"]]
        for shard, entry in zip(shards, self.manifest["shards"], strict=True):
            rows, dtype = shard.get("activations"), str(self.manifest.get("dtype"))
            shape = (entry["rows"], self.d_in)
            if rows is None or tuple(rows.shape) != shape or str(rows.dtype).removeprefix("torch.") != dtype:
                found = "no activations" if rows is None else f"{tuple(rows.shape)} {rows.dtype}"
                raise self._broken(entry["file"], f"holds {found} instead of {shape} {dtype}")
        return shards

    @cached_property
    def _ends(self) -> torch.Tensor:
        return torch.tensor([shard["rows"] for shard in self.manifest["shards"]]).cumsum(0)

    def _text_file(self, name: str) -> str:
        if self.manifest[name] is None:
            raise FormatError(f"{self.folder} was made from a tensor and has no text; read activations with `extract`")
        return self.manifest[name]

    def _column(self, name: str) -> torch.Tensor:
        self._text_file("documents_file")
        for shard, entry in zip(self._shards, self.manifest["shards"], strict=True):
            if name not in shard or tuple(shard[name].shape) != (entry["rows"],):
                raise self._broken(entry["file"], f"holds no {name} for each of its rows")
        return torch.cat([shard[name] for shard in self._shards]).long()

    def _load(self, file: str, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
        try:
            found = load_file(self.folder / file)
        except Exception as error:  # SafetensorError, and OSError, ValueError or MemoryError from the mapping
            raise self._broken(file, "cannot be read") from error
        self._check_unchanged(file)
        for name, shape in shapes.items():
            if name not in found or tuple(found[name].shape) != shape:
                raise self._broken(file, f"holds no {name} of shape {shape}")
        return found

    def _check_manifest(self) -> None:
        """Checks that the manifest's numbers make sense, and that its file names are in the folder itself."""
        if min(self.d_in, self.n_tokens) < 1 or not 1e-37 < self.scale < 1e38:  # a float32
            raise self._broken(MANIFEST, f"has d_in={self.d_in}, n_tokens={self.n_tokens}, scale={self.scale}")
        text = [self.manifest[f"{kind}_file"] for kind in ("sequences", "documents")]
        # A store made from a tensor has no text.
        named = [self.manifest["mean_file"], *(name for name in text if name is not None)]
        for name in (*self.manifest["files"], *(shard["file"] for shard in self.manifest["shards"]), *named):
            if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
                raise self._broken(MANIFEST, f"names {str(name)[:60]!r}, which is no file of its folder")
            if len(os.fsencode(name)) > 255:
                raise self._broken(MANIFEST, f"names {name[:60]!r}..., longer than a file's name can be")
        positions, excluded = self.manifest.get("seqpos_slice"), self.manifest.get("exclude_tokens", [])
        whole = positions is None or (isinstance(positions, list) and 1 <= len(positions) <= 3)
        numbers = [one for one in positions or () if one is not None] if whole else []
        said = isinstance(self.manifest.get("prepend_bos", True), bool)
        if not (whole and said and isinstance(excluded, list)) or 0 in (positions or [])[2:]:
            raise self._broken(MANIFEST, "does not say which positions it holds")
        if any(type(one) is not int or abs(one) >= 2**31 for one in (*numbers, *excluded)):
            raise self._broken(MANIFEST, "does not say which positions it holds")
        if text != [None, None]:
            limit = self.manifest.get("norm_limit")
            if limit is not None and not (isinstance(limit, int | float) and float(limit) > 0):
                raise self._broken(MANIFEST, f"has norm_limit={shown(limit)}")
            bos = self.manifest["bos_token_id"]
            if not isinstance(bos, int) or abs(bos) >= 2**31 or not isinstance(self.manifest["hook_name"], str):
                raise self._broken(MANIFEST, "says neither which token begins a text nor where it was read")
        shards = self.manifest["shards"]
        if any(not isinstance(shard["rows"], int) or shard["rows"] < 1 for shard in shards):
            raise self._broken(MANIFEST, "lists shards without rows")
        if len({shard["file"] for shard in shards}) < len(shards):
            raise self._broken(MANIFEST, "lists a shard more than once")
        dtype = getattr(torch, str(self.manifest.get("dtype")), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
            raise self._broken(MANIFEST, f"has dtype={shown(self.manifest.get('dtype'))}")
        for shard in shards:  # before memory is allocated for rows that are only claimed
            held = self.manifest["files"][shard["file"]]["bytes"]
            if not isinstance(held, int) or shard["rows"] * self.d_in * dtype.itemsize > held:
                raise self._broken(MANIFEST, f"claims {shown(shard['rows'])} rows in {shard['file'][:60]}")

    def _shares(self, n_tokens: int) -> None:
        """Reduces the manifest to the shards that this process reads."""
        shards = self.manifest["shards"]
        if sum(shard["rows"] for shard in shards) != n_tokens:
            raise self._broken(MANIFEST, "counts other rows than its shards")
        if self.share is None:
            return
        rank, size = self.share
        if not 0 <= rank < size <= len(shards):
            raise ConfigError(f"shards={self.share}: {self.folder} has {len(shards)} shards for {size} processes")
        own = shards[rank::size]
        others = {shard["file"] for shard in shards} - {shard["file"] for shard in own}
        self.manifest["shards"] = own
        self.manifest["files"] = {name: one for name, one in self.manifest["files"].items() if name not in others}
        self.n_tokens = sum(shard["rows"] for shard in own)

    def _check_files(self, verify: bool | None) -> None:
        files: dict[str, dict[str, Any]] = self.manifest["files"]
        if verify is None:
            verify = sum(entry["bytes"] for entry in files.values()) <= _SMALL_BYTES
        for file, entry in files.items():
            path = self.folder / file
            if not path.is_file():
                raise self._broken(file, "is missing")
            check_inside(self.folder, file)
            self._opened[file] = self._looks(file)
            if path.stat().st_size != entry["bytes"]:
                raise self._broken(file, f"has {path.stat().st_size} bytes instead of {entry['bytes']}")
            if verify and file_sha256(path) != entry["sha256"]:
                raise self._broken(file, "does not have the checksum in the manifest")

    def _looks(self, file: str) -> tuple[int, ...]:
        try:
            found = (self.folder / file).stat()
        except OSError as error:
            raise self._broken(file, f"cannot be read ({error.strerror})") from error
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    def _check_unchanged(self, file: str) -> None:
        if self._opened.get(file) != self._looks(file):
            raise FormatError(
                f"{self.folder / file} is not the file that was there when the store was opened; open it again"
            )

    def _broken(self, file: str, what: str) -> FormatError:
        return FormatError(f"{self.folder / file} {what}; delete the folder {self.folder} and extract again")
