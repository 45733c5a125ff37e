from __future__ import annotations

import hashlib
import http.server
import shutil
import threading
import zipfile
from types import SimpleNamespace

import pytest

from rsae_triton.activations import downloads
from rsae_triton.activations.downloads import Download, cache_dir, fetch
from rsae_triton.common.errors import SourceError, StorageError

CONTENT = bytes(range(256)) * 4000


@pytest.fixture
def server():
    """An http server with /whole, /cut (closes early), /wrong; counts what it was asked for.

    /ranged sends the range it is asked for, and breaks off after `httpd.breaks_after` bytes of it.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        asked: list[str] = []  # noqa: RUF012

        def do_GET(self):
            self.asked.append(self.path)
            if self.path == "/missing":
                self.send_error(404)
                return
            if self.path == "/ranged":
                self.send_range()
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            body = {"/wrong": CONTENT[::-1], "/cut": CONTENT[: len(CONTENT) // 2]}.get(self.path, CONTENT)
            self.wfile.write(body)

        def send_range(self):
            start = int((self.headers["Range"] or "bytes=0-")[len("bytes=") :].rstrip("-"))
            httpd.starts.append(start)
            if start >= len(CONTENT):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(CONTENT) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
            self.end_headers()
            self.wfile.write(CONTENT[start:][: httpd.breaks_after])

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    httpd.asked = Handler.asked = []
    httpd.starts, httpd.breaks_after = [], len(CONTENT)
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def pin(monkeypatch, url, sha256=None, requirement=None, filename="file.bin"):
    digest = sha256 or hashlib.sha256(CONTENT).hexdigest()
    monkeypatch.setitem(downloads.DOWNLOADS, "stub", Download(filename, url, digest, requirement))


def files_in_cache():
    return sorted(path.name for path in (cache_dir() / "downloads").iterdir() if path.suffix != ".lock")


def test_fetch_downloads_once_and_checks_each_time(server, monkeypatch):
    pin(monkeypatch, f"{server.url}/whole")
    path = fetch("stub")
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(cache_dir())
    assert fetch("stub") == path
    assert server.asked == ["/whole"]
    path.write_bytes(b"damaged later")
    assert fetch("stub").read_bytes() == CONTENT
    assert server.asked == ["/whole", "/whole"]


@pytest.mark.parametrize("route", ["wrong", "missing"])
def test_a_bad_answer_leaves_nothing_and_says_what_to_do(server, monkeypatch, route):
    pin(monkeypatch, f"{server.url}/{route}")
    with pytest.raises(SourceError) as caught:
        fetch("stub")
    message = str(caught.value)
    assert "\n" not in message
    assert "file.bin" in message
    assert f"{server.url}/{route}" in message
    assert str(cache_dir()) in message
    assert files_in_cache() == []


def test_a_download_goes_on_where_it_broke_off(server, monkeypatch):
    pin(monkeypatch, f"{server.url}/ranged")
    server.breaks_after = 400_000
    starts = [0]
    for _ in range(2):
        with pytest.raises(SourceError, match="the next run goes on where it broke off"):
            fetch("stub")
        assert files_in_cache() == ["file.bin.part"]
        part = (cache_dir() / "downloads" / "file.bin.part").read_bytes()
        assert part == CONTENT[: len(part)]
        assert 0 <= starts[-1] + 400_000 - len(part) < downloads._CHUNK
        starts.append(len(part))
    assert fetch("stub").read_bytes() == CONTENT
    assert files_in_cache() == ["file.bin"]
    assert server.starts == starts


def test_a_server_without_ranges_is_asked_for_all_of_it_again(server, monkeypatch):
    pin(monkeypatch, f"{server.url}/cut")
    with pytest.raises(SourceError, match="the next run goes on"):
        fetch("stub")
    assert files_in_cache() == ["file.bin.part"]
    pin(monkeypatch, f"{server.url}/whole")
    assert fetch("stub").read_bytes() == CONTENT
    assert files_in_cache() == ["file.bin"]


@pytest.mark.parametrize(
    "part", [b"of something else", CONTENT[::-1], CONTENT + b"more"], ids=["half", "whole", "longer"]
)
def test_a_partial_download_that_does_not_match_is_fetched_from_the_start(server, monkeypatch, part):
    pin(monkeypatch, f"{server.url}/ranged")
    folder = cache_dir() / "downloads"
    folder.mkdir(parents=True)
    (folder / "file.bin.part").write_bytes(part)
    assert fetch("stub").read_bytes() == CONTENT
    assert files_in_cache() == ["file.bin"]
    assert server.starts == [len(part), 0]


def test_an_unreachable_address_is_one_line(monkeypatch):
    pin(monkeypatch, "http://127.0.0.1:9/x")
    with pytest.raises(SourceError, match="check the connection"):
        fetch("stub")


def test_room_is_looked_at_before_a_download(server, monkeypatch):
    pin(monkeypatch, f"{server.url}/whole")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match=r"file\.bin takes 1,024,000 bytes, and .*downloads has 1,000 free"):
        fetch("stub")
    assert files_in_cache() == []


def test_four_at_once_download_once(server, monkeypatch):
    pin(monkeypatch, f"{server.url}/whole")
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch("stub").read_bytes())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 4
    assert server.asked == ["/whole"]


@pytest.mark.parametrize("right", [True, False], ids=["right hash", "wrong hash"])
def test_pip_is_asked_when_the_address_fails_and_the_hash_still_counts(tmp_path, monkeypatch, right):
    name = "stubpkg-1.0-py3-none-any.whl"
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    with zipfile.ZipFile(mirror / name, "w") as wheel:
        wheel.writestr("stubpkg-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: stubpkg\nVersion: 1.0\n")
        wheel.writestr("stubpkg-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("stubpkg-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256((mirror / name).read_bytes()).hexdigest()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(mirror))
    pin(monkeypatch, "http://127.0.0.1:9/x", digest if right else "0" * 64, "stubpkg==1.0", name)
    if right:
        assert fetch("stub").read_bytes() == (mirror / name).read_bytes()
    else:
        with pytest.raises(SourceError):
            fetch("stub")
        assert files_in_cache() == []


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("RSAE_CACHE", str(tmp_path / "elsewhere"))
    assert cache_dir() == tmp_path / "elsewhere"
    monkeypatch.delenv("RSAE_CACHE")
    assert cache_dir().name == "rsae-triton"


def test_an_unwritable_cache_says_so(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RSAE_CACHE", str(tmp_path / "file"))
    with pytest.raises(SourceError, match="set RSAE_CACHE"):
        fetch("smollm2")
