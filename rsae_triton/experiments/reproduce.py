"""`rsae reproduce`: the paper's two tables for a host, with controls that the paper does not have; resumable."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rsae_triton.common.checks import check_number, shown
from rsae_triton.common.errors import ConfigError, FormatError
from rsae_triton.common.files import read_json, write_text
from rsae_triton.experiments.sweep import Cell, Sweep, key_of, read_cell, run_cells, write_cell
from rsae_triton.report.fronts import METRICS, summarise, write_sweep_report
from rsae_triton.report.paper_tables import paper_tables

HOSTS = Path(__file__).with_name("hosts.toml")
# The entries of a cell other than its scores and stage 1.
KEPT = ("cell", "hook_name", "d_in", "d_sae", "family", "training", "seconds", "machine", "torch", "date")


@dataclass(frozen=True)
class Reproduce:
    """Fill the paper's two tables (reconstruction, downstream) on a host, beside fair controls.

    smollm2 needs no network: its teachers are trained here. gpt2, pythia-160m and gemma-2-2b take the public teachers
    that rsae_triton/experiments/hosts.toml names, from the hub. Every finished cell is a file in OUT/cells, so that a
    run that was stopped goes on; two runs may share the folder. What a committed table.json holds need not be computed
    again (--known).

    Examples:
        rsae reproduce --host smollm2 --out out/smollm2
        rsae reproduce --known benchmarks/results/reproduce-smollm2.json
        rsae reproduce --host gpt2 --device cuda
        rsae reproduce --host mine --hosts my_hosts.toml
    """

    host: str = "smollm2"
    """smollm2, gpt2, pythia-160m, gemma-2-2b, or a section of --hosts."""
    out: Path = Path("out/reproduce")
    """Folder of the cells and the tables."""
    hosts: Path = HOSTS
    """File that says which teachers, places and seeds belong to a host."""
    seeds: tuple[int, ...] = ()
    """These seeds only."""
    known: Path | None = None
    """A table.json of an earlier run: its cells are taken over, those it lacks or that changed are computed."""
    device: str | None = None
    """cpu or cuda; CUDA where there is one when not given."""
    list: bool = False
    """Name the cells and whether they are done, and compute nothing."""


def sweeps_of(config: Reproduce) -> tuple[tuple[Sweep, ...], Mapping[str, Any]]:
    """Returns the host's sweeps, and the published numbers by teacher family.

    Raises:
        FormatError: the file is not TOML, or has a setting that a sweep does not have.
        ConfigError: an unknown host.
    """
    try:
        known = tomllib.loads(config.hosts.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FormatError(f"--hosts {config.hosts} cannot be read: {error}") from error
    where = f"{config.hosts}, host {config.host}"
    if config.host not in known:
        raise ConfigError(f"--host is {config.host!r}; {config.hosts.name} has {', '.join(known)}")
    if not isinstance(known[config.host], dict):
        raise FormatError(f"{where} is {shown(known[config.host])}; give a table")
    section = dict(known[config.host])
    published, own_sweeps = section.pop("published", {}), section.pop("sweeps", [])
    if not isinstance(own_sweeps, list) or not all(isinstance(own, dict) for own in own_sweeps):
        raise FormatError(f"{where}: sweeps is {shown(own_sweeps)}; give tables, [[{config.host}.sweeps]]")
    if not isinstance(published, dict) or not all(isinstance(one, dict) for one in published.values()):
        raise FormatError(f"{where}: published is {shown(published)}; give tables by teacher family")
    options = {field.name for field in fields(Sweep)} - {"out", "device"}
    sweeps = []
    for own in own_sweeps:
        settings = {**section, **own}
        strange = sorted(set(settings) - options)
        if strange:
            raise FormatError(
                f"{where}: {', '.join(strange)} is no option of a sweep; there are {', '.join(sorted(options))}"
            )
        values: dict[str, Any] = {
            n: tuple(value) if isinstance(value, list) else value for n, value in settings.items()
        }
        for name, value in values.items():
            _check_kind(f"{where}: {name}", value, getattr(Sweep, name))
        one = Sweep(**values, out=config.out, device=config.device)
        for factor in one.sparsities:
            check_number(f"{where}: sparsities", factor, above=0)
        seeds = tuple(seed for seed in one.seeds if seed in config.seeds) if config.seeds else one.seeds
        if seeds:
            sweeps.append(replace(one, seeds=seeds))
    if not sweeps:
        raise ConfigError(f"{config.hosts}, host {config.host}: no sweep with seeds {config.seeds or 'of any kind'}")
    return tuple(sweeps), published


def _check_kind(name: str, value: Any, default: Any) -> None:
    """Raises FormatError unless `value` has the type of the sweep's default."""

    def fits(one: Any, like: Any) -> bool:
        if isinstance(one, bool) or isinstance(like, bool):
            return isinstance(one, bool) and isinstance(like, bool)
        return isinstance(one, int | float) if isinstance(like, float) else isinstance(one, type(like))

    if isinstance(default, tuple):
        like = default[0] if default else ""
        if not isinstance(value, tuple) or not all(fits(one, like) for one in value):
            raise FormatError(f"{name} is {shown(value)}; give a list such as {list(default) or ['...']}")
    elif not fits(value, default):
        raise FormatError(f"{name} is {shown(value)}; give a value such as {default!r}")


def reproduce(config: Reproduce) -> Path:
    """Runs `rsae reproduce` and returns the path of OUT/tables.md.

    Raises:
        RsaeError: something that the user can fix; finished cells stay.
    """
    sweeps, published = sweeps_of(config)
    cells: list[Cell] = [cell for one in sweeps for cell in one.cells()]
    known = {} if config.known is None else known_cells(config.known)
    # A table has scores only: a cell whose SAEs are asked for is computed unless they are on disk.
    taken = {cell: known[key] for cell in cells if (key := key_of(cell.identity())) in known and cell.saved()}
    if config.list:
        for cell in cells:
            print("done   " if cell in taken or cell.finished() else "waiting", cell.label)
        return config.out
    for one in sweeps:
        one.check()
    for cell, result in taken.items():
        if read_cell(cell.path) is None:
            write_cell(cell.path, result)
    results = run_cells(cells)
    write_sweep_report(config.out, results)
    write_text(config.out / "tables.md", paper_tables(summarise(results), published))
    write_text(config.out / "table.json", json.dumps(compact(config.host, results), indent=1) + "\n")
    return config.out / "tables.md"


def known_cells(path: Path) -> dict[str, dict[str, Any]]:
    """Reads the cells of a table.json, by `key_of` their identity.

    Raises:
        FormatError: the file is not one.
    """
    cells, wanted = read_json(path).get("cells"), {*KEPT, "stage1", "scores"}
    if not isinstance(cells, list) or not all(isinstance(cell, dict) and wanted <= set(cell) for cell in cells):
        raise FormatError(f"--known {path} is not the table.json of a finished `rsae reproduce`; give that file")
    return {key_of(cell["cell"]): cell for cell in cells}


def compact(host: str, cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns what is worth keeping under version control: the summary, and the part of each cell that `summarise`
    needs."""
    return {
        "command": f"rsae reproduce --host {host}",
        "machine": sorted({cell["machine"] for cell in cells}),
        "torch": sorted({cell["torch"] for cell in cells}),
        "date": sorted({cell["date"] for cell in cells}),
        "rows": summarise(cells),
        "cells": [
            {
                **{name: cell[name] for name in KEPT},
                "stage1": {"summary": cell["stage1"]["summary"]},
                **({"pursuit": cell["pursuit"]} if "pursuit" in cell else {}),
                "scores": {
                    **{name: _numbers(cell["scores"][name]) for name in cell["scores"]["matched_l0"]},
                    "matched_l0": {name: _numbers(score) for name, score in cell["scores"]["matched_l0"].items()},
                    **_to_the_teacher(cell["scores"]),
                },
            }
            for cell in cells
        ],
    }


def _to_the_teacher(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Every contender's difference to the teacher at equal l0, paired by sequence, where known."""
    if "to_teacher" in scores:  # a cell that was taken over from a table.json
        return {"to_teacher": dict(scores["to_teacher"])}
    found = {
        name: pairs["teacher"]
        for name, pairs in scores.get("paired", {}).get("matched_l0", {}).items()
        if pairs.get("teacher")
    }
    return {"to_teacher": found} if found else {}


def _numbers(score: Mapping[str, Any]) -> dict[str, Any]:
    return {metric: score[metric] for metric in METRICS if metric in score}
