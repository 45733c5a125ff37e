"""The report's figures. Each function returns a matplotlib `Figure` that belongs to no window or global state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from rsae_triton.report.codes import Codes, codes_of, mse_against_l0, subset
from rsae_triton.report.gates import GatePicture, gate_picture
from rsae_triton.report.scores import number
from rsae_triton.report.style import COLOURS, NAMES, line, roles_in
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.rational import FusedRationalSAE

# At this width a figure has readable text when it fills a phone's screen.
_SIZE = (4.8, 3.6)
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def gate_figure(picture: GatePicture, *, zoom: bool = False) -> Any:
    """The gates over the histogram of pre-activations; zoom shows only where they open."""
    figure = _figure(height=4.4)
    _draw_gates(figure, picture, zoom)
    return figure


def trade_off_figure(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], target: float) -> Any:
    """Plots mse against l0 for each code (from `mse_against_l0`). target: the l0 at which codes are compared."""
    figure = _figure()
    _draw_trade_off(figure.subplots(), curves, target)
    return figure


def training_figure(logs: Mapping[str, Mapping[str, Any]], target: float | None = None) -> Any:
    """Plots mse (above) and l0 (below) against the step. logs: `TrainLog.as_dict()` by role. target: the l0 to hold."""
    figure = _figure(height=4.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    for role, log in logs.items():
        step = np.asarray(log["step"], dtype=float)
        for axes, key in ((above, "mse"), (below, "l0")):
            values = np.asarray(log[key], dtype=float)
            axes.plot(step, values, color=COLOURS[role], linewidth=0.8, alpha=0.3)
            axes.plot(step, _smooth(values), **line(role, label=NAMES[role] if axes is above else None))
            # Training from scratch changes both by powers of ten, fine-tuning by per cent.
            if values.min() > 0 and values.max() > 10 * values.min():
                axes.set_yscale("log", subs=())
                axes.yaxis.set_major_locator(_ticker().LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter(_ticker().FuncFormatter(lambda value, _: f"{value:g}"))
                axes.yaxis.set_minor_formatter(_ticker().NullFormatter())
    if target is not None:
        below.axhline(target, color=COLOURS["ink"], linewidth=0.8, linestyle=":", label="teacher's l0")
        below.legend(fontsize="small", frameon=False)
    above.set(ylabel="mse of the batch")
    below.set(ylabel="l0 of the batch", xlabel="step")
    above.legend(fontsize="small", frameon=False)
    finish(above, below)
    return figure


def frequency_figure(frequencies: Mapping[str, np.ndarray], n_tokens: int) -> Any:
    """Plots how many features fire how often. frequencies: by role, the fraction of tokens for each feature,
    [d_sae]."""
    figure = _figure()
    axes = figure.subplots()
    # Bin edges lie between whole numbers of tokens; a bin without a whole number would look like a lack of features.
    tokens = np.unique(np.geomspace(1, n_tokens + 1, 41).round()) - 0.5
    edges = np.log10(tokens / n_tokens)
    for role, frequency in frequencies.items():
        count = np.histogram(np.log10(frequency[frequency > 0]), edges)[0] / np.diff(edges)
        label = f"{NAMES[role]} ({int((frequency == 0).sum())} never)"
        axes.stairs(count, edges, **line(role, label=label))
    axes.xaxis.set_major_locator(_ticker().MaxNLocator(integer=True, nbins=6))
    axes.xaxis.set_major_formatter(_ticker().FuncFormatter(lambda value, _: _power(value)))
    axes.set(xlabel="fraction of tokens on which a feature is active", ylabel="features per factor of ten")
    axes.legend(fontsize="small", frameon=False)
    finish(axes)
    return figure


def readme_figure(
    metrics: Mapping[str, Any],
    logs: Mapping[str, Any],
    saes: Mapping[str, SparseAutoencoder],
    x: Tensor,
    seed: int = 0,
) -> Any:
    """One wide picture: the learned gate over the pre-activations, and mse against l0.

    Args:
        metrics, logs, saes, x, seed: see `write_report`; the logs are not drawn.
    """
    x = x[subset(len(x), seed)]
    codes = {role: codes_of(saes[role], x) for role in roles_in(saes)}
    figure = _figure(width=2 * _SIZE[0], height=4.4)
    left, right = figure.subfigures(1, 2)
    _draw_gates(left, picture_of(saes, codes, x), zoom=True)
    _draw_trade_off(
        right.subplots(),
        {role: mse_against_l0(codes[role], saes[role].sides(x)[1]) for role in roles_in(codes)},
        matched_l0(metrics, codes),
    )
    return figure


def picture_of(saes: Mapping[str, SparseAutoencoder], codes: Mapping[str, Codes], x: Tensor) -> GatePicture:
    """Evaluates the gates of teacher, init and rsae, over the features that are active in both teacher and rsae."""
    init, rsae = saes["init"], saes["rsae"]
    assert isinstance(init, FusedRationalSAE)
    assert isinstance(rsae, FusedRationalSAE)
    alive = (codes["teacher"].firing_frequency() > 0) & (codes["rsae"].firing_frequency() > 0)
    return gate_picture(saes["teacher"], init, rsae, rsae.sides(x)[0], alive)


def matched_l0(metrics: Mapping[str, Any], codes: Mapping[str, Codes]) -> float:
    """The l0 at which codes are compared: the teacher's."""
    value = number((metrics.get("matched_l0") or {}).get("teacher") or {}, "l0")
    return value if np.isfinite(value) else codes["teacher"].l0


def _draw_gates(figure: Any, picture: GatePicture, zoom: bool) -> None:
    axes = figure.subplots()
    behind = axes.twinx()
    behind.stairs(picture.teacher_count, picture.edges, fill=True, color=COLOURS["fill"], label="teacher's h")
    behind.stairs(picture.rsae_count, picture.edges, color=COLOURS["ink"], linewidth=0.7, label="RSAE's h")
    behind.set_yscale("log")
    behind.set_ylabel("pre-activations per bin")
    _plain_log_axis(behind.yaxis)
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)
    h = picture.h
    rsae, soft = picture.rsae, picture.rational
    band = {"alpha": 0.18, "linewidth": 0}
    axes.fill_between(h, rsae.low, rsae.high, color=COLOURS["rsae"], label="RSAE, 80 % of features", **band)
    if np.any(picture.teacher.high != picture.teacher.low):
        axes.fill_between(h, picture.teacher.low, picture.teacher.high, color=COLOURS["teacher"], **band)
    axes.plot(h, picture.init.median, **line("init"))
    axes.plot(h, soft.median, **line("rsae", linestyle=(0, (1, 1)), linewidth=1.2, label="RSAE, rational (no zeros)"))
    axes.plot(h, rsae.median, **line("rsae"))
    axes.plot(h, picture.teacher.median, **line("teacher"))
    left, right = (h[0], h[-1]) if not zoom else _zoom(picture)
    seen = (h >= left) & (h <= right)
    shown = np.concatenate([band[seen] for band in (rsae.high, soft.median, picture.init.median, picture.teacher.high)])
    low = np.nanmin(np.concatenate([band[seen] for band in (rsae.low, soft.median, picture.init.median)]))
    top = float(np.nanmax(shown))
    axes.set(
        xlim=(left, right), ylim=(min(1.15 * low, -0.04 * top), 1.05 * top), xlabel="pre-activation h", ylabel="code z"
    )
    handles, labels = axes.get_legend_handles_labels()
    more, names = behind.get_legend_handles_labels()
    # Placed below the picture, because inside the histogram would run through it.
    options = {"fontsize": "small", "frameon": False, "ncols": 2, "loc": "outside lower center"}
    figure.legend(handles + more, labels + names, labelcolor=COLOURS["ink"], **options)
    finish(axes, grid=False)
    finish(behind, grid=False, right=True)


def _zoom(picture: GatePicture) -> tuple[float, float]:
    """The range of h around the point where nine tenths of the features have opened."""
    opened = picture.h[np.argmax(picture.rsae.low > 0)] if np.any(picture.rsae.low > 0) else 0.0
    right = min(max(2.0 * float(opened), 0.25 * float(picture.h[-1])), float(picture.h[-1]))
    return max(float(picture.h[0]), -right), right


def _draw_trade_off(axes: Any, curves: Mapping[str, tuple[np.ndarray, np.ndarray]], target: float) -> None:
    for role, (l0, mse) in curves.items():
        axes.plot(l0, mse, **line(role))
        axes.plot(l0[-1], mse[-1], "o", color=COLOURS[role], markersize=5)
    axes.axvline(target, color=COLOURS["ink"], linewidth=0.8, linestyle=":", label="teacher's l0")
    axes.set(xlabel="l0 (active features per token)", ylabel="mse")
    # Placed below: eight lines leave no corner free.
    axes.legend(fontsize="small", frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    finish(axes)


def _figure(width: float = _SIZE[0], height: float = _SIZE[1]) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _ticker() -> Any:
    from matplotlib import ticker

    return ticker


def finish(*all_axes: Any, grid: bool = True, right: bool = False) -> None:
    """Applies the common look. Every colour must be one of COLOURS, so that it follows the page's theme."""
    for axes in all_axes:
        if grid:
            axes.grid(True, color=COLOURS["grid"], linewidth=0.6)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("bottom", "right" if right else "left"))
            spine.set_color(COLOURS["ink"])
        axes.tick_params(which="both", colors=COLOURS["ink"], labelsize="small")
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_color(COLOURS["ink"])
        legend = axes.get_legend()
        for entry in legend.get_texts() if legend else ():
            entry.set_color(COLOURS["ink"])


def _plain_log_axis(axis: Any) -> None:
    # matplotlib's own labels are mathtext, which is set badly in an SVG with system fonts.
    axis.set_major_formatter(_ticker().FuncFormatter(lambda value, _: _power(np.log10(value))))
    axis.set_minor_formatter(_ticker().NullFormatter())


def _power(exponent: float) -> str:
    if abs(exponent - round(exponent)) > 1e-6:
        return ""
    return "1" if round(exponent) == 0 else "10" + str(round(exponent)).translate(_SUPERSCRIPT)


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over about a twentieth of the run, over less at the ends."""
    half = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    low, high = np.maximum(np.arange(len(values)) - half, 0), np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)
