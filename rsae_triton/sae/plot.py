"""Plots a gate: activation against pre-activation, for a few of its features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rsae_triton.common.checks import check_integer
from rsae_triton.common.errors import ConfigError

_SHOWN = 5


@torch.no_grad()
def plot_gate(gate: Any, features: Sequence[int] | None) -> Any:
    """Draws the figure of `RationalGate.plot`."""
    from matplotlib.figure import Figure

    theta = gate.threshold.detach().float().cpu()
    if features is None:
        ranks = torch.linspace(0, len(theta) - 1, min(_SHOWN, len(theta))).round().long()
        features = theta.argsort()[ranks].unique(sorted=False).tolist()
    if not features:
        raise ConfigError("features is empty; name some, such as [303]")
    for feature in features:
        check_integer("a feature", feature, 0, gate.d_sae - 1)
    chosen = torch.tensor(list(features))
    width = gate.tensors().input_scale.detach().float().cpu().expand(gate.d_sae)[chosen]
    low, high = float((theta[chosen] - 2 * width).min()), float((theta[chosen] + 2 * width).max())
    high = max(high, 1.5 * float(theta[chosen].max()))
    h = torch.linspace(low, high, 400)
    grid = h[:, None].expand(-1, gate.d_sae).to(gate.threshold.device)
    z, soft = (gate(grid, hard=hard)[:, chosen].float().cpu() for hard in (True, False))
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for place, feature in enumerate(features):
        colour = f"C{place}"
        axes.plot(h, soft[:, place], color=colour, linewidth=1, linestyle=":")
        axes.plot(h, z[:, place], color=colour, linewidth=1.6, label=f"feature {feature}")
    axes.set(xlabel="pre-activation h", ylabel="activation z")
    axes.set_title(f"{gate.form} gate, degree {gate.degree}; dotted: the rational without zeros", fontsize="medium")
    axes.legend(fontsize="small", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(linewidth=0.3)
    return figure
