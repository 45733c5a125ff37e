"""The order in which an epoch reads the rows of a store: random, a function of the seed, and cheap to start
anywhere."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

import torch

# This many rows are shuffled together, which takes 8 bytes for each. Shards are in random order, so a window of a
# larger store is drawn from all over it.
WINDOW = 1 << 22


def mix_seed(seed: int, number: int) -> int:
    """A seed for part `number` of what `seed` determines; neighbouring seeds have no part in common."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{number}".encode()).digest()[:7], "little")


class EpochOrder:
    """A random order of the rows of shards with `shard_rows` rows each, computed window by window.

    If there are at most `window` rows, it is one permutation. Otherwise shards are shuffled and grouped into windows of
    at least that many rows, and the rows of each window are shuffled.
    """

    def __init__(self, shard_rows: Sequence[int], seed: int, window: int = WINDOW) -> None:
        self._seed = seed
        starts = torch.tensor([0, *shard_rows]).cumsum(0).tolist()
        shards = list(itertools.pairwise(starts))
        if starts[-1] > window:
            order = torch.randperm(len(shards), generator=self._generator(mix_seed(seed, -1))).tolist()
            shards = [shards[number] for number in order]
        self._windows: list[list[tuple[int, int]]] = [[]]
        self._ends = [0]
        for first, last in shards:
            self._windows[-1].append((first, last))
            self._ends[-1] += last - first
            if self._ends[-1] - (self._ends[-2] if len(self._ends) > 1 else 0) >= window:
                self._windows.append([])
                self._ends.append(self._ends[-1])
        if not self._windows[-1] and len(self._windows) > 1:
            self._windows.pop()
            self._ends.pop()
        self._at: int | None = None
        self._rows = torch.empty(0, dtype=torch.long)

    def rows(self, first: int, last: int) -> torch.Tensor:
        """The rows at positions first, ..., last - 1 of the order."""
        parts, begin = [], 0
        for number, end in enumerate(self._ends):
            if first < end and last > begin:
                parts.append(self._window(number)[max(first - begin, 0) : last - begin])
            begin = end
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _window(self, number: int) -> torch.Tensor:
        if self._at != number:
            rows = torch.cat([torch.arange(first, last) for first, last in self._windows[number]])
            seed = self._seed if len(self._windows) == 1 else mix_seed(self._seed, number)
            self._at, self._rows = number, rows[torch.randperm(len(rows), generator=self._generator(seed))]
        return self._rows

    @staticmethod
    def _generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)
