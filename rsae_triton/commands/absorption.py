"""`rsae absorption`: how much of a word's first letter an SAE hides in features of the words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from rsae_triton.commands.evaluate import bar, check_writable, provenance, write_json
from rsae_triton.common.checks import check_seed
from rsae_triton.common.errors import ConfigError
from rsae_triton.common.terminal import plain
from rsae_triton.evaluation.absorption import absorption, letter_probes, letter_words
from rsae_triton.evaluation.held_out import HostOptions, load_saes, open_host
from rsae_triton.evaluation.probe_items import read_rows
from rsae_triton.report.fronts import student
from rsae_triton.sae.units import reading


@dataclass(frozen=True, kw_only=True)
class Absorption(HostOptions):
    """Feature absorption: how much of the words' first letters each SAE leaves to features of single words.

    Examples:
        rsae absorption out/demo/teacher out/demo/control out/demo/rsae --out absorption.json
    """

    paths: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="SAE [SAE ...]")]]
    """Folders of saved SAEs, ours or a teacher's; differences are taken to the first."""
    per_letter: int = 200
    """Words of each letter, at most; a fifth of the words is held out."""
    seed: int = 0
    """Seed of the choice of words and of those held out."""
    out: Path | None = None
    """Write everything here as JSON."""


def run_absorption(options: Absorption) -> dict[str, Any]:
    """Measures the SAEs, prints a table and returns what is written to `--out`.

    Raises:
        RsaeError: something that the user can fix.
    """
    if options.per_letter < 25:
        raise ConfigError(f"--per-letter is {options.per_letter}; give at least 25")
    check_seed(options.seed)
    check_writable(options.out)
    saes = load_saes(options.paths)
    host = open_host(options, saes)
    items = letter_words(host, per_letter=options.per_letter, seed=options.seed)
    with bar("reading words", len(items)) as advance:
        x = read_rows(items, host, progress=advance).rows.float()
    probes = letter_probes(x.numpy(), items, seed=options.seed)
    found, active = {}, {}
    with bar("measuring", len(saes)) as advance, torch.no_grad():
        for name, sae in saes.items():
            sae.to(host.device)
            with reading(sae, 1.0):
                parts = [sae.encode(part.to(sae.W_dec.device, sae.W_dec.dtype)).float().cpu() for part in x.split(1024)]
                rows = sae.W_dec.float().cpu().numpy()
            codes = torch.cat(parts).numpy()
            active[name] = float((codes != 0).sum(1).mean())
            found[name] = absorption(codes, rows, x.numpy(), probes)
            advance(1)
    first = next(iter(found.values()))
    result = {
        "letters": [chr(ord("a") + letter) for letter in probes.f1],
        "probe_f1": list(probes.f1.values()),
        "l0": active,
        "scores": {name: {key: values.tolist() for key, values in one.items()} for name, one in found.items()},
        "mean": {name: {key: float(values.mean()) for key, values in one.items()} for name, one in found.items()},
        "to_first": {
            name: {key: student((values - first[key]).tolist()) for key, values in one.items()}
            for name, one in list(found.items())[1:]
        },
        "meta": {
            **provenance(host),
            "paths": {name: str(path) for name, path in zip(saes, options.paths, strict=True)},
            "n_words": len(items),
            "n_test": int(probes.test.sum()),
            "per_letter": options.per_letter,
            "seed": options.seed,
        },
    }
    write_json(options.out, result)
    show(result)
    return result


def show(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the table of a result of `run_absorption`."""
    console = console or Console()
    meta, letters = result["meta"], result["letters"]
    table = Table(
        title=plain(f"{meta['model']}, {meta['hook']}: absorption of first letters, mean of {len(letters)}"),
        title_justify="left",
    )
    for label in ("", "l0", "absorbed", "minus the first (95 %)", "carried", "by main", "silent", "F1"):
        table.add_column(label, justify="right")
    for name, mean in result["mean"].items():
        one = result["to_first"].get(name, {}).get("fraction")
        difference = "" if one is None else f"{one['mean']:+.3f}"
        if one and one["low"] is not None:
            difference += f" ({one['low']:+.3f} to {one['high']:+.3f})"
        shares = [f"{mean[key]:.3f}" for key in ("carried", "by_main", "silent", "f1")]
        table.add_row(plain(name), f"{result['l0'][name]:.1f}", f"{mean['fraction']:.3f}", difference, *shares)
    console.print(table)
    console.print(
        f"{meta['n_test']:,} of {meta['n_words']:,} words held out; the probe on the activations has F1 "
        f"{np.mean(result['probe_f1']):.3f}."
    )
