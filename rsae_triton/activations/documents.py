"""Documents: bounded pieces of labelled text, and how to clean, cut, deduplicate and split them."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from rsae_triton.common.errors import ConfigError

# About 1500 tokens of English: long enough to fill several contexts, and short enough that a source's share of a small
# corpus still holds dozens of documents.
PIECE_CHARS = 6000

_START = re.compile(r"\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG EBOOK.*?\*\*\*", re.IGNORECASE | re.DOTALL)
_OLD_START = re.compile(r"\*END[* ]*THE SMALL PRINT!?.*?\*END\*", re.IGNORECASE)
_END = re.compile(
    r"\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG EBOOK|^End of (?:the |this )?Project Gutenberg",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True)
class Document:
    """A piece of text.

    `source` is the collection ("shakespeare", "kjv", ...), `title` the work. `labels` hold what is known about it
    (author, president, party, year, book; always source). Pieces with the same `group` stay on one side of a split. The
    part of the group before the first "/" is its family; a split takes its share of every family.
    """

    text: str
    source: str
    title: str
    labels: dict[str, str] = field(default_factory=dict)
    group: str = ""

    def __post_init__(self) -> None:
        try:
            self.text.encode()
        except UnicodeEncodeError:  # half a character, as in scraped JSON (\\ud800), which no tokenizer accepts
            whole = self.text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            object.__setattr__(self, "text", whole)
            warnings.warn("a text holds half characters; they are replaced by U+FFFD", stacklevel=3)
        self.labels.setdefault("source", self.source)
        if not self.group:
            object.__setattr__(self, "group", f"{self.source}/{self.title}")


def strip_gutenberg(text: str) -> str:
    """Returns the text between Project Gutenberg's header and licence; the whole text if neither is there."""
    for start in (_START, _OLD_START):
        if match := start.search(text):
            text = text[match.end() :]
            break
    if match := _END.search(text):
        text = text[: match.start()]
    return text.strip()


def cut(document: Document, max_chars: int = PIECE_CHARS) -> list[Document]:
    """Cuts a document into pieces of at most `max_chars` characters: at a blank line, else a line end, else a space."""
    text, pieces = document.text.strip(), []
    while text:
        end = len(text)
        if end > max_chars:
            floor = max_chars // 2
            cuts = (text.rfind(mark, floor, max_chars) for mark in ("\n\n", "\n", " "))
            end = next((at for at in cuts if at > 0), max_chars)
        pieces.append(
            Document(text[:end].strip(), document.source, document.title, dict(document.labels), document.group)
        )
        text = text[end:].lstrip()
    return pieces


def drop_duplicates(documents: Iterable[Document]) -> list[Document]:
    """Returns the documents in order, without empty ones and those whose words (ignoring case and spacing) came
    before."""
    seen, kept = set(), []
    for document in documents:
        words = " ".join(document.text.casefold().split())
        digest = hashlib.sha256(words.encode("utf-8", "surrogatepass")).digest()
        if words and digest not in seen:
            seen.add(digest)
            kept.append(document)
    return kept


def corpus_sha256(documents: Iterable[Document]) -> str:
    """A hash that identifies a corpus by its texts and groups, in order."""
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.group, document.text):
            raw = part.encode("utf-8", "surrogatepass")
            digest.update(len(raw).to_bytes(8, "little"))
            digest.update(raw)
    return digest.hexdigest()


def split(documents: list[Document], heldout: float = 0.1, seed: int = 0) -> tuple[list[Document], list[Document]]:
    """Returns `(train, heldout)`. Groups stay whole, so no work is on both sides; every family gives about its share.

    The split depends on the seed and the group names only, not on the documents' order. A family with a single group
    gives its end instead, and one piece is dropped between the sides (with fewer than 3 pieces it gives nothing).
    Raises ConfigError if a side would be empty.
    """
    if not 0 < heldout < 1:
        raise ConfigError(f"heldout={heldout} is not a share; choose it between 0 and 1, for example 0.1")
    families: dict[str, dict[str, list[Document]]] = defaultdict(lambda: defaultdict(list))
    for document in documents:
        families[document.group.split("/")[0]][document.group].append(document)
    away: set[int] = set()
    dropped: set[int] = set()
    for groups in families.values():
        budget = heldout * sum(len(document.text) for group in groups.values() for document in group)
        if len(groups) == 1:
            (pieces,) = groups.values()
            count = round(heldout * len(pieces)) or 1
            if len(pieces) >= 3:
                away.update(id(piece) for piece in pieces[-count:])
                dropped.add(id(pieces[-count - 1]))
            continue
        order = sorted(groups, key=lambda name: hashlib.sha256(f"{seed}|{name}".encode()).digest())
        sizes = {name: sum(len(document.text) for document in groups[name]) for name in order}
        # A group much larger than the share stays in training; if all groups are, the smallest is held out.
        fitting = [name for name in order if sizes[name] <= 1.5 * budget] or [min(order, key=sizes.__getitem__)]
        for name in fitting[: len(order) - 1]:
            if budget <= 0:
                break
            away.update(id(document) for document in groups[name])
            budget -= sizes[name]
    train = [document for document in documents if id(document) not in away | dropped]
    held = [document for document in documents if id(document) in away]
    if not train or not held:
        raise ConfigError(
            f"{len(documents)} document(s) are too few to hold some out; give more or longer texts "
            f"(a single text needs {3 * PIECE_CHARS} characters)"
        )
    return train, held
