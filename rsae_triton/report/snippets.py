"""The text on which a few features are most active, before (teacher) and after (RSAE)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rsae_triton.activations import ActivationStore, PairedStore
from rsae_triton.report.codes import Codes
from rsae_triton.report.gates import thresholds
from rsae_triton.sae.base import SparseAutoencoder

N_FEATURES = 8
N_ROWS = 4
CONTEXT = 12
_SPACES = re.compile(" {3,}")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Tokenizer(Protocol):
    """The part of a tokenizer that is used here."""

    def decode(self, token_ids: list[int]) -> str: ...


@dataclass(frozen=True)
class Token:
    """A piece of text. intensity: in [0, 1], its code divided by the feature's largest. peak: the token that the
    snippet shows."""

    text: str
    intensity: float
    peak: bool


@dataclass(frozen=True)
class Snippet:
    """A token in its context, with its code `value` and the document it is from."""

    value: float
    source: str
    tokens: list[Token]


@dataclass(frozen=True)
class Side:
    """A feature in one SAE: the fraction of tokens it is active on, its threshold (None: it has none), and its top
    snippets."""

    name: str
    frequency: float
    threshold: float | None
    snippets: list[Snippet]


@dataclass(frozen=True)
class Feature:
    """A feature before and after. change: ||z_after - z_before|| / ||z_before|| over the held-out tokens."""

    index: int
    change: float
    sides: list[Side]


def code_change(before: Codes, after: Codes) -> np.ndarray:
    """||z_after - z_before|| / ||z_before|| of each feature over all tokens, [d_sae]; NaN if it was never active."""
    difference = np.asarray((after.z - before.z).power(2).sum(axis=0)).ravel()
    norm = np.asarray(before.z.power(2).sum(axis=0)).ravel()
    return np.sqrt(np.divide(difference, norm, out=np.full(len(norm), np.nan), where=norm > 0))


def choose_features(before: Codes, after: Codes, n: int = N_FEATURES) -> list[int]:
    """Chooses the features to show: in each band of firing frequency, the one whose code changed most; rare ones first.

    Bands have equal numbers of features. Only features that are active on at least N_ROWS tokens both before and after
    take part.
    """
    frequency = before.firing_frequency()
    enough = N_ROWS / before.z.shape[0]
    alive = np.flatnonzero((frequency >= enough) & (after.firing_frequency() >= enough))
    change = code_change(before, after)
    bands = np.array_split(alive[np.argsort(frequency[alive], kind="stable")], min(n, max(1, len(alive))))
    return [int(band[np.argmax(change[band])]) for band in bands if len(band)]


def feature_snippets(
    saes: Mapping[str, SparseAutoencoder],
    codes: Mapping[str, Codes],
    rows: np.ndarray,
    store: ActivationStore | PairedStore,
    tokenizer: Tokenizer,
) -> list[Feature]:
    """Returns the chosen features with their top snippets in teacher and RSAE.

    Args:
        saes, codes: with "teacher" and "rsae". rows: [n_tokens], the store's row of each row of the codes.
    """
    text = Text(store, tokenizer, rows)
    change = code_change(codes["teacher"], codes["rsae"])
    limits = {role: thresholds(saes[role]) for role in ("teacher", "rsae")}
    features = []
    for index in choose_features(codes["teacher"], codes["rsae"]):
        sides = []
        for role, name in (("teacher", "before (teacher)"), ("rsae", "after (RSAE)")):
            z, limit = codes[role].feature(index), limits[role]
            sides.append(
                Side(
                    name,
                    float((z != 0).mean()),
                    None if limit is None else float(limit[index]),
                    [text.snippet(row, z) for row in text.top(z)],
                )
            )
        features.append(Feature(index, float(change[index]), sides))
    return features


class Text:
    """Finds the text around the rows of a store."""

    def __init__(
        self,
        store: ActivationStore | PairedStore,
        tokenizer: Tokenizer,
        rows: np.ndarray,
        *,
        n: int = N_ROWS,
        around: int = CONTEXT,
    ) -> None:
        self.n, self.around = n, around
        self.tokenizer = tokenizer
        self.contexts, self.positions = store.contexts.numpy()[rows], store.positions.numpy()[rows]
        self.tokens, self.documents = store.sequences.tokens.numpy(), store.sequences.documents.numpy()
        self.counted = store.sequences.counted.numpy()
        self.info = store.document_info
        places = zip(self.contexts.tolist(), self.positions.tolist(), strict=True)
        self.row_at = {place: row for row, place in enumerate(places)}

    def top(self, z: np.ndarray) -> list[int]:
        """The rows of the largest codes, at most one per context, from kept contexts."""
        found: dict[int, int] = {}
        for row in np.argsort(-np.abs(z), kind="stable").tolist():
            if z[row] == 0 or len(found) == self.n:
                break
            context = int(self.contexts[row])
            if context < len(self.tokens):
                found.setdefault(context, row)
        return list(found.values())

    def near(self, row: int) -> tuple[list[int], list[str], list[int | None], str]:
        """Returns the token of `row` and its neighbours in the same document: positions, text, rows (None if not among
        ours), and a description of the place."""
        context, position = int(self.contexts[row]), int(self.positions[row])
        document = self.documents[context, position]
        # Without BOS, which is at position 0 and wherever a position's prediction is not counted.
        near = range(max(1, position - self.around), min(self.tokens.shape[1], position + self.around + 1))
        near_here = [p for p in near if self.documents[context, p] == document and self.counted[context, p - 1]]
        pieces = _pieces(self.tokenizer, self.tokens[context, near_here].tolist())
        pieces[0] = pieces[0].lstrip()
        rows = [self.row_at.get((context, p)) for p in near_here]
        return near_here, pieces, rows, _describe(self.info, int(document))

    def snippet(self, row: int, z: np.ndarray) -> Snippet:
        """The token of `row` and its neighbours, with the intensities of z [n_tokens]."""
        places, pieces, rows, where = self.near(row)
        largest = float(np.abs(z).max())
        tokens = []
        for place, piece, at in zip(places, pieces, rows, strict=True):
            intensity = abs(float(z[at])) / largest if at is not None and largest > 0 else 0.0
            tokens.append(Token(piece, intensity, place == int(self.positions[row])))
        return Snippet(float(z[row]), where, tokens)


def _pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text of each token, from decoding growing prefixes: decoded alone, tokens lose spaces or break characters."""
    pieces, before = [], ""
    for end in range(1, len(ids) + 1):
        whole = tokenizer.decode(ids[:end]).rstrip("\ufffd")
        pieces.append(whole[len(before) :])
        before = whole if len(whole) > len(before) else before
    lines = (piece.replace("\r", "").replace("\n", "⏎ ").replace("\t", " ") for piece in pieces)
    return [_CONTROL.sub("·", _SPACES.sub("  ", line)) for line in lines]


def _describe(info: list[dict[str, Any]], document: int) -> str:
    if not 0 <= document < len(info):
        return ""
    return " · ".join(str(info[document][key]) for key in ("source", "title") if info[document].get(key))
