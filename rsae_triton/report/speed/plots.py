"""Plots time and peak memory of all contenders against each size, on logarithmic axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rsae_triton.common.files import write_text
from rsae_triton.report.speed.results import SWEEPS, series
from rsae_triton.report.svg import svg_file

LABELS = {
    "d_sae": "d_sae", "n_tokens": "n_tokens", "degree": "degree, p + q", "groups": "coefficient sets (of 5, 4)",
    "median_s": "seconds a step", "peak_bytes": "transient memory, MB",
}  # fmt: skip
# Okabe and Ito's colours; markers and dashes distinguish lines without colour.
STYLES: dict[str, dict[str, Any]] = {
    "eager, Horner": {"color": "#d55e00", "marker": "o"},
    "eager, powers": {"color": "#e69f00", "marker": "s", "linestyle": "--"},
    "torch.compile": {"color": "#009e73", "marker": "^"},
    "ours": {"color": "#0072b2", "marker": "D", "linewidth": 2.2},
    "ours, chunked": {"color": "#56b4e9", "marker": "v", "linestyle": "--"},
    "ours, streamed": {"color": "#0072b2", "marker": "P", "linestyle": ":"},
    "bare products": {"color": "#000000", "marker": ".", "linestyle": "-."},
}


def draw(result: dict[str, Any], what: str, path: Path) -> bool:
    """Writes an SVG with a panel for each sweep; returns False if there is none. what: "median_s" or "peak_bytes"."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator

    lines = {sweep: series(result, sweep, what) for sweep in SWEEPS}
    lines = {sweep: found for sweep, found in lines.items() if found}
    if not lines:
        return False
    figure = Figure(figsize=(2.6 * len(lines), 3.2), layout="constrained")
    scale = 1e-6 if what == "peak_bytes" else 1.0
    seen: dict[str, Any] = {}
    for axes, (sweep, found) in zip(figure.subplots(1, len(lines), squeeze=False)[0], lines.items(), strict=True):
        for name, points in found.items():
            style = {"linewidth": 1.4, "markersize": 4, **STYLES.get(name, {"color": "#777777", "marker": "x"})}
            (seen[name],) = axes.plot([x for x, _ in points], [scale * y for _, y in points], label=name, **style)
        axes.set(xscale="log", yscale="log", xlabel=LABELS[sweep])
        sizes = sorted({x for points in found.values() for x, _ in points})
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes], fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(True, which="major", color="#d5d9de", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel(LABELS[what])
    figure.legend(seen.values(), seen.keys(), loc="outside upper center", ncols=min(len(seen), 4), frameon=False)
    write_text(path, svg_file(figure, what, **{"svg.fonttype": "none"}))
    return True
