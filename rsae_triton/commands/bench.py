"""`rsae bench`: shows the committed benchmarks, compares a new result with them, and makes the pages about them.

A result of `tools/gpu_check.py` is accepted too; the routes that it measured go into the table of `ops/routing.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rsae_triton.common.errors import ConfigError
from rsae_triton.common.files import write_text
from rsae_triton.ops import routing
from rsae_triton.report.speed import plots, tables
from rsae_triton.report.speed.results import guard, load_results, read_result, slug, write_result


@dataclass(frozen=True)
class Bench:
    """Benchmark results as tables and plots. `make bench` and `make bench-gpu` measure.

    Attributes:
        results: folder of the committed speed-NAME.json.
        new: a result to compare with the committed one of the same kind of device, by ratios: warns, never fails.
        keep: put `new` into the folder, in the place of that device's.
        note: a line about how `new` was measured, kept with it.
        render: write docs/benchmarks.md, its plots and the table of docs/index.md.
    """

    results: Path = Path("benchmarks/results")
    new: Path | None = None
    keep: bool = False
    note: str = ""
    render: bool = False


def run_bench(options: Bench, root: Path = Path()) -> None:
    """Runs `rsae bench`. Raises ConfigError if there is nothing to show or no place to write to."""
    console = Console(soft_wrap=True)
    folder = root / options.results
    if options.keep and options.new is None:
        raise ConfigError("--keep puts the result that --new names into the folder; give both")
    if options.new is not None:
        result = read_result(options.new)
        if options.keep and result.get("made_by") and (result["tiny"] or result["device"]["kind"] != "cuda"):
            raise ConfigError(f"{options.new} is a dry run of {result['made_by']}; only one on a GPU can be kept")
        old = [one for one in load_results(folder).values() if one["device"]["kind"] == result["device"]["kind"]]
        # With results of several machines, use the one of this machine if there is one.
        old.sort(key=lambda one: slug(one) != slug(result))
        for one in old[:1]:
            warnings, compared = guard(result, one)
            for line in warnings:
                console.print(f"warning: {line}", style="yellow", markup=False, highlight=False)
            if not compared:
                console.print("nothing to compare: no case of the committed result has three turns in both")
            elif not warnings:
                console.print(f"none of {compared} ratios is worse than the committed one by more than a quarter")
        if options.keep:
            if options.note:
                result["note"] = options.note
            write_result(folder / f"speed-{slug(result)}.json", result)
            if result.get("routes"):
                routing.write(root / "rsae_triton" / "ops" / routing.TABLE.name, result["routes"])
    results = load_results(folder)
    if not results and options.new is None and not options.render:
        raise ConfigError(f"{folder} has no speed-NAME.json; run `make bench`, then `rsae bench --new FILE --keep`")
    if options.render:
        for path in render(results, root):
            console.print(str(path), markup=False)
    elif options.new is None or not options.keep:
        shown = {"new": read_result(options.new)} if options.new is not None else results
        console.print(tables.page(shown, {}), markup=False, highlight=False)


def render(results: dict[str, dict[str, Any]], root: Path = Path()) -> list[Path]:
    """Writes docs/benchmarks.md, two plots for each device, and the table of docs/index.md. Returns the files written.

    Raises:
        ConfigError: there is no docs folder, or index.md does not have exactly one place for the table.
    """
    docs, readme = root / "docs", root / "docs" / "index.md"
    if not docs.is_dir() or not readme.is_file():
        raise ConfigError(f"{docs} or {readme} is missing; run this in a checkout of the repository")
    text, pattern = readme.read_text(), r"(<!-- speed table:.*?-->\n).*?(<!-- /speed table -->)"
    table = tables.readme_table(results)
    text, count = re.subn(pattern, lambda match: f"{match[1]}{table}\n{match[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise ConfigError(f"{readme} has {count} places for the speed table; it must have one")
    drawn: dict[str, list[str]] = {}
    for name, result in results.items():
        for what, word in (("median_s", "time"), ("peak_bytes", "memory")):
            path = docs / f"benchmarks-{name}-{word}.svg"
            if plots.draw(result, what, path):
                drawn.setdefault(name, []).append(path.name)
    page = docs / "benchmarks.md"
    write_text(page, tables.page(results, drawn))
    write_text(readme, text)
    return [page, readme, *(docs / one for names in drawn.values() for one in names)]
