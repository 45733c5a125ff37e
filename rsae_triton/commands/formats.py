"""`rsae formats`: lists the formats that are read, and how much of SAELens' registry of pretrained SAEs they cover."""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rsae_triton.commands.evaluate import check_writable, write_json
from rsae_triton.teachers import FORMATS
from rsae_triton.teachers.layouts import Row, rows
from rsae_triton.teachers.registry import entries, registry_file


@dataclass(frozen=True)
class Formats:
    """List the formats that are read, and count the entries of the installed SAELens' registry: read or refused.

    Examples:
        rsae formats
        rsae formats --out formats.json
    """

    out: Path | None = None
    """Write the count here as JSON."""
    markdown: bool = False
    """Print the table as Markdown, as docs/formats.md holds it."""


def run_formats(options: Formats) -> dict[str, Any] | None:
    """Prints the formats and the count. Returns what is written to `--out`, or None without SAELens."""
    check_writable(options.out)
    console = Console()
    if not options.markdown:
        table = Table(title="Formats that load_teacher reads", title_justify="left")
        table.add_column("format")
        table.add_column("files it looks for", overflow="fold")
        for name, module in FORMATS.items():
            table.add_row(name, module.LOOKS_FOR)
        console.print(table)
    if registry_file() is None:
        console.print("Install sae-lens to count the entries of its registry of pretrained SAEs.")
        return None
    found = rows(entries())
    result = count(found)
    if options.markdown:
        print(markdown(found))
    else:
        show(found, result, console)
    write_json(options.out, result)
    return result


def count(found: list[Row]) -> dict[str, Any]:
    """Returns the totals, and the rows that they are sums of."""
    total, read = sum(one.entries for one in found), sum(one.read for one in found)
    as_kind = {kind: sum(one.read for one in found if one.kind == kind) for kind in ("sae", "transcoder")}
    return {
        "sae_lens": importlib.metadata.version("sae-lens"),
        "entries": total,
        "read": read,
        "read_share": round(read / total, 4),
        "read_as": as_kind,
        "refused": total - read,
        "layouts": [asdict(one) for one in found],
    }


def show(found: list[Row], result: dict[str, Any], console: Console) -> None:
    """Prints the table of layouts."""
    table = Table(title=f"The registry of sae-lens {result['sae_lens']}", title_justify="left")
    for name in ("SAELens' layout", "read here as", "kind"):
        table.add_column(name, overflow="fold")
    for name in ("entries", "read"):
        table.add_column(name, justify="right")
    for one in found:
        table.add_row(one.layout, one.format, one.kind, f"{one.entries:,}", f"{one.read:,}")
    console.print(table)
    console.print(summary(result))


def summary(result: dict[str, Any]) -> str:
    """The totals in one sentence."""
    saes, transcoders = result["read_as"]["sae"], result["read_as"]["transcoder"]
    return (
        f"{result['read']:,} of {result['entries']:,} entries are read ({result['read_share']:.1%}): {saes:,} SAEs and "
        f"{transcoders:,} transcoders; {result['refused']:,} are refused by name"
    )


def markdown(found: list[Row]) -> str:
    """The table in the form of docs/formats.md."""
    lines = ["| SAELens' layout | releases | entries | kind | read as |", "|---|---|---|---|---|"]
    lines += [f"| {one.layout} | {one.releases} | {one.entries:,} | {one.kind} | {one.format} |" for one in found]
    return "\n".join([*lines, "", f"{summary(count(found))} (sae-lens {importlib.metadata.version('sae-lens')})."])
