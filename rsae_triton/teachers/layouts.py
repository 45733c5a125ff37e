"""What this package does with each layout in SAELens' registry: read it as an SAE or a transcoder, or refuse it.

SAELens names a release's layout after the function that converts it. `LAYOUTS` maps each name to a reader or to the
reason why there is none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from rsae_triton.teachers.registry import Entry


@dataclass(frozen=True)
class Layout:
    """How one layout is treated.

    format: the name of the reader (`FORMATS`), or None if the layout is refused. kind: "sae" or "transcoder". why: the
    reason for refusing it.
    """

    format: str | None
    kind: str = "sae"
    why: str = ""


_CLT = Layout(None, "transcoder", "cross-layer transcoder: its features write to many layers")
LAYOUTS = {
    "sae_lens": Layout("saelens"),
    "gemma_2": Layout("gemma_scope"),
    "gemma_3": Layout("gemma_scope"),
    "gemma_2_transcoder": Layout("gemma_scope", "transcoder"),
    "mwhanna_transcoder": Layout("circuit_tracer", "transcoder"),
    "mntss_clt_layer_transcoder": _CLT,
    "dictionary_learning_1": Layout("dictionary_learning"),
    "qwen_scope": Layout("qwen_scope"),
    "llama_scope": Layout("llama_scope"),
    "llama_scope_r1_distill": Layout("llama_scope"),
    "goodfire": Layout("goodfire"),
    "sparsify": Layout("sparsify"),
    "connor_rob_hook_z": Layout("plain_pt"),
    "deepseek_r1": Layout("plain_pt"),
    "temporal": Layout(None, "sae", "temporal SAE: a token's code depends on the tokens before"),
}


def layout(entry: Entry) -> Layout:
    """Returns the reader for a registry entry, or the reason why there is none."""
    if entry.layout == "gemma_3" and "clt" in entry.path:
        return _CLT
    if entry.layout == "gemma_3" and "transcoder" in entry.path:
        return Layout("gemma_scope", "transcoder")
    return LAYOUTS.get(entry.layout, Layout(None, "sae", f"SAELens' layout {entry.layout!r} is not known here"))


@dataclass(frozen=True)
class Row:
    """A count over one layout: SAELens' name for it, our format, how many entries and releases have it, and how many
    are read."""

    layout: str
    format: str
    kind: str
    entries: int
    read: int
    releases: int


def rows(entries: Iterable[Entry]) -> list[Row]:
    """Counts the entries of each layout and how many of them are read; the largest layout first."""
    counts: Counter[tuple[str, Layout]] = Counter()
    releases: dict[tuple[str, Layout], set[str]] = {}
    for one in entries:
        key = (one.layout, layout(one))
        counts[key] += 1
        releases.setdefault(key, set()).add(one.release)
    return [
        Row(name, to.format or f"refused: {to.why}", to.kind, count, count if to.format else 0, len(releases[name, to]))
        for (name, to), count in counts.most_common()
    ]
