"""`rsae probe`: sparse probing of saved SAEs, compared with the raw residual stream."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from rsae_triton.activations import Document, HostModel, load_corpus
from rsae_triton.activations.demo_corpus import demo_documents
from rsae_triton.commands.evaluate import bar, check_writable, provenance, write_json
from rsae_triton.common.checks import check_seed
from rsae_triton.common.errors import ConfigError
from rsae_triton.common.terminal import plain
from rsae_triton.evaluation.held_out import HostOptions, load_saes, open_host
from rsae_triton.evaluation.probe_items import Items, make_items, read_rows, representations
from rsae_triton.evaluation.probe_sets import KIND, probe_set, set_names
from rsae_triton.evaluation.probe_tasks import TASKS, Task, labelled
from rsae_triton.evaluation.probing import KS, Probed, average, sparse_probe
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.making import warn_of_reading

RAW = "raw"


@dataclass(frozen=True, kw_only=True)
class Probe(HostOptions):
    """Sparse probing: how well k features of each SAE, or k raw dimensions, tell labels apart.

    Examples:
        rsae probe out/demo/teacher out/demo/control out/demo/rsae --out probing.json
        rsae probe my_sae --model gpt2 --tasks president "part of speech"
        rsae probe my_sae --text reviews.jsonl --label sentiment
        rsae probe out/demo/teacher out/demo/rounds --sets 67_social-security 69_blood-pressure
    """

    paths: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="SAE [SAE ...]")]]
    """Folders of saved SAEs, ours or a teacher's; each is compared with those named before it."""
    tasks: tuple[str, ...] = ()
    """Only these of the built-in tasks, by name or kind; all when not given."""
    text: tuple[str, ...] = ()
    """Your own labelled text instead: .jsonl files with a "text" field and the label's, or a hub dataset."""
    label: str | None = None
    """The field of your own text that holds the label; it must take two values."""
    sets: tuple[str, ...] = ()
    """Data sets of the package sae-probes instead, such as 67_social-security; all its sets with two labels: all."""
    items: int = 250
    """Windows of text of each label, at most."""
    context: int = 64
    """Tokens of a window, BOS included."""
    seed: int = 0
    """Seed of the windows, the splits and the resampling."""
    out: Path | None = None
    """Write everything here as JSON."""


def run_probe(options: Probe) -> dict[str, Any]:
    """Probes the SAEs on every task, prints the tables and returns what is written to `--out`.

    Raises:
        RsaeError: something that the user can fix.
    """
    if options.items < 10 or options.context < 8:
        raise ConfigError(f"--items {options.items} --context {options.context}: choose at least 10 and 8")
    check_seed(options.seed)
    check_writable(options.out)
    saes = load_saes(options.paths)
    names = sets_of(options)
    tasks, documents = ([], []) if names else choose(options)
    host = open_host(options, saes)
    for name, sae in saes.items():
        warn_of_reading(sae.metadata, {}, name)  # windows begin with BOS, and all positions count
    items = from_sets(options, names, host) if names else windows(options, tasks, documents, host)
    probed, ceilings = probe(saes, host, items, seed=options.seed)
    result = {
        "tasks": {task.name: _task(task, items[task], probed[task], ceilings[task]) for task in items},
        "mean": _means([probed[task] for task in items], [*saes, RAW]),
        "raw_wins": _raw_wins(probed, list(saes)),
        "meta": {
            **provenance(host),
            "paths": {name: str(path) for name, path in zip(saes, options.paths, strict=True)},
            "text": KIND if names else ", ".join(options.text) or "demo",
            "items_per_label": options.items,
            "context": options.context,
            "seed": options.seed,
        },
    }
    write_json(options.out, result)
    show(result)
    return result


def sets_of(options: Probe) -> list[str]:
    """Returns the names of the requested data sets of sae-probes.

    Raises:
        ConfigError: other text or tasks are requested as well.
        SourceError: the package is not installed.
    """
    if not options.sets:
        return []
    if options.text or options.label or options.tasks:
        raise ConfigError("--sets cannot be combined with --text, --label or --tasks")
    return set_names() if options.sets == ("all",) else list(dict.fromkeys(options.sets))


def from_sets(options: Probe, names: Sequence[str], host: HostModel) -> dict[Task, Items]:
    """Returns the items of every data set. If all sets are requested, those with more than two labels are left out."""
    found: dict[Task, Items] = {}
    with bar("reading data sets", len(names)) as advance:
        for name in names:
            try:
                task, items = probe_set(name, host, per_label=options.items, context=options.context, seed=options.seed)
                found[task] = items
            except ConfigError:
                if options.sets != ("all",):
                    raise
            advance(1)
    return found


def choose(options: Probe) -> tuple[list[Task], list[Document]]:
    """Returns the requested tasks and the documents for them.

    Raises:
        ConfigError: an unknown task, or only one of --text and --label.
    """
    if bool(options.text) != bool(options.label):
        raise ConfigError("--text and --label go together: your own text, and the field that labels it")
    if options.text and options.label:
        documents = load_corpus(list(options.text))
        return [labelled(documents, options.label)], documents
    known = {task.name for task in TASKS} | {task.kind for task in TASKS}
    for name in options.tasks:
        if name not in known:
            raise ConfigError(f"no task or kind {name!r}; there are {', '.join(sorted(known))}")
    tasks = [task for task in TASKS if not options.tasks or {task.name, task.kind} & set(options.tasks)]
    # Whole works, because a word's label may depend on the line it is on; they are cut into windows here anyway.
    return tasks, demo_documents(lambda line: warnings.warn(line, stacklevel=4))


def windows(options: Probe, tasks: Sequence[Task], documents: Sequence[Document], host: HostModel) -> dict[Task, Items]:
    """Returns the items of every task; a task whose text is missing is left out with a warning.

    Raises:
        ConfigError: no task has text.
    """
    found: dict[Task, Items] = {}
    problem = None
    with bar("choosing text", len(tasks)) as advance:
        for task in tasks:
            try:
                found[task] = make_items(
                    task, documents, host, per_label=options.items, context=options.context, seed=options.seed
                )
            except ConfigError as error:
                problem = error
                warnings.warn(f"left out: {error}", stacklevel=2)
            advance(1)
    if not found and problem is not None:
        raise problem
    return found


def probe(
    saes: Mapping[str, SparseAutoencoder], host: HostModel, items: Mapping[Task, Items], *, seed: int = 0
) -> tuple[dict[Task, Probed], dict[Task, Probed]]:
    """Returns, per task, the sparse probes of every SAE and of the raw dimensions, and the probe of all raw
    dimensions."""
    for sae in saes.values():
        sae.to(host.device)
    probed, ceilings = {}, {}
    with bar("reading and probing", sum(map(len, items.values()))) as advance:
        for task, chosen in items.items():
            found = representations(saes, read_rows(chosen, host, progress=advance))
            groups = np.unique(chosen.units, return_inverse=True)[1]
            probed[task] = sparse_probe(found, chosen.labels, groups, seed=seed)
            every = found[RAW].shape[1]
            ceilings[task] = sparse_probe({RAW: found[RAW]}, chosen.labels, groups, ks=(every,), seed=seed)
    return probed, ceilings


def _task(task: Task, items: Items, probed: Probed, ceiling: Probed) -> dict[str, Any]:
    names = list(dict.fromkeys(name for name, _ in probed.predictions))
    ((raw, every),) = ceiling.predictions
    return {
        "kind": task.kind,
        "classes": list(task.classes),
        "n_items": len(items),
        "n_units": len(set(items.units)),
        "folds": probed.folds,
        "chance": probed.chance,
        "scores": {str(k): {name: probed.score(name, k) for name in names} for k in KS},
        "paired": {
            str(k): {b: {a: probed.difference(b, a, k) for a in names[: names.index(b)]} for b in names[1:]} for k in KS
        },
        "all_raw_dimensions": {"k": every, **ceiling.score(raw, every)},
        "features": {name: {str(k): probed.features[name, k] for k in KS} for name in names},
    }


def _means(probed: Sequence[Probed], names: Sequence[str]) -> dict[str, Any]:
    """Means over the tasks, of the scores and of the paired differences, by k."""
    return {
        "scores": {str(k): {name: average(probed, name, k) for name in names} for k in KS},
        "paired": {
            str(k): {b: {a: average(probed, b, k, a) for a in names[: names.index(b)]} for b in names[1:]} for k in KS
        },
    }


def _raw_wins(probed: Mapping[Task, Probed], names: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """By SAE and k, the tasks on which raw dimensions are more accurate, with the interval of the difference above
    zero."""
    return {
        name: {
            str(k): [task.name for task, one in probed.items() if one.difference(RAW, name, k)["accuracy"][1] > 0]
            for k in KS
        }
        for name in names
    }


def show(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the tables of a result of `run_probe`."""
    console = console or Console()
    names = list(result["mean"]["scores"][str(KS[0])])
    meta = result["meta"]
    ks = ", ".join(map(str, KS))
    table = Table(
        title=plain(f"{meta['model']}, {meta['hook']}: accuracy with k = {ks} features"), title_justify="left"
    )
    for label in ("task", "items", *names, "all raw"):
        table.add_column(plain(label), justify="left" if label == "task" else "right")
    for task, found in result["tasks"].items():
        cells = [_accuracies(found["scores"], name) for name in names]
        table.add_row(plain(task), str(found["n_items"]), *cells, f"{found['all_raw_dimensions']['accuracy'][0]:.2f}")
    table.add_section()
    table.add_row("mean", "", *(_accuracies(result["mean"]["scores"], name) for name in names), "")
    console.print(table)
    table = Table(title="Mean differences in accuracy, 95 % intervals", title_justify="left")
    for label in ("", *(f"k = {k}" for k in KS)):
        table.add_column(label, justify="right")
    for theirs, ours in combinations(names, 2):
        cells = []
        for k in KS:
            mean, low, high = result["mean"]["paired"][str(k)][ours][theirs]["accuracy"]
            text = f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
            cells.append(f"[bold]{text}[/]" if low > 0 or high < 0 else text)
        table.add_row(plain(f"{ours} − {theirs}"), *cells)
    console.print(table)
    for name, by_k in result["raw_wins"].items():
        for k, tasks in by_k.items():
            if tasks:
                console.print(f"Raw dimensions beat {name} at k = {k} on: {', '.join(tasks)}.")


def _accuracies(scores: Mapping[str, Any], name: str) -> str:
    return " ".join(f"{scores[str(k)][name]['accuracy'][0]:.2f}" for k in KS)
