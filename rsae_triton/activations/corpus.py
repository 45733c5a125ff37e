"""Loads text: the demo's corpus, files and folders, or a dataset on the Hugging Face hub."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rsae_triton.activations.demo_corpus import demo_documents
from rsae_triton.activations.documents import Document, corpus_sha256, cut, drop_duplicates, split, strip_gutenberg
from rsae_triton.common.checks import check_integer, shown
from rsae_triton.common.errors import ConfigError, FormatError, SourceError, first_line
from rsae_triton.common.hub import require_hub
from rsae_triton.common.install import advice

__all__ = ["Document", "check_corpus", "corpus_sha256", "load_corpus", "split"]

_SUFFIXES = {".txt", ".md", ".jsonl"}
_TEXT_FIELDS = ("text", "content", "document", "body")


def load_corpus(spec: str | Path | Sequence[str | Path] = "demo", *, max_documents: int = 100_000) -> list[Document]:
    """Returns documents of at most `documents.PIECE_CHARS` characters, without duplicates, in a reproducible order.

    Args:
        spec: "demo"; one or several files or folders (.txt, .md, .jsonl with a "text" field); or the id of a hub
            dataset ("owner/name", or "owner/name:config:split"), which is streamed.
        max_documents: the most rows to read from a hub dataset.

    Raises:
        SourceError: a source cannot be found or reached.
        FormatError: files are not text, or are empty.
        ConfigError: a bad argument.
    """
    specs = [spec] if isinstance(spec, str | Path) else list(spec) if isinstance(spec, Sequence) else []
    if not specs or not all(isinstance(one, str | Path) and one != "" for one in specs):
        raise ConfigError(f"spec is {shown(spec)}; give demo, files, folders, or a hub dataset")
    check_integer("max_documents", max_documents, 1)
    found: list[Document] = []
    for one in specs:
        if str(one) == "demo":
            found += demo_documents(lambda line: warnings.warn(line, stacklevel=4))
        elif Path(one).exists():
            found += _local(Path(one))
        else:
            found += islice(_hub(str(one)), max_documents)
    # First whole works, to detect a work under two names; then pieces, to detect pages that many files share.
    pieces = (piece for document in drop_duplicates(found) for piece in cut(document))
    documents = drop_duplicates(pieces)
    if not documents:
        raise FormatError(f"no text in {', '.join(map(str, specs)) or 'an empty list'}; give files that hold some")
    return documents


def check_corpus(spec: Sequence[str | Path]) -> None:
    """Raises SourceError if local text does not exist, before anything else is loaded or computed."""
    if not spec or "" in spec:
        raise ConfigError("--text is empty; give demo, files, folders, or a hub dataset")
    for one in map(str, spec):
        if one != "demo" and not Path(one).exists() and _looks_like_file(one):
            raise SourceError(f"no file or folder at {one!r}; check the path")


def _looks_like_file(spec: str) -> bool:
    name = spec.split(":")[0]
    return not name or Path(spec).suffix.lower() in _SUFFIXES or spec.startswith((".", "/", "~")) or name.count("/") > 1


def _local(path: Path) -> Iterator[Document]:
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in _SUFFIXES)
        if not files:
            raise FormatError(f"the folder {path} holds no .txt, .md or .jsonl file; name one that does")
    for file in files:
        if not file.is_file():  # reading a pipe would wait
            raise SourceError(f"{file} is neither a file nor a folder; check the path")
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise FormatError(f"{file} is not UTF-8 text; convert it or leave it out") from error
        except OSError as error:
            raise SourceError(f"{file} cannot be read ({error.strerror}); check its permissions") from error
        # Files outside of a folder form one family with the other such files in the same place.
        source = path.name if path.is_dir() else path.stem
        family = f"folder {path.name}" if path.is_dir() else "files"
        # Names are relative, so that a moved folder is still the same corpus.
        group = f"{family}/{file.relative_to(path) if path.is_dir() else file.name}"
        if file.suffix.lower() == ".jsonl":
            yield from _json_lines(file, text, source, group)
        else:
            yield Document(strip_gutenberg(text), source, file.stem, {}, group)


def _json_lines(file: Path, text: str, source: str, group: str) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield _row(row, source, f"{file.stem} line {number}", f"{group}:{number}")
        except (ValueError, KeyError, AttributeError, RecursionError) as error:
            raise FormatError(
                f'{file} line {number} is not a JSON object with a "text" field; correct or remove it'
            ) from error


def _row(row: dict[str, Any], source: str, title: str, group: str) -> Document:
    """Makes a document from a row of a table; its short scalar columns become labels. Raises KeyError without text."""
    field = next((name for name in _TEXT_FIELDS if isinstance(row.get(name), str)), None)
    if field is None:
        raise KeyError("text")
    labels = {
        key: str(value)
        for key, value in row.items()
        if key not in (field, "source") and isinstance(value, str | int | bool) and len(str(value)) <= 80
    }
    return Document(row[field], str(row.get("source") or source), str(row.get("title") or title), labels, group)


def _hub(spec: str) -> Iterable[Document]:
    name, *rest = spec.split(":")
    config = rest[0] if rest and rest[0] else None
    part = rest[1] if len(rest) > 1 else "train"
    if _looks_like_file(spec):
        raise SourceError(f"no file or folder at {spec!r}; check the path")
    require_hub(f"no file or folder named {spec!r}, and as a hub dataset it")
    try:
        import datasets
    except ImportError as error:
        raise SourceError(f"hub datasets need the package `datasets`; install it with: {advice('host')}") from error
    try:
        rows = datasets.load_dataset(name, config, split=part, streaming=True)
        for number, row in enumerate(rows):
            yield _row(row, name, f"row {number}", f"hub {name}/{number}")
    except KeyError as error:
        raise FormatError(
            f"the dataset {name!r} has no text column ({', '.join(_TEXT_FIELDS)}); use another"
        ) from error
    except Exception as error:  # the library raises a dozen kinds, some from its own dependencies
        reason = first_line(error)
        raise SourceError(
            f"cannot read the hub dataset {name!r} ({reason}); check its name, config and split"
        ) from error
