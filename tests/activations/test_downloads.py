from __future__ import annotations

import hashlib
import http.server
import threading
import zipfile

import pytest

from rsae_triton.activations import downloads
from rsae_triton.activations.downloads import Download, cache_dir, fetch
from rsae_triton.errors import SourceError

CONTENT = bytes(range(256)) * 4000


@pytest.fixture
def server():
    """An http server with /whole, /cut (closes early), /wrong; counts what it was asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        asked: list[str] = []  # noqa: RUF012

        def do_GET(self):
            self.asked.append(self.path)
            if self.path == "/missing":
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            body = {"/wrong": CONTENT[::-1], "/cut": CONTENT[: len(CONTENT) // 2]}.get(self.path, CONTENT)
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    httpd.asked = Handler.asked
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


@pytest.mark.parametrize("route", ["wrong", "cut", "missing"])
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


def test_an_unreachable_address_is_one_line(monkeypatch):
    pin(monkeypatch, "http://127.0.0.1:9/x")
    with pytest.raises(SourceError, match="check the connection"):
        fetch("stub")


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
