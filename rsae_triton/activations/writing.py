"""Writes an activation store: forward passes into shards, the manifest last; continues after a kill."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save, save_file

from rsae_triton.activations.documents import Document
from rsae_triton.activations.host import HostModel
from rsae_triton.activations.order import mix_seed
from rsae_triton.activations.packing import Contexts, left_out, pack
from rsae_triton.activations.store import MANIFEST
from rsae_triton.common.errors import FormatError, NumericsError
from rsae_triton.common.files import check_room, file_sha256, write_atomically, write_text

_PROGRESS = "progress.json"
_SHARD_BYTES = 64 << 20  # half a minute of extraction on two cores, which is the most that a killed run loses
_PAIRED_ROWS = 1 << 15
_MEDIAN_CONTEXTS = 64  # the median norm is that of the first 64 contexts
_KEPT_SEQUENCES = 2048


class _Block(NamedTuple):
    """A batch of contexts with the residuals [B, T, d] read from them; `is_bos` [B, T]. `norms` are those of the
    residuals. Outliers are decided by `lengths`: the same, unless rows are kept by the norms at another place. `left`
    [B, T]: where no row is kept, whatever its norm."""

    residual: torch.Tensor
    norms: torch.Tensor
    lengths: torch.Tensor
    tokens: torch.Tensor
    documents: torch.Tensor
    is_bos: torch.Tensor
    left: torch.Tensor


class _Pending:
    """Rows that wait to be written to the next shard."""

    def __init__(self, contexts: int) -> None:
        self.contexts = contexts
        self.rows = self.bytes = self.bos_dropped = self.bos_kept = self.outliers_dropped = 0
        self.norm_sum = 0.0
        self._columns: dict[str, list[torch.Tensor]] = {}

    def add(self, block: _Block, limit: float | None, dtype: torch.dtype, room: int, keep_bos: bool) -> int:
        """Takes at most `room` rows of `block`; returns how many were kept."""
        outlier = torch.zeros_like(block.is_bos) if limit is None else (block.lengths > limit) & ~block.is_bos
        outlier &= ~block.left
        keep = (~block.left & (~outlier if keep_bos else ~block.is_bos & ~outlier)).nonzero()[:room]
        row, position = keep.unbind(1)
        is_bos = block.is_bos[row, position]
        # Counts are of the text up to the last kept row, so that rates refer to the same text.
        self.bos_kept += int(is_bos.sum())
        self.bos_dropped += 0 if keep_bos else int(block.is_bos.sum())
        self.outliers_dropped += int(outlier.sum())
        # Units must not depend on whether BOS is kept, whose norm is a hundred times larger.
        self.norm_sum += float(block.norms[row, position].double()[~is_bos].sum())
        on_device = keep.to(block.residual.device).unbind(1)
        for name, column in {
            "activations": block.residual[on_device].to(dtype).cpu(),
            "tokens": block.tokens[row, position],
            "documents": block.documents[row, position],
            "positions": position.int(),
            "contexts": (row + self.contexts).int(),
        }.items():
            self._columns.setdefault(name, []).append(column)
        self.contexts += len(block.tokens)
        self.rows += len(keep)
        self.bytes += self._columns["activations"][-1].nbytes
        return len(keep)

    def tensors(self, seed: int, bos: int) -> dict[str, torch.Tensor]:
        """Returns the columns in one random order of rows, and the float64 sum of the activations [d_in] other than
        BOS."""
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(seed))
        tensors = {name: torch.cat(parts)[order] for name, parts in self._columns.items()}
        # BOS is left out of the mean, as it is of the units, because its norm is a hundred times larger.
        text = tensors["tokens"] != bos
        return tensors | {"sum": tensors["activations"][text].sum(0, dtype=torch.float64)}


@dataclass
class _Shard:
    """Facts about a finished shard; `contexts` counts those read up to its end, `norm_sum` is without BOS."""

    file: str
    rows: int
    bytes: int
    sha256: str
    norm_sum: float
    bos_dropped: int
    outliers_dropped: int
    contexts: int
    bos_kept: int = 0


@dataclass
class Extraction:
    """The extraction of one place into the folder `partial`."""

    host: HostModel
    documents: Sequence[Document]
    identity: dict[str, Any]
    dtype: torch.dtype
    batch: int
    partial: Path

    def begin(self) -> None:
        """Continues from what a killed run left."""
        self.state = self._resume()
        shards: list[_Shard] = self.state["shards"]
        self.wanted: int = self.identity["requested_tokens"]
        self.done = sum(shard.rows for shard in shards)
        self._pending = _Pending(shards[-1].contexts if shards else 0)
        self._head: list[_Block] = []

    def bytes_left(self) -> int:
        """An upper bound of the bytes that the remaining rows will take on the disk."""
        text = 4 * sum(len(one.text) for one in self.documents)  # a token has at least one byte of text
        columns = 4 * 4  # token, document, position and context
        row = self.host.hook_width(self.identity["hook_name"]) * self.dtype.itemsize + columns
        return min(self.wanted - self.done, text) * row

    @property
    def complete(self) -> bool:
        return self.done == self.wanted

    @property
    def read(self) -> int:
        """The number of contexts that need not be read again."""
        return self._pending.contexts + sum(len(block.tokens) for block in self._head)

    def take(
        self, tokens: torch.Tensor, documents: torch.Tensor, residual: torch.Tensor, leading: torch.Tensor | None = None
    ) -> int:
        """Takes the next contexts [B, T] and their activations; returns how many rows were kept.

        leading: activations of another place, whose norms then decide about outliers.
        """
        norms = residual.float().norm(dim=-1)
        if not torch.isfinite(norms).all():
            raise NumericsError(
                f"{self.identity['hook_name']} holds NaN or infinity in {self.host.dtype}; "
                "load the host with dtype='float32' or 'bfloat16'"
            )
        lengths = norms if leading is None else leading.float().norm(dim=-1)
        is_bos = tokens == self.host.bos_token_id
        left = left_out(tokens, self.identity)
        self._head.append(_Block(residual, norms.cpu(), lengths.cpu(), tokens, documents, is_bos, left))
        if self.state["median_norm"] is None and sum(len(one.tokens) for one in self._head) < _MEDIAN_CONTEXTS:
            return 0
        return self._keep()

    def _keep(self) -> int:
        """Takes the rows of waiting blocks; the first blocks wait until the median of their norms is known."""
        before, blocks, self._head = self.done, self._head, []
        if self.state["median_norm"] is None and blocks:
            self.state["norm_limit"], self.state["median_norm"] = self._norm_limit(blocks)
        keep_bos = bool(self.identity.get("keep_bos"))
        for block in blocks:
            room = self.wanted - self.done
            self.done += self._pending.add(block, self.state["norm_limit"], self.dtype, room, keep_bos)
            # Stores with rows of the same tokens have the same shards, whatever their widths.
            paired = self._pending.rows >= _PAIRED_ROWS and "rows_as" in self.identity
            if paired or (self._pending.bytes >= _SHARD_BYTES and "rows_as" not in self.identity) or self.complete:
                self._save(self.state, self._pending)
                self._pending = _Pending(self._pending.contexts)
            if self.complete:
                break
        return self.done - before

    def end(self) -> None:
        """Writes the last shard, at the end of the text."""
        self._keep()
        if self._pending.rows:
            self._save(self.state, self._pending)
        if not self.done:
            context = self.identity["context"]
            raise FormatError(f"the text fills no context of {context} tokens; give more text or a smaller context")
        if not self.complete:
            warnings.warn(
                f"the {self.identity['split']} text ended after {self.done} of {self.wanted} tokens; add text "
                "to get more",
                stacklevel=5,
            )

    def finish(self, key: str) -> None:
        """Writes everything besides the shards, the manifest last."""
        state = self.state
        shards: list[_Shard] = state["shards"]
        rows = sum(shard.rows for shard in shards)
        total = torch.zeros(0, dtype=torch.float64)
        sources: Counter[str] = Counter()
        for shard in shards:
            loaded = load_file(self.partial / shard.file)
            total = loaded["sum"] if not len(total) else total + loaded["sum"]
            counts = torch.bincount(loaded["documents"].long(), minlength=len(self.documents))
            for index in counts.nonzero().squeeze(1).tolist():
                sources[self.documents[index].source] += int(counts[index])
        of_text = max(1, rows - sum(shard.bos_kept for shard in shards))
        mean_norm = sum(shard.norm_sum for shard in shards) / of_text
        if mean_norm == 0:
            raise NumericsError(f"all activations at {self.identity['hook_name']} are zero; choose another hook")
        units = self.identity["units"]
        save_file({"mean": (total / of_text).float()}, self.partial / "mean.safetensors")
        packed = _packed(self, 64)
        kept = min(shards[-1].contexts, _KEPT_SEQUENCES)
        some = list(islice(packed, -(-kept // 64)))
        columns = {name: [torch.from_numpy(getattr(one, name)) for one in some] for name in Contexts._fields}
        save_file(
            {name: torch.cat(parts)[:kept] for name, parts in columns.items()}, self.partial / "sequences.safetensors"
        )
        with open(self.partial / "documents.jsonl", "w", encoding="utf-8") as handle:
            for document in self.documents:
                info = {name: getattr(document, name) for name in ("source", "title", "group", "labels")}
                handle.write(json.dumps(info) + "\n")
        files = {shard.file: {"bytes": shard.bytes, "sha256": shard.sha256} for shard in shards}
        for name in ("mean.safetensors", "sequences.safetensors", "documents.jsonl"):
            path = self.partial / name
            files[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        manifest = {
            **self.identity,
            "key": key,
            "model": self.host.name,
            "tokenizer": type(self.host.tokenizer).__name__,
            "bos_token_id": self.host.bos_token_id,
            "d_in": len(total),
            "n_tokens": rows,
            "n_documents": len(self.documents),
            "scale": units["scale"] if units else len(total) ** 0.5 / mean_norm,
            "mean_norm": mean_norm,
            "median_norm": state["median_norm"],
            "norm_limit": state["norm_limit"],
            "outliers_dropped": sum(shard.outliers_dropped for shard in shards),
            "bos": "kept" if self.identity.get("keep_bos") else "dropped",
            "bos_dropped": sum(shard.bos_dropped for shard in shards),
            "sources": dict(sources),
            "mean_file": "mean.safetensors",
            "sequences_file": "sequences.safetensors",
            "documents_file": "documents.jsonl",
            "shards": [{"file": shard.file, "rows": shard.rows} for shard in shards],
            "files": files,
            "library": self.host.library,
            "versions": {name: _version(name) for name in ("torch", "transformers", "transformer-lens")},
        }
        _write_json(self.partial / MANIFEST, manifest)
        (self.partial / _PROGRESS).unlink()

    def _norm_limit(self, head: list[_Block]) -> tuple[float | None, float]:
        """Returns `(limit, median)` of the norms on `head`; the limit is that of the given units, if there are any."""
        norms = torch.cat([block.lengths for block in head])[:_MEDIAN_CONTEXTS]
        is_bos = torch.cat([block.is_bos | block.left for block in head])[:_MEDIAN_CONTEXTS]
        counted = norms[~is_bos]
        if not len(counted):
            raise FormatError("every token at the beginning of the text is BOS or left out; exclude fewer tokens")
        median = float(counted.median())
        factor = self.identity["drop_outliers"]
        if self.identity["units"]:
            return self.identity["units"]["norm_limit"], median
        return (None if factor is None else factor * median), median

    def _save(self, state: dict[str, Any], pending: _Pending) -> None:
        number = len(state["shards"])
        file = f"shard-{number:05d}.safetensors"
        # The checksum is of what is written here, whatever may happen to the file later.
        data = save(pending.tensors(mix_seed(self.identity["seed"], number), self.host.bos_token_id))
        write_atomically(self.partial / file, lambda temporary: temporary.write_bytes(data))
        state["shards"].append(
            _Shard(file, pending.rows, len(data), hashlib.sha256(data).hexdigest(), pending.norm_sum,
                   pending.bos_dropped, pending.outliers_dropped, pending.contexts, pending.bos_kept)
        )  # fmt: skip
        _write_json(self.partial / _PROGRESS, {**state, "shards": [asdict(shard) for shard in state["shards"]]})

    def _resume(self) -> dict[str, Any]:
        """The state that a killed run left, if its shards are complete; else a new one in an empty folder."""
        try:
            state = json.loads((self.partial / _PROGRESS).read_text())
            state["shards"] = [_Shard(**shard) for shard in state["shards"]]
            if state["identity"] == self.identity and all(
                file_sha256(self.partial / shard.file) == shard.sha256 for shard in state["shards"]
            ):
                return state
        except (OSError, ValueError, KeyError, TypeError):
            pass
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return {"identity": self.identity, "norm_limit": None, "median_norm": None, "shards": []}


def write_shards(extractions: Sequence[Extraction], progress: bool) -> None:
    """Writes the missing shards of several places, from one pass through model and text."""
    some = extractions[0]
    for one in extractions:
        one.begin()
    missing = [one for one in extractions if not one.complete]
    check_room(some.partial.parent, sum(one.bytes_left() for one in missing), "what is left to extract")
    wanted, done = (sum(getattr(one, name) for one in extractions) for name in ("wanted", "done"))
    batches = _packed(some, some.batch)
    seen = 0
    with _bar(progress, f"activations ({some.identity['split']})", wanted, done) as advance:
        for contexts in batches:
            if not missing:
                break
            start, seen = seen, seen + len(contexts.tokens)
            waiting = [one for one in missing if one.read < seen]
            if not waiting:
                continue
            start, first = max(start, min(one.read for one in waiting)), start
            tokens, documents = (torch.from_numpy(column[start - first :]) for column in contexts)
            names = [one.identity["hook_name"] for one in waiting]
            lead = some.identity.get("rows_as")
            read = list(dict.fromkeys([*names, *([lead] if lead else [])]))
            residuals = dict(zip(read, some.host.residuals(tokens, read), strict=True))
            for one, name in zip(waiting, names, strict=True):
                new = slice(max(0, one.read - start), None)
                leading = residuals[lead][new] if lead and lead != name else None
                advance(one.take(tokens[new], documents[new], residuals[name][new], leading))
            missing = [one for one in missing if not one.complete]
    for one in extractions:
        one.end()


def _packed(one: Extraction, batch: int) -> Iterator[Contexts]:
    made = one.identity
    return pack(
        one.documents, one.host, made["context"], batch, made["seed"], prepend_bos=made.get("prepend_bos", True)
    )


@contextmanager
def _bar(show: bool, label: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    from rsae_triton.common.progress import LoggedProgress, TokensPerSecond

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TokensPerSecond(),
               TimeRemainingColumn())  # fmt: skip
    with LoggedProgress(*columns, console=Console(stderr=True), disable=not show) as progress:
        task = progress.add_task(label, total=total, completed=done)
        yield lambda rows: progress.advance(task, rows)


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
