"""Reads activations of a host model on text into stores: the options, a store's identity, and the three splits."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from safetensors import SafetensorError

from rsae_triton.activations.documents import Document, corpus_sha256, split
from rsae_triton.activations.downloads import cache_dir
from rsae_triton.activations.host import HostModel
from rsae_triton.activations.loading import parse_dtype
from rsae_triton.activations.store import SCHEMA, ActivationStore
from rsae_triton.activations.writing import Extraction, write_shards
from rsae_triton.common.checks import shown
from rsae_triton.common.errors import ConfigError, FormatError, RsaeError, StorageError, first_line
from rsae_triton.common.files import make_folder, publish


class Splits(NamedTuple):
    """Disjoint stores in the training store's units: fit on `train`, choose settings on `validation`, report on
    `test`."""

    train: ActivationStore
    validation: ActivationStore
    test: ActivationStore


def extract(
    host: HostModel,
    documents: Sequence[Document],
    hook_name: str | None = None,
    n_tokens: int = 200_000,
    *,
    like: ActivationStore | None = None,
    **options: Any,
) -> ActivationStore:
    """`extract_hooks` for one place, by default the host's."""
    return extract_hooks(host, documents, [hook_name], n_tokens, like=None if like is None else [like], **options)[0]


def extract_hooks(
    host: HostModel,
    documents: Sequence[Document],
    hook_names: Sequence[str | None],
    n_tokens: int = 200_000,
    *,
    context: int = 128,
    batch: int | None = None,
    dtype: str | torch.dtype = torch.bfloat16,
    seed: int = 0,
    drop_outliers: float | None = 4.0,
    keep_bos: bool = False,
    split: str = "train",
    like: Sequence[ActivationStore] | None = None,
    rows_as: str | None = None,
    prepend_bos: bool = True,
    seqpos_slice: Sequence[int | None] | None = None,
    exclude_special_tokens: bool | Sequence[int] = False,
    root: str | Path | None = None,
    progress: bool = True,
) -> list[ActivationStore]:
    """Reads `n_tokens` activations at each of `hook_names` from `documents`, into one store per place; opens existing
    ones.

    All places are read in one pass, which ends at the last of them. A run that was killed continues at the next shard.
    Rows are stored in host units as `dtype`; the store's scale takes those that are not BOS to a mean norm of
    sqrt(d_in).

    Args:
        keep_bos: keep BOS positions, which are dropped by default.
        drop_outliers: drop positions whose norm exceeds this times the median (None keeps them). These are fewer than
            one in a thousand, but have several times the power of all others together.
        like: stores, one per place, whose scale and outlier limit to use instead (held-out text must be in the training
            text's units).
        rows_as: one of the places; outliers at all places are then decided by the norms there, so that all stores have
            rows of the same tokens (`extract_pairs`).
        prepend_bos, seqpos_slice, exclude_special_tokens: SAELens' settings of these names; what an SAE says of them is
            `making_of(sae.metadata).reading`. Whether contexts begin with BOS; (start, stop, step) of the positions in
            a context that are kept; whether the tokenizer's special tokens, or tokens of these ids, are dropped.
        root: the folder for the stores; by default in the cache.

    Raises:
        FormatError: the text is too short, or a store is damaged.
        NumericsError: activations are not finite.
        ConfigError: a bad option.
    """
    names = [host.resolve_hook(name) for name in hook_names]
    dtype = parse_dtype(dtype)
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"hooks {', '.join(names) or 'none'}: name at least one place, and each once")
    if n_tokens < 1 or not 2 <= context <= host.max_context:
        raise ConfigError(
            f"n_tokens={n_tokens} with context={context}: choose n_tokens >= 1 and 2 <= context <= {host.max_context}"
        )
    if drop_outliers is not None and drop_outliers <= 1:
        raise ConfigError(f"drop_outliers={drop_outliers} would drop half the text; choose about 4, or None")
    if not documents:
        raise FormatError("there is no text to read activations from; give at least one document")
    read_as = _read_as(host, context, prepend_bos, seqpos_slice, exclude_special_tokens)
    strange = next((one for one in documents if not isinstance(one, Document)), None)
    if strange is not None:
        raise ConfigError(
            f"documents holds a {type(strange).__name__}; give what load_corpus returns, or Document(text, source, ...)"
        )
    common: dict[str, Any] = {
        "schema": SCHEMA,
        "model_fingerprint": host.fingerprint(),
        "host_dtype": str(host.dtype).removeprefix("torch."),
        "corpus_sha256": corpus_sha256(documents),
        "requested_tokens": n_tokens,
        "context": context,
        "dtype": str(dtype).removeprefix("torch."),
        "seed": seed,
        "drop_outliers": drop_outliers,
        "split": split,
        **({"center_writing_weights": True} if host.centred else {}),
        **({"keep_bos": True, "mean_of": "text"} if keep_bos else {}),
        **read_as,
    }
    # Contexts of 128 in batches of 8 are fastest on a CPU; larger batches overflow its cache.
    contexts = batch or (max(1, 1024 // context) if host.device.type == "cpu" else 64)
    folders: list[Path] = []
    runs = []
    with _refusals(folders), ExitStack() as locks:
        for place, name in enumerate(names):
            units = None
            if like is not None:
                units = {"scale": like[place].scale, "norm_limit": like[place].manifest["norm_limit"]}
            identity = common | {"hook_name": name, "units": units}
            if rows_as is not None:
                identity |= {"rows_as": rows_as, "rows_of": names}
            key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
            stem = re.sub(r"[^\w.-]+", "_", f"{Path(host.name).name[:80]}-{name[:80]}-{split[:20]}").encode()[:190]
            folder = Path(root or cache_dir() / "activations") / f"{stem.decode(errors='ignore')}-{key[:12]}"
            folders.append(folder)
            runs.append((folder, key, identity))
        # Always in the same order, so that two runs cannot wait for each other.
        for folder in sorted(folders):
            # complete, since it gets its name last; and a cache that we may not write to has no place for a lock
            if folder.exists():
                continue
            make_folder(folder.parent)
            locks.enter_context(FileLock(folder.parent / f".{folder.name}.lock"))
        missing = [
            (Extraction(host, documents, identity, dtype, contexts, folder.parent / f".{folder.name}.partial"), key)
            for folder, key, identity in runs
            if not folder.exists()
        ]
        if missing:
            write_shards([one for one, _ in missing], progress)
        for one, key in missing:
            one.finish(key)
            publish(one.partial, one.partial.with_name(one.partial.name[1:].removesuffix(".partial")))
    return [ActivationStore(folder) for folder in folders]


def _read_as(
    host: HostModel,
    context: int,
    prepend_bos: bool,
    seqpos_slice: Sequence[int | None] | None,
    exclude_special_tokens: bool | Sequence[int],
) -> dict[str, Any]:
    """Returns the entries of a manifest about contexts without BOS and positions that are left out; only unusual
    ones."""
    found: dict[str, Any] = {} if prepend_bos else {"prepend_bos": False}
    if seqpos_slice is not None:
        try:
            kept = len(range(context)[slice(*seqpos_slice)])
        except (TypeError, ValueError):
            kept = 0
        if not kept:
            raise ConfigError(
                f"seqpos_slice={shown(seqpos_slice)} keeps no position of a context of {context}; give (start, stop), "
                "or (start, stop, step)"
            )
        if kept < context:
            found["seqpos_slice"] = list(seqpos_slice)
    if exclude_special_tokens is not False:
        given: Any = exclude_special_tokens
        if given is True:
            names = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id")
            given = [host.bos_token_id, *(getattr(host.tokenizer, name, None) for name in names)]
            given = [one for one in given if one is not None]
        if not isinstance(given, list | tuple) or not all(type(one) is int and one >= 0 for one in given):
            raise ConfigError(
                f"exclude_special_tokens is {shown(exclude_special_tokens)}; give True, or the ids of tokens"
            )
        found["exclude_tokens"] = sorted(set(given))
    return found


@contextmanager
def _refusals(folders: list[Path]) -> Iterator[None]:
    """Turns refusals of the system into a StorageError that says how to continue."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, RsaeError):
            raise
        raise StorageError(
            f"activations cannot be written to {folders[0].parent} ({first_line(error)}); free some space and run it "
            "again; it continues at the next shard"
        ) from error


def extract_splits(
    host: HostModel,
    documents: list[Document],
    hook_name: str | None = None,
    *,
    n_train: int = 200_000,
    n_validation: int = 10_000,
    n_test: int = 10_000,
    heldout: float = 0.1,
    seed: int = 0,
    **options: Any,
) -> Splits:
    """Splits the documents by work and extracts each side; `options`: see `extract`. Validation and test halve
    `heldout`."""
    train_documents, validation_documents, test_documents = split_three_ways(documents, heldout, seed)
    train = extract(host, train_documents, hook_name, n_train, seed=seed, **options)
    options |= {"seed": seed, "like": train}
    validation = extract(host, validation_documents, hook_name, n_validation, split="validation", **options)
    return Splits(train, validation, extract(host, test_documents, hook_name, n_test, split="test", **options))


def split_three_ways(
    documents: list[Document], heldout: float = 0.1, seed: int = 0
) -> tuple[list[Document], list[Document], list[Document]]:
    """Returns the documents that `extract_splits` uses for training, validation and test."""
    train, held = split(documents, heldout, seed)
    return train, *split(held, 0.5, seed + 1)
