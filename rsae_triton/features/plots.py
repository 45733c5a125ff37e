"""Draws a feature: the histogram of its pre-activations with the gate over it."""

from __future__ import annotations

from typing import Any

from rsae_triton.report.plots import finish
from rsae_triton.report.style import COLOURS


def feature_figure(feature: Any) -> Any:
    """The histogram of a `Feature`'s pre-activations (log scale), the gate over it, and the threshold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 3.0), layout="constrained")
    behind = figure.subplots()
    behind.stairs(feature.counts, feature.edges, fill=True, color=COLOURS["fill"], label="tokens")
    behind.stairs(feature.active_counts, feature.edges, fill=True, alpha=0.5, color=COLOURS["rsae"], label="active")
    behind.set_yscale("symlog", linthresh=1)
    behind.set(xlabel="pre-activation h", ylabel="tokens")
    handles: Any = behind.get_legend_handles_labels()
    if feature.gate is not None:
        axes = behind.twinx()
        axes.plot(feature.edges, feature.gate, color=COLOURS["rsae"], linewidth=1.6, label="activation z")
        axes.set_ylabel("activation z")
        handles = tuple(a + b for a, b in zip(handles, axes.get_legend_handles_labels(), strict=True))
        finish(axes)
        axes.spines[["right"]].set_visible(True)
        axes.grid(False)
    if feature.threshold is not None and feature.edges[0] <= feature.threshold <= feature.edges[-1]:
        behind.axvline(feature.threshold, color=COLOURS["ink"], linewidth=0.8, linestyle=":")
    behind.legend(*handles, fontsize="small", frameon=False, loc="upper left")
    finish(behind)
    return figure
