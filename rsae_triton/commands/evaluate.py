"""`rsae eval`: scores saved SAEs on held-out text, side by side."""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from rsae_triton.activations import HostModel
from rsae_triton.common.errors import ConfigError, StorageError
from rsae_triton.common.files import check_folder, check_ordinary, make_folder, write_text
from rsae_triton.common.progress import LoggedProgress
from rsae_triton.common.terminal import plain
from rsae_triton.evaluation.compare import compare
from rsae_triton.evaluation.held_out import TextOptions, check_text, load_saes, open_held_out, open_host
from rsae_triton.evaluation.reconstruction import DENSE, measure

# Rows of the table: key, label, format.
_ROWS = (
    ("mse", "mse", "#.4g"),
    ("fvu", "fvu", ".4f"),
    ("fvu_by_dimension", "fvu by dimension", ".4f"),
    ("cosine", "cosine", ".4f"),
    ("l0", "l0", ".2f"),
    ("l1", "l1", "#.4g"),
    ("alive_fraction", "alive", ".2%"),
    ("dead_features", "dead features", "d"),
    ("dense_features", "dense features (> 10 % of tokens)", "d"),
    ("dense_features_half", "dense features (> 1/2 of tokens)", "d"),
    ("delta_ce", "Δ ce", ".4f"),
    ("kl", "KL from the unspliced model", ".4f"),
    ("loss_recovered", "loss recovered (zero ablation)", ".2%"),
    ("loss_recovered_mean", "loss recovered (mean ablation)", ".2%"),
)


@dataclass(frozen=True, kw_only=True)
class Eval(TextOptions):
    """Score saved SAEs on held-out text and in their language model; several are compared in pairs.

    Examples:
        rsae eval out/demo/rsae
        rsae eval out/demo/teacher out/demo/control out/demo/rsae --tokens 50000 --out eval.json
        rsae eval my_sae --model gpt2 --hook blocks.8.hook_resid_pre --text my_texts/ --whole-text
    """

    paths: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="SAE [SAE ...]")]]
    """Folders of saved SAEs, ours or a teacher's; the first sets the l0 at which all are compared."""
    sequences: int = 48
    """Sequences of 128 tokens to splice into; 0 leaves the language model's loss out."""
    out: Path | None = None
    """Write everything here as JSON."""


def run_eval(options: Eval) -> dict[str, Any]:
    """Scores the SAEs, prints the tables and returns what is written to `--out`.

    Raises:
        RsaeError: something that the user can fix.
    """
    if options.sequences < 0 or options.sequences == 1:
        raise ConfigError(f"--sequences is {options.sequences}; an interval takes at least 2, 0 leaves them out")
    check_text(options)
    check_writable(options.out)
    saes = load_saes(options.paths)
    host = open_host(options, saes)
    data = open_held_out(options, saes, host)
    measured = {}
    with bar("reconstructing", len(saes) * len(data.x)) as advance:
        for name, sae in saes.items():
            measured[name] = measure(sae, data.x, advance)
    downstream: dict[str, Any] = {}
    sequences = data.store.sequences
    count = min(options.sequences, len(sequences.tokens))
    if options.sequences:
        downstream = {"host": host, "splice": data.splice, "mean": data.mean}
        downstream |= {"tokens": sequences.tokens[:count], "counted": sequences.counted[:count]}
    with bar("splicing", count) as advance:
        scores = compare(saes, data.x, measured=measured, contexts=data.store.contexts, progress=advance, **downstream)
    result: dict[str, Any] = {
        "saes": {name: scores[name] for name in saes},
        "matched_l0": scores["matched_l0"],
        "paired": scores["paired"],
        "features": {
            name: {
                "dead": (one.frequency == 0).nonzero().flatten().tolist(),
                "dense": {int(f): float(one.frequency[f]) for f in (one.frequency > DENSE).nonzero().flatten()},
            }
            for name, one in measured.items()
        },
        "meta": {
            **provenance(host),
            "paths": {name: str(path) for name, path in zip(saes, options.paths, strict=True)},
            "text": ", ".join(options.text),
            "corpus_sha256": data.store.manifest["corpus_sha256"],
            "activation_scale": data.splice.scale,
            "n_tokens": data.store.n_tokens,
            "n_sequences": count if options.sequences else 0,
            "seed": data.store.manifest["seed"],
        },
    }
    write_json(options.out, result)
    show(result)
    return result


def show(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the tables of a result of `run_eval`."""
    console = console or Console()
    saes: Mapping[str, Any] = result["saes"]
    meta = result["meta"]
    first = next(iter(saes))
    title = f"{meta['model']}, {meta['hook']}: {meta['n_tokens']} held-out tokens, {meta['n_sequences']} sequences"
    console.print(_scores(title, saes))
    if any(score.get("loss_recovered", 0) > 1 for score in saes.values()):
        console.print("Loss recovered above 100 % is noise from so few sequences; see the interval of Δ ce.")
    if len(saes) == 1:
        return
    matched = result["matched_l0"]
    console.print(
        _scores(f"At the l0 of {first} ({saes[first]['l0']:.2f}), or at its own l0 if that is lower", matched)
    )
    table = Table(title="Paired differences at that l0, 95 % intervals", title_justify="left")
    table.add_column("", overflow="fold")
    table.add_column("score")
    table.add_column("difference", justify="right", no_wrap=True)
    for ours, others in result["paired"]["matched_l0"].items():
        for theirs, metrics in others.items():
            name = plain(f"{ours} − {theirs}")
            for key, label in {"mse": "mse", "delta_ce": "Δ ce", "kl": "KL"}.items():
                if metrics.get(key) is not None:
                    table.add_row(name, label, _difference(metrics[key]))
                    name = ""
    console.print(table)


def _scores(title: str, saes: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title=plain(title), title_justify="left")
    table.add_column("")
    for name in saes:
        table.add_column(plain(name), justify="right", overflow="fold")
    for key, label, digits in _ROWS:
        if all(key in scores for scores in saes.values()):
            cells = [format(scores[key], digits) for scores in saes.values()]
            if f"{key}_low" in next(iter(saes.values())):
                cells = [
                    f"{cell}\n{scores[key + '_low']:.4f} to {scores[key + '_high']:.4f}"
                    for cell, scores in zip(cells, saes.values(), strict=True)
                ]
            table.add_row(label, *cells)
    return table


def _difference(found: list[float]) -> str:
    mean, low, high = found
    text = f"{mean:+.4g} ({low:+.4g} to {high:+.4g})"
    return f"[bold]{text}[/]" if low > 0 or high < 0 else text


@contextmanager
def bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar on stderr; yields the function that advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with LoggedProgress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.advance(task, done)


def provenance(host: HostModel) -> dict[str, Any]:
    """Facts about the run: command, model, machine and versions."""
    return {
        "command": "rsae " + shlex.join(sys.argv[1:]),
        "model": host.name,
        "hook": host.default_hook,
        "machine": f"{platform.machine()}, {host.device}, {host.dtype}".replace("torch.", ""),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def check_writable(out: Path | None) -> None:
    """Checks that the result can be written to `out`, before anything is computed."""
    if out is None:
        return
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name a file in it")
    try:
        check_ordinary(out)
        check_folder(out.parent)
    except StorageError as error:
        raise StorageError(f"--out {out}: {error}") from error


def write_json(out: Path | None, result: Mapping[str, Any]) -> None:
    """Writes the result completely or not at all (StorageError); does nothing if `out` is None."""
    if out is None:
        return
    make_folder(out.parent)
    write_text(out, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
