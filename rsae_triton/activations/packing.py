"""Packs documents into token contexts of one fixed length, alternating between sources."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from rsae_triton.activations.documents import Document
from rsae_triton.activations.host import HostModel


class Contexts(NamedTuple):
    """A batch of contexts: int32 `tokens` [B, T], as a rule with BOS in the first column, and `documents` [B, T], the
    index of each token's document in the list that was packed."""

    tokens: np.ndarray
    documents: np.ndarray


def reading_order(documents: Sequence[Document], sizes: dict[int, int], seed: int) -> Iterator[int]:
    """Yields indices of `documents`, shuffled within each source, always from the source that has given least so far.

    The consumer fills `sizes` with the number of tokens of every index it received. So any number of tokens contains
    equal shares of all sources, as far as their texts go.
    """
    queues: dict[str, list[int]] = {}
    for index, document in enumerate(documents):
        queues.setdefault(document.source, []).append(index)
    rng = np.random.default_rng(seed)
    for queue in queues.values():
        rng.shuffle(queue)
    given = dict.fromkeys(queues, 0)
    while queues:
        source = min(queues, key=given.__getitem__)
        index = queues[source].pop()
        if not queues[source]:
            del queues[source]
        yield index
        given[source] += sizes.get(index, 0)


def pack(
    documents: Sequence[Document], host: HostModel, context: int, batch: int, seed: int, *, prepend_bos: bool = True
) -> Iterator[Contexts]:
    """Yields batches of `batch` contexts of `context` tokens; the last batch is shorter, and an incomplete context
    dropped.

    Every context begins with BOS unless prepend_bos=False, and there is a BOS between two documents in one context.
    """
    bos = host.bos_token_id
    start = [bos] if prepend_bos else []
    sizes: dict[int, int] = {}
    tokens: list[int] = [*start]
    owners: list[int] = []
    rows: list[tuple[list[int], list[int]]] = []
    for index in reading_order(documents, sizes, seed):
        # verbose=False: documents may be longer than the model's context
        ids = host.tokenizer(documents[index].text, add_special_tokens=False, verbose=False)["input_ids"]
        sizes[index] = len(ids)
        if len(tokens) > len(start):
            ids = [bos, *ids]
        elif not owners:
            owners = [index] * len(start)
        while ids:
            room = context - len(tokens)
            tokens += ids[:room]
            owners += [index] * len(ids[:room])
            ids = ids[room:]
            if len(tokens) == context:
                rows.append((tokens, owners))
                tokens, owners = [*start], [index] * len(start)
                if len(rows) == batch:
                    yield _batch(rows)
                    rows = []
        if len(tokens) == len(start):
            owners = []
    if rows:
        yield _batch(rows)


def _batch(rows: list[tuple[list[int], list[int]]]) -> Contexts:
    return Contexts(*(np.array(column, dtype=np.int32) for column in zip(*rows, strict=True)))


def left_out(tokens: torch.Tensor, made: Mapping[str, Any]) -> torch.Tensor:
    """Marks the positions in contexts [B, T] where no activation is kept, apart from BOS and outliers: bool [B, T].

    made: a store's manifest. Only positions in its `seqpos_slice` (start, stop, step) are kept, and no activations at
    its `exclude_tokens`; without these entries all are kept.
    """
    left = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
    if (positions := made.get("seqpos_slice")) is not None:
        left[:] = True
        left[:, slice(*positions)] = False
    if excluded := made.get("exclude_tokens"):
        left |= torch.isin(tokens, torch.tensor(excluded, device=tokens.device, dtype=tokens.dtype))
    return left
