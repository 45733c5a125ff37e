"""Activations at two places for the same tokens, row by row: for training and scoring transcoders."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rsae_triton.activations.documents import Document
from rsae_triton.activations.extract import extract_hooks, split_three_ways
from rsae_triton.activations.host import HostModel
from rsae_triton.activations.store import ActivationStore, Sequences
from rsae_triton.common.errors import ConfigError


class PairedStore:
    """Two stores of the same tokens: `inputs`, where a transcoder reads, and `targets`, where it writes.

    Rows are [d_in + d_out], each side in its own SAE units (mean norm sqrt(d)); `scales` are the two factors.

    Args:
        inputs, targets: `ActivationStore`s, or their folders, that `extract_pairs` made.

    Raises:
        ConfigError: their rows are not of the same tokens.
    """

    def __init__(self, inputs: ActivationStore | str | Path, targets: ActivationStore | str | Path) -> None:
        self.inputs, self.targets = (
            one if isinstance(one, ActivationStore) else ActivationStore(one) for one in (inputs, targets)
        )
        rows = [[shard["rows"] for shard in one.manifest["shards"]] for one in (self.inputs, self.targets)]
        columns = ("tokens", "positions", "contexts")
        both = ((self.inputs, self.targets),)
        if rows[0] != rows[1] or any(
            not torch.equal(getattr(a, name), getattr(b, name)) for a, b in both for name in columns
        ):
            raise ConfigError(
                f"the rows of {self.inputs.folder} and {self.targets.folder} are not of the same tokens; read them "
                "together, with extract_pairs"
            )
        self.scales: tuple[float, float] = (self.inputs.scale, self.targets.scale)
        self.d_in, self.d_out = self.inputs.d_in, self.targets.d_in
        self.n_tokens = self.inputs.n_tokens
        key = f"{self.inputs.manifest['key']}|{self.targets.manifest['key']}"
        self.manifest: dict[str, Any] = {
            **self.inputs.manifest,
            "hook_name_out": self.targets.manifest["hook_name"],
            "scale_out": self.targets.scale,
            "key": hashlib.sha256(key.encode()).hexdigest(),
        }

    def __repr__(self) -> str:
        return f"PairedStore(n_tokens={self.n_tokens}, d_in={self.d_in}, d_out={self.d_out})"

    def __len__(self) -> int:
        return self.n_tokens

    def tensor(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Every row, [n_tokens, d_in + d_out]."""
        return torch.cat([self.inputs.tensor(dtype), self.targets.tensor(dtype)], dim=1)

    def rows(self, which: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Returns rows by their numbers, int64 [n] -> [n, d_in + d_out]; other rows are not read from disk."""
        return torch.cat([self.inputs.rows(which, dtype), self.targets.rows(which, dtype)], dim=1)

    def chunks(self, size: int) -> Iterator[torch.Tensor]:
        """All rows in order, float32 [<= size, d_in + d_out] at a time."""
        for x, y in zip(self.inputs.chunks(size), self.targets.chunks(size), strict=True):
            yield torch.cat([x, y], dim=1)

    def batches(self, batch_size: int, seed: int = 0, **options: Any) -> Iterator[torch.Tensor]:
        """Yields batches [batch_size, d_in + d_out], shuffled; arguments are those of `ActivationStore.batches`."""
        sides = (one.batches(batch_size, seed, **options) for one in (self.inputs, self.targets))
        for x, y in zip(*sides, strict=True):
            yield torch.cat([x, y], dim=1)

    @cached_property
    def mean(self) -> torch.Tensor:
        """The mean of the targets, float32 [d_out]."""
        return self.targets.mean

    @property
    def sequences(self) -> Sequences:
        """The contexts that the rows were read from, as in `ActivationStore`."""
        return self.inputs.sequences

    @property
    def contexts(self) -> torch.Tensor:
        return self.inputs.contexts

    @property
    def tokens(self) -> torch.Tensor:
        return self.inputs.tokens

    @property
    def positions(self) -> torch.Tensor:
        return self.inputs.positions

    @property
    def document_info(self) -> list[dict[str, Any]]:
        return self.inputs.document_info


def row_width(activations: Any) -> int:
    """The width of a store's rows."""
    return int(activations.d_in) + (activations.d_out if isinstance(activations, PairedStore) else 0)


class PairedSplits(NamedTuple):
    """Like `Splits`, for pairs."""

    train: PairedStore
    validation: PairedStore
    test: PairedStore


def extract_pairs(
    host: HostModel,
    documents: Sequence[Document],
    hook_name: str,
    hook_name_out: str,
    n_tokens: int = 200_000,
    *,
    like: PairedStore | None = None,
    **options: Any,
) -> PairedStore:
    """Reads activations at two places in one pass, keeping the same tokens of both.

    BOS and outliers are dropped by the norms at `hook_name` alone; everything else is as in `extract_hooks`.
    """
    inside, outside = host.resolve_hook(hook_name), host.resolve_hook(hook_name_out)
    if inside == outside:
        raise ConfigError(f"{hook_name} and {hook_name_out} are one place; a transcoder has two")
    stores = extract_hooks(
        host,
        documents,
        [inside, outside],
        n_tokens,
        rows_as=inside,
        like=None if like is None else [like.inputs, like.targets],
        **options,
    )
    return PairedStore(*stores)


def extract_pair_splits(
    host: HostModel,
    documents: list[Document],
    hook_name: str,
    hook_name_out: str,
    *,
    n_train: int = 200_000,
    n_validation: int = 10_000,
    n_test: int = 10_000,
    heldout: float = 0.1,
    seed: int = 0,
    **options: Any,
) -> PairedSplits:
    """Like `extract_splits`, for pairs."""
    parts = split_three_ways(documents, heldout, seed)
    places, options = (hook_name, hook_name_out), {**options, "seed": seed}
    train = extract_pairs(host, parts[0], *places, n_train, **options)
    options["like"] = train
    validation = extract_pairs(host, parts[1], *places, n_validation, split="validation", **options)
    return PairedSplits(train, validation, extract_pairs(host, parts[2], *places, n_test, split="test", **options))
