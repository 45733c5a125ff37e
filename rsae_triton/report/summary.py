"""The short table at the end of a demo in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rsae_triton.report.scores import COLUMNS, best, headline, number, text
from rsae_triton.report.style import NAMES, roles_in

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN = (("mse", "l0", "alive_fraction", "delta_ce"), ("mse", "delta_ce"))


def summary_table(metrics: Mapping[str, Any]) -> Table:
    """The four codes as shipped and at equal l0, with the better of RSAE and control in bold and the headline below.

    Args:
        metrics: metrics.json; missing values are shown as a dash.
    """
    from rich.table import Table

    columns = {column.key: column for column in COLUMNS}
    matched = metrics.get("matched_l0") or {}
    l0 = text(number(matched.get("teacher") or {}, "l0"), ".1f")
    table = Table(
        title=f"Held-out text: as shipped, and (=) at equal l0, {l0}",
        caption=_caption(metrics),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("code", overflow="fold")  # this column is the one that wraps in a narrow terminal
    parts = list(zip((metrics, matched), _SHOWN, ("", "="), strict=True))
    for _, keys, mark in parts:
        for key in keys:
            arrow = {-1: " ↓", 0: "", 1: " ↑"}[columns[key].better]
            table.add_column(f"{mark} {columns[key].label}{arrow}".strip(), justify="right", no_wrap=True)
    for role in roles_in(matched):
        cells = []
        for part, keys, _ in parts:
            for key in keys:
                value = text(number(part.get(role) or {}, key), columns[key].digits)
                cells.append(f"[bold]{value}[/]" if best(part, columns[key]) == role else value)
        table.add_row(NAMES[role], *cells)
    return table


def _caption(metrics: Mapping[str, Any]) -> str:
    """The headline, followed by the remarks about untrained rounds."""
    first, notes = headline(metrics)
    both = [first, *notes[:1]] if "rounds" in (metrics.get("matched_l0") or {}) else [first]
    return "\n".join(both).replace("\u00a0", "")  # rich would break lines at this space
