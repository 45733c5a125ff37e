"""Writes a page of all features of an SAE: one self-contained HTML file that can be opened without a server."""

from __future__ import annotations

import base64
import json
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rsae_triton.activations import ActivationStore, HostModel
from rsae_triton.common.checks import check_integer
from rsae_triton.common.errors import ConfigError, ShapeError
from rsae_triton.common.files import make_folder, write_atomically
from rsae_triton.evaluation.matching import KEPT
from rsae_triton.features.numbers import Numbers, numbers_of
from rsae_triton.features.source import MOST_TOKENS, Source, open_source
from rsae_triton.report.labels import correlations, partners
from rsae_triton.report.snippets import Text
from rsae_triton.sae.base import SparseAutoencoder, check_sae

TEMPLATE = "features.html"
BLOCK = 64
CONTEXTS, AROUND = 6, 12
TEACHER_CONTEXTS = 3


@torch.no_grad()
def write_features(
    path: str | Path,
    sae: SparseAutoencoder,
    source: ActivationStore | HostModel,
    *,
    teacher: SparseAutoencoder | None = None,
    host: HostModel | None = None,
    labels: Mapping[int, str] | None = None,
    most: int = 4096,
    n_tokens: int = MOST_TOKENS,
    title: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Writes a page with a card for every feature, with search and sorting. Cards are drawn when they scroll into view.

    Args:
        path: of the .html file. sae, source, teacher, host, n_tokens: see `feature`.
        labels: names that people gave to features. most: how many features to put on the page; random ones if there are
            more.
        progress: called with the number of features done.

    Returns:
        The path.

    Raises:
        ConfigError, ShapeError: see `feature`.
        StorageError: the file cannot be written.
    """
    check_sae("sae", sae)
    check_integer("most", most, 1)
    if teacher is not None:
        check_sae("teacher", teacher)
    if teacher is not None and teacher.d_in != sae.d_in:
        raise ShapeError(f"the teacher has d_in={teacher.d_in}, the SAE {sae.d_in}; give the teacher of this SAE")
    labels = dict(labels or {})
    for index, label in labels.items():
        check_integer("a feature in labels", index, 0, sae.d_sae - 1)
        if not isinstance(label, str):
            raise ConfigError(f"the label of feature {index} is a {type(label).__name__}; give text")
    text = open_source(sae, source, host, n_tokens)
    chosen = np.arange(sae.d_sae)
    if sae.d_sae > most:
        chosen = np.sort(np.random.default_rng(0).choice(sae.d_sae, most, replace=False))
    page = _Page(sae, teacher, text, chosen, labels)
    blocks = []
    for start in range(0, len(chosen), BLOCK):
        blocks.append(page.block(start, min(start + BLOCK, len(chosen))))
        if progress is not None:
            progress(min(BLOCK, len(chosen) - start))
    manifest = text.store.manifest
    html = _template().render(
        title=title or f"Features of an SAE of {manifest['model']}, {manifest['hook_name']}",
        summary=_packed(page.summary()),
        blocks=blocks,
    )
    path = Path(path)
    make_folder(path.parent)
    # Some tokenizers return lone surrogates, which no UTF-8 file can hold.
    write_atomically(path, lambda temporary: temporary.write_bytes(html.encode("utf-8", errors="replace")))
    return path


class _Page:
    """Collects the content of the page, feature by feature."""

    def __init__(
        self,
        sae: SparseAutoencoder,
        teacher: SparseAutoencoder | None,
        source: Source,
        chosen: np.ndarray,
        labels: Mapping[int, str],
    ) -> None:
        self.sae, self.source, self.chosen, self.labels = sae, source, chosen, labels
        self.own = numbers_of(sae, source, chosen)
        self.text = Text(source.store, source.tokenizer, source.rows, n=CONTEXTS, around=AROUND)
        self.cache: dict[int, tuple[int, list[str], list[int | None], str]] = {}
        self.names = [labels.get(int(index), "") for index in chosen]
        self.words = [""] * len(chosen)
        self.teacher: Numbers | None = None
        if teacher is not None:
            self.partner, self.cosine = partners(teacher, sae, chosen)
            self.teacher = numbers_of(teacher, source, self.partner, lens=False)
            self.correlation = correlations(self.own.z, self.teacher.z)

    def summary(self) -> dict[str, Any]:
        """What search and sorting need about all features. To be called after the blocks, which collect the names."""
        own, manifest = self.own, self.source.store.manifest
        found: dict[str, Any] = {
            "model": manifest["model"],
            "hook": manifest["hook_name"],
            "n_tokens": len(self.source.rows),
            "d_sae": self.sae.d_sae,
            "index": own.indices.tolist(),
            "frequency": _rounded(own.frequency),
            "largest": _rounded(own.largest),
            "threshold": None if own.threshold is None else _rounded(own.threshold),
            "name": self.names,
            "words": self.words,
            "block": BLOCK,
        }
        if self.teacher is not None:
            measured = np.isfinite(self.correlation)
            kept = (self.cosine > KEPT) & (np.nan_to_num(self.correlation, nan=-1) > KEPT)
            found |= {
                "partner": self.partner.tolist(),
                "cosine": _rounded(self.cosine),
                "correlation": _rounded(self.correlation),
                "partner_frequency": _rounded(self.teacher.frequency),
                "kept": int(kept.sum()),
                "measured": int(measured.sum()),
            }
        return found

    def block(self, start: int, end: int) -> str:
        """The cards of the features from place `start` up to `end`."""
        strings: dict[str, int] = {}
        cards = [self._card(place, strings) for place in range(start, end)]
        return _packed({"strings": list(strings), "cards": cards})

    def _card(self, place: int, strings: dict[str, int]) -> dict[str, Any]:
        own = self.own
        card: dict[str, Any] = {
            "range": _rounded(np.array([own.low[place], own.high[place]])),
            "counts": own.counts[place].astype(int).tolist(),
            "active": own.active[place].astype(int).tolist(),
            "gate": None if own.gate is None else _rounded(own.gate[place]),
            "similar": [own.similar[0][place].tolist(), _rounded(own.similar[1][place])],
            "contexts": self._contexts(own, place, strings, CONTEXTS),
        }
        peaks = Counter(
            word for one in card["contexts"] if (word := list(strings)[one["tokens"][one["peak"]]].strip(" ⏎"))
        )
        tokens: list[str] = []
        for name, side in (("promoted", own.promoted), ("suppressed", own.suppressed)):
            if side is not None:
                decoded = [self.source.tokenizer.decode([one]) for one in side[0][place].tolist()]
                card[name] = [decoded, _rounded(side[1][place])]
                tokens += decoded if name == "promoted" else []
        if not self.names[place]:
            self.names[place] = " · ".join(word for word, _ in peaks.most_common(1 if _clear(peaks) else 3))
        self.words[place] = " ".join(dict.fromkeys([*peaks, *(one.strip() for one in tokens)]))
        if self.teacher is not None:
            card["teacher"] = self._contexts(self.teacher, place, strings, TEACHER_CONTEXTS)
        return card

    def _contexts(self, numbers: Numbers, place: int, strings: dict[str, int], most: int) -> list[dict[str, Any]]:
        z = numbers.column(place)
        largest, found = float(np.abs(z).max(initial=0.0)), []
        for row in self.text.top(z)[:most]:
            if row not in self.cache:
                places, pieces, rows, where = self.text.near(row)
                self.cache[row] = (places.index(int(self.text.positions[row])), pieces, rows, where)
            peak, pieces, rows, where = self.cache[row]
            found.append(
                {
                    "value": float(f"{z[row]:.3g}"),
                    "where": strings.setdefault(where, len(strings)),
                    "peak": peak,
                    "tokens": [strings.setdefault(piece, len(strings)) for piece in pieces],
                    "shares": [0 if at is None else round(99 * abs(float(z[at])) / largest) for at in rows],
                }
            )
        return found


def _clear(peaks: Counter[str]) -> bool:
    return bool(peaks) and 2 * peaks.most_common(1)[0][1] > peaks.total()


def _rounded(values: np.ndarray) -> list[float | None]:
    """Rounds to four digits; NaN, which JSON does not have, becomes None."""
    return [float(f"{one:.4g}") if np.isfinite(one) else None for one in values.tolist()]


def _packed(content: Any) -> str:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode("utf-8", errors="replace"), 9)).decode()


def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("rsae_triton.features", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(TEMPLATE)
