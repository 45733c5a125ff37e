"""Reads the labelled data sets of the package `sae-probes` (arXiv:2502.16681) as probing tasks.

Its data files are read from the installed package; the package is not imported (that would need SAELens,
TransformerLens and xgboost), so `pip install --no-deps sae-probes zstandard` is enough. Its own protocol,
`sae_probes.run_sae_evals`, works with our SAEs too, since SAELens loads them (docs/evaluation.md).
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rsae_triton.activations import HostModel
from rsae_triton.common.errors import ConfigError, FormatError, SourceError
from rsae_triton.evaluation.probe_items import Items
from rsae_triton.evaluation.probe_tasks import Task

KIND = "sae-probes"
FOLDER = Path("data", "cleaned_data")


def set_names() -> list[str]:
    """The names of all data sets, such as "67_social-security".

    Raises:
        SourceError: the package is not installed.
    """
    return sorted((path.name.removesuffix(".csv.zst") for path in _folder().glob("*.csv.zst")), key=_number)


def probe_set(
    name: str, host: HostModel, *, per_label: int = 250, context: int = 128, seed: int = 0
) -> tuple[Task, Items]:
    """Returns a binary data set as task and items: the last `context` tokens of each prompt, probed at the last one.

    Args:
        per_label: prompts of each label, at most; drawn with `seed`.

    Raises:
        ConfigError: no such set (the message names similar ones), or one with more than two labels.
        SourceError: the package, or zstandard, is not installed. FormatError: a file that cannot be read.
    """
    rows = _rows(name)
    classes = sorted({target for _, target in rows})
    if len(classes) != 2:
        raise ConfigError(f"{name} has {len(classes)} labels; a probe needs exactly two")
    digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()[:8]
    rng = np.random.default_rng(int.from_bytes(digest, "little"))
    of_label = [[prompt for prompt, target in rows if target == one] for one in classes]
    count = min(per_label, *map(len, of_label))
    if count < 2:
        raise ConfigError(f"{name} has {min(map(len, of_label))} prompts of one label; a probe needs 2, better 100")
    chosen = [[prompts[i] for i in rng.permutation(len(prompts))[:count]] for prompts in of_label]
    windows = [_tokens(host, prompt, context) for prompts in chosen for prompt in prompts]
    length = max(map(len, windows))
    # Rows are padded at the end: the last token of a prompt does not see what follows it.
    tokens = torch.full((len(windows), length), host.bos_token_id)
    pooled = torch.zeros(len(windows), length, dtype=torch.bool)
    for row, window in enumerate(windows):
        tokens[row, : len(window)] = torch.tensor(window)
        pooled[row, len(window) - 1] = True
    task = Task(name, KIND, (classes[0], classes[1]), lambda _: iter(()), lambda document: document.group)
    # A prompt that occurs twice must not be on both sides of a split.
    units = [hashlib.sha256(repr(window).encode()).hexdigest()[:16] for window in windows]
    return task, Items(tokens, pooled, np.repeat([False, True], count), units)


def _tokens(host: HostModel, prompt: str, context: int) -> list[int]:
    ids: list[int] = host.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    return [host.bos_token_id, *ids[-(context - 1) :]]


def _folder() -> Path:
    spec = importlib.util.find_spec("sae_probes")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not places:
        raise SourceError(
            "the data sets are those of the package sae-probes; install it with: "
            "pip install --no-deps sae-probes zstandard"
        )
    return Path(places[0]) / FOLDER


def _rows(name: str) -> list[tuple[str, str]]:
    path = _folder() / f"{name}.csv.zst"
    if not path.is_file():
        close = difflib.get_close_matches(name, set_names(), n=3, cutoff=0.3)
        raise ConfigError(f"sae-probes has no set {name!r}" + (f"; did you mean {', '.join(close)}?" if close else ""))
    try:
        import zstandard
    except ImportError as error:
        raise SourceError("the data sets are compressed; install with: pip install zstandard") from error
    try:
        with zstandard.open(path, "rb") as file:
            text = file.read().decode("utf-8")
    except (zstandard.ZstdError, UnicodeDecodeError, OSError) as error:
        raise FormatError(f"{path} cannot be read ({error}); install sae-probes again") from error
    rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(text)))
    if not rows or not {"prompt", "target"} <= set(rows[0]):
        raise FormatError(f"{path} has no columns prompt and target; install sae-probes again")
    return [(row["prompt"], row["target"]) for row in rows if row["prompt"] and row["target"]]


def _number(name: str) -> tuple[int, str]:
    head = name.split("_")[0]
    return (int(head) if head.isdigit() else 10**6, name)
