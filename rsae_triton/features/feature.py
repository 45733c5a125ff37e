"""Inspects one feature: what it is active on, what it writes, and its partner in the teacher."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

import numpy as np
import torch

from rsae_triton.activations import ActivationStore, HostModel
from rsae_triton.common.checks import check_integer
from rsae_triton.common.errors import ShapeError
from rsae_triton.features.numbers import Numbers, numbers_of
from rsae_triton.features.source import MOST_TOKENS, Source, open_source
from rsae_triton.report.labels import correlations, partners
from rsae_triton.report.snippets import Snippet, Text
from rsae_triton.sae.base import SparseAutoencoder, check_sae


@dataclass(frozen=True)
class Feature:
    """A feature of an SAE on a text. Print it, or show it in a notebook.

    Attributes:
        index: of the feature. model, hook: where the SAE reads. n_tokens: how many tokens were looked at.
        frequency: fraction of tokens on which it is active. largest: its largest activation there. threshold: the
            pre-activation above which it is active, None where there is none.
        contexts: the text of its largest activations, at most one per context.
        promoted, suppressed: (token, logit), strongest first: what its decoder row adds to the model's output, read
            through the last norm and the unembedding (the logit lens); empty if the SAE does not read a residual
            stream.
        similar: (feature, cosine) of the most similar decoder rows.
        edges, counts, active_counts, gate: histogram of the pre-activations (all tokens, and those on which it is
            active), and the gate's value at the edges; gate is None if it depends on the token's other features.
        teacher: the teacher's feature with the most similar decoder row, if a teacher was given; cosine: of the two
            rows, and correlation of the two activations over the text.
    """

    index: int
    model: str
    hook: str
    n_tokens: int
    frequency: float
    largest: float
    threshold: float | None
    contexts: list[Snippet]
    promoted: list[tuple[str, float]]
    suppressed: list[tuple[str, float]]
    similar: list[tuple[int, float]]
    edges: np.ndarray = field(repr=False)
    counts: np.ndarray = field(repr=False)
    active_counts: np.ndarray = field(repr=False)
    gate: np.ndarray | None = field(repr=False)
    teacher: Feature | None = None
    cosine: float | None = None
    correlation: float | None = None

    def __repr__(self) -> str:
        lines = [self.headline]
        if self.promoted:
            lines.append("promotes    " + " ".join(repr(token) for token, _ in self.promoted))
            lines.append("suppresses  " + " ".join(repr(token) for token, _ in self.suppressed))
        lines.append("similar     " + ", ".join(f"{index} ({cosine:.2f})" for index, cosine in self.similar))
        if self.teacher is not None:
            lines.append(self._partner)
        for one in self.contexts:
            text = "".join(f"[{token.text}]" if token.peak else token.text for token in one.tokens)
            lines.append(f"{one.value:8.2f}  {text}")
        return "\n".join(lines)

    @property
    def headline(self) -> str:
        """One line: the feature, how often it is active, and how strongly."""
        at = "" if self.threshold is None else f", threshold {self.threshold:.3g}"
        return (
            f"Feature {self.index} of {self.model}, {self.hook}: active on {self.frequency:.2%} of {self.n_tokens:,} "
            f"tokens, at most {self.largest:.3g}{at}"
        )

    @property
    def _partner(self) -> str:
        assert self.teacher is not None
        one = self.teacher
        same = "" if self.correlation is None else f", correlation of activations {self.correlation:.2f}"
        return (
            f"teacher     feature {one.index}: cosine of decoder rows {self.cosine:.2f}{same}, active on "
            f"{one.frequency:.2%} of tokens"
        )

    def plot(self) -> Any:
        """A matplotlib figure: the histogram of pre-activations, the gate over it, and the threshold."""
        from rsae_triton.features.plots import feature_figure

        return feature_figure(self)

    def _repr_html_(self) -> str:
        from rsae_triton.features.plots import feature_figure
        from rsae_triton.report.svg import inline_svg

        figure = inline_svg(feature_figure(self), f"f{self.index}", f"Feature {self.index}", self.headline)
        variables = "--ink:currentColor;--grid:#8884;--fill:#8886;--rsae:#2f81f7;--teacher:#8b949e;--control:#d9513c"
        parts = [f'<div style="max-width:60rem;{variables}"><p><b>{escape(self.headline)}</b></p>']
        if self.promoted:
            for name, tokens in (("promotes", self.promoted), ("suppresses", self.suppressed)):
                shown = " ".join(f"<code>{escape(token)}</code>" for token, _ in tokens)
                parts.append(f"<p>{name} {shown}</p>")
        if self.teacher is not None:
            parts.append(f"<p>{escape(self._partner)}</p>")
        parts.append(f'<div style="max-width:26rem">{figure}</div>')
        for one in self.contexts:
            text = "".join(_mark(token) for token in one.tokens)
            parts.append(f'<p style="white-space:pre-wrap;margin:.3em 0">{one.value:.2f}&ensp;{text}</p>')
        return "".join(parts) + "</div>"


def _mark(token: Any) -> str:
    if not token.intensity:
        return escape(token.text)
    weight = "font-weight:700;" if token.peak else ""
    colour = f"rgba(47,129,247,{0.15 + 0.45 * token.intensity:.2f})"
    return f'<span style="{weight}background:{colour};border-radius:2px">{escape(token.text)}</span>'


@torch.no_grad()
def feature(
    sae: SparseAutoencoder,
    source: ActivationStore | HostModel,
    index: int,
    *,
    teacher: SparseAutoencoder | None = None,
    host: HostModel | None = None,
    contexts: int = 8,
    n_tokens: int = MOST_TOKENS,
) -> Feature:
    """Inspects one feature: where it is active, how strongly, what it writes, and which features are similar.

        rt.feature(rsae, splits.test, 303)      # or rt.feature(rsae, host, 303): the demo's held-out text

    Args:
        sae: any SAE of the package. source: a store of activations at the SAE's place, with text; or the host that
            `load_host` returns.
        teacher: the SAE it was made from, to show the partner of the feature beside it.
        host: for a store, the model that gives the text of tokens and the logit lens; the one that the store names when
            None.
        contexts: how many to show. n_tokens: about how many to look at.

    Raises:
        ConfigError: no such feature, a store of another place, or one without text.
    """
    check_sae("sae", sae)
    check_integer("index", index, 0, sae.d_sae - 1)
    check_integer("contexts", contexts, 0)
    text = open_source(sae, source, host, n_tokens)
    found = _feature(sae, text, index, contexts)
    if teacher is None:
        return found[0]
    check_sae("teacher", teacher)
    if teacher.d_in != sae.d_in:
        raise ShapeError(f"the teacher has d_in={teacher.d_in}, the SAE {sae.d_in}; give the teacher of this SAE")
    (partner,), (cosine,) = partners(teacher, sae, np.array([index]))
    theirs = _feature(teacher, text, int(partner), contexts)
    together = float(correlations(found[1].z, theirs[1].z)[0])
    return replace(
        found[0], teacher=theirs[0], cosine=float(cosine), correlation=together if np.isfinite(together) else None
    )


def _feature(sae: SparseAutoencoder, source: Source, index: int, contexts: int) -> tuple[Feature, Numbers]:
    numbers = numbers_of(sae, source, np.array([index]))
    z = numbers.column(0)
    text = Text(source.store, source.tokenizer, source.rows, n=contexts)
    manifest = source.store.manifest
    sides = []
    for side in (numbers.promoted, numbers.suppressed):
        pairs = [] if side is None else zip(side[0][0].tolist(), side[1][0].tolist(), strict=True)
        sides.append([(source.tokenizer.decode([token]), value) for token, value in pairs])
    return (
        Feature(
            index=index,
            model=str(manifest["model"]),
            hook=str(manifest["hook_name"]),
            n_tokens=len(source.rows),
            frequency=float(numbers.frequency[0]),
            largest=float(numbers.largest[0]),
            threshold=None if numbers.threshold is None else float(numbers.threshold[0]),
            contexts=[text.snippet(row, z) for row in text.top(z)],
            promoted=sides[0],
            suppressed=sides[1],
            similar=list(zip(numbers.similar[0][0].tolist(), numbers.similar[1][0].tolist(), strict=True)),
            edges=np.linspace(numbers.low[0], numbers.high[0], numbers.counts.shape[1] + 1),
            counts=numbers.counts[0],
            active_counts=numbers.active[0],
            gate=None if numbers.gate is None else numbers.gate[0],
        ),
        numbers,
    )
