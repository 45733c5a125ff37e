"""Packs documents into token contexts of one fixed length, alternating between sources."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from rsae_triton.activations.documents import Document
from rsae_triton.activations.host import HostModel


class Contexts(NamedTuple):
    """A batch of contexts: int32 `tokens` [B, T], with BOS in the first column, and `documents` [B, T], the index of
    each token's document in the list that was packed."""

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


def pack(documents: Sequence[Document], host: HostModel, context: int, batch: int, seed: int) -> Iterator[Contexts]:
    """Yields batches of `batch` contexts of `context` tokens; the last batch is shorter, and an incomplete context
    dropped.

    Every context begins with BOS, and there is a BOS between two documents in the same context.
    """
    bos = host.bos_token_id
    sizes: dict[int, int] = {}
    tokens: list[int] = [bos]
    owners: list[int] = []
    rows: list[tuple[list[int], list[int]]] = []
    for index in reading_order(documents, sizes, seed):
        # verbose=False: documents may be longer than the model's context
        ids = host.tokenizer(documents[index].text, add_special_tokens=False, verbose=False)["input_ids"]
        sizes[index] = len(ids)
        if len(tokens) > 1:
            ids = [bos, *ids]
        elif not owners:
            owners = [index]
        while ids:
            room = context - len(tokens)
            tokens += ids[:room]
            owners += [index] * len(ids[:room])
            ids = ids[room:]
            if len(tokens) == context:
                rows.append((tokens, owners))
                tokens, owners = [bos], [index]
                if len(rows) == batch:
                    yield _batch(rows)
                    rows = []
        if len(tokens) == 1:
            owners = []
    if rows:
        yield _batch(rows)


def _batch(rows: list[tuple[list[int], list[int]]]) -> Contexts:
    return Contexts(*(np.array(column, dtype=np.int32) for column in zip(*rows, strict=True)))
