"""Turns a task and documents into token windows to probe, and those into codes."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rsae_triton.activations import Document, HostModel, cache_dir
from rsae_triton.common.errors import ConfigError, NumericsError, StorageError
from rsae_triton.common.files import make_folder, write_atomically
from rsae_triton.evaluation.probe_tasks import Task
from rsae_triton.evaluation.reconstruction import Codec, rows_of
from rsae_triton.ops.sparse_ops import used
from rsae_triton.sae.sparse import SparseCode
from rsae_triton.sae.units import reading

# How many characters per token are searched for a window: enough for all but text that is mostly spaces.
_CHARS_PER_TOKEN = 8
# Windows begin this many characters per token apart. English has 4 or 5 per token, so they do not overlap.
_CHARS_APART = 6
# As in the activation stores, positions above this multiple of the median norm are outliers that SAEs are not trained
# on.
_OUTLIER = 4.0


@dataclass(frozen=True)
class Items:
    """Windows of text, each with a label.

    Attributes:
        tokens: int64 [n_items, context], BOS first. pooled: bool [n_items, context], the positions that are averaged to
            represent the item: all but BOS for a label of the text, the last one for a label of a word.
        labels: bool [n_items], equally many of each. units: [n_items], the group of each item, which a split must keep
            together.
    """

    tokens: Tensor
    pooled: Tensor
    labels: np.ndarray[Any, Any]
    units: list[str]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class _Place:
    document: Document
    start: int
    end: int
    label: bool
    unit: str


def make_items(
    task: Task,
    documents: Sequence[Document],
    host: HostModel,
    *,
    per_label: int = 250,
    context: int = 64,
    seed: int = 0,
) -> Items:
    """Makes windows of `context` tokens (BOS and context - 1 of text): equally many of each label, at most `per_label`.

    For labels of texts, windows are taken in turn from the task's units and do not overlap. For labelled words, the
    word is at the end of its window, and each word occurs equally often with both labels, so that the word itself does
    not reveal the label.

    Raises:
        ConfigError: the documents hold fewer than two windows of a label.
    """
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}|{task.name}".encode()).digest()[:8], "little"))
    places: list[_Place] = []
    size = _CHARS_PER_TOKEN * context
    for document in documents:
        for end, label in task.find(document):
            unit = task.unit(document)
            if end is not None:
                places.append(_Place(document, max(0, end - size), end, label, unit))
            else:
                starts = range(0, len(document.text), _CHARS_APART * context)
                places += (_Place(document, at, min(at + size, len(document.text)), label, unit) for at in starts)
    places = [places[i] for i in rng.permutation(len(places))]
    encode = _window(host, context, at_end=task.of_words)
    chosen: dict[bool, list[tuple[list[int], str]]] = {False: [], True: []}
    if task.of_words:
        for pair in _pairs_by_word(places):
            windows = [encode(place) for place in pair]
            if all(window is not None for window in windows) and len(chosen[True]) < per_label:
                for window, place in zip(windows, pair, strict=True):
                    chosen[place.label].append((window, place.unit))  # type: ignore[arg-type]
    else:
        for label, found in chosen.items():
            for place in _in_turn(places, label):
                if len(found) == per_label:
                    break
                if (window := encode(place)) is not None:
                    found.append((window, place.unit))
    count = min(map(len, chosen.values()))
    if count < 2:
        raise ConfigError(
            f"the text holds {len(chosen[False])} windows of {context} tokens labelled {task.classes[0]!r} and "
            f"{len(chosen[True])} labelled {task.classes[1]!r}; the task {task.name!r} needs more text"
        )
    rows = chosen[False][:count] + chosen[True][:count]
    tokens = torch.tensor([[host.bos_token_id, *window] for window, _ in rows])
    pooled = torch.zeros_like(tokens, dtype=torch.bool)
    pooled[:, -1 if task.of_words else 1 :] = True
    return Items(tokens, pooled, np.repeat([False, True], count), [unit for _, unit in rows])


def _in_turn(places: Sequence[_Place], label: bool) -> Iterator[_Place]:
    """Yields the places with this label: one from each unit, then another from each, and so on."""
    units: dict[str, list[_Place]] = defaultdict(list)
    for place in places:
        if place.label == label:
            units[place.unit].append(place)
    return (place for row in zip_longest(*units.values()) for place in row if place is not None)


def _pairs_by_word(places: Sequence[_Place]) -> Iterator[tuple[_Place, _Place]]:
    """Yields pairs of places with the same word and different labels: one pair for each word, then another, and so
    on."""
    words: dict[str, tuple[list[_Place], list[_Place]]] = defaultdict(lambda: ([], []))
    for place in places:
        word = place.document.text[: place.end][-40:].split()[-1]
        words["".join(c if c.isalnum() or c == "_" else " " for c in word).split()[-1]][place.label].append(place)
    pairs = [list(zip(*sides, strict=False)) for sides in words.values()]
    return (pair for row in zip_longest(*pairs) for pair in row if pair is not None)


def _window(host: HostModel, context: int, *, at_end: bool) -> Callable[[_Place], list[int] | None]:
    """Returns a function that gives the context - 1 tokens that begin (or end) at a place; None if the text is too
    short."""

    def encode(place: _Place) -> list[int] | None:
        text = place.document.text[place.start : place.end]
        if place.start > 0:
            text = text[max(0, text.find(" ")) :]  # do not begin in the middle of a word
        ids: list[int] = host.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) < context - 1:
            return None
        return ids[-(context - 1) :] if at_end else ids[: context - 1]

    return encode


class Rows:
    """Residuals at the pooled positions: rows [n_rows, d_in] in host units, and the item that each belongs to."""

    def __init__(self, rows: Tensor, items: Tensor, n_items: int) -> None:
        norms = rows.float().norm(dim=1)
        # An item with nothing but outliers keeps them, because every item needs a prediction.
        usual = norms <= _OUTLIER * norms.median()
        counts = torch.zeros(n_items, dtype=torch.long).index_add_(0, items, usual.long())
        keep = usual | (counts == 0)[items]
        self.rows, self.items, self.n_items = rows[keep], items[keep], n_items

    def means(
        self, function: Callable[[Tensor], Tensor | SparseCode], chunk: int = 2048, width: int = 0
    ) -> np.ndarray[Any, Any]:
        """The mean of function(rows) over each item's positions, float32 [n_items, width]. width: needed if the
        function returns rows of active features."""
        total: Tensor | None = None
        for rows, items in zip(self.rows.split(chunk), self.items.split(chunk), strict=True):
            values = function(rows.float())
            if isinstance(values, SparseCode):
                total = torch.zeros(self.n_items, width, dtype=torch.float64) if total is None else total
                mask = used(values.counts, values.values.shape[-1]).cpu()
                places = (items[:, None] * width + values.indices.cpu())[mask]
                total.view(-1).index_add_(0, places, values.values.cpu()[mask].double())
                continue
            if total is None:
                total = torch.zeros(self.n_items, values.shape[1], dtype=torch.float64)
            total.index_add_(0, items, values.double().cpu())
        assert total is not None
        counts = torch.bincount(self.items, minlength=self.n_items)
        return (total / counts[:, None]).float().numpy()


@torch.no_grad()
def representations(saes: Mapping[str, Codec], rows: Rows) -> dict[str, np.ndarray[Any, Any]]:
    """Returns the items' mean codes under each SAE, and their mean residuals under "raw"."""

    def codes(sae: Codec, x: Tensor) -> Tensor | SparseCode:
        x = x.to(device=sae.W_dec.device, dtype=sae.W_dec.dtype)
        code = rows_of(sae, x)
        return sae.encode(x) if code is None else code

    with ExitStack() as stack:
        for sae in saes.values():
            stack.enter_context(reading(sae, 1.0))
        return {
            **{name: rows.means(partial(codes, sae), width=len(sae.W_dec)) for name, sae in saes.items()},
            "raw": rows.means(lambda x: x),
        }


def read_rows(items: Items, host: HostModel, *, batch: int = 16, progress: Callable[[int], None] | None = None) -> Rows:
    """Reads the host's residuals at the items' pooled positions, once; they are kept in the cache.

    Args:
        progress: called with the number of items done.

    Raises:
        NumericsError: a residual is NaN or infinite.
    """
    identity = hashlib.sha256(
        f"{host.fingerprint()}|{host.dtype}|{host.default_hook}|{tuple(items.tokens.shape)}".encode()
    )
    for tensor in (items.tokens, items.pooled):
        identity.update(tensor.numpy().tobytes())
    path = cache_dir() / "probes" / f"{identity.hexdigest()[:16]}.safetensors"
    index = items.pooled.nonzero()[:, 0]
    try:
        rows = load_file(path)["rows"]
        if len(rows) != len(index) or not bool(rows.isfinite().all()):
            raise KeyError(path)
    except (OSError, SafetensorError, KeyError):
        parts = []
        for tokens, pooled in zip(items.tokens.split(batch), items.pooled.split(batch), strict=True):
            residual = host.residual(tokens)
            parts.append(residual[pooled.to(residual.device)].cpu())
            if not bool(torch.isfinite(parts[-1]).all()):
                raise NumericsError(
                    f"{host.default_hook} holds NaN or infinity in {host.dtype}; load the host in another dtype"
                ) from None
            if progress is not None:
                progress(len(tokens))
        rows = torch.cat(parts)
        with suppress(StorageError):  # a cache that is full, or that we may not write to
            make_folder(path.parent)
            write_atomically(path, lambda temporary: save_file({"rows": rows}, temporary))
    else:
        if progress is not None:
            progress(len(items))
    return Rows(rows, index, len(items))
