"""The page of all features: what it holds, that it is small and quick to open, and the command that writes it."""

import base64
import json
import re
import shutil
import zlib

import numpy as np
import pytest

from rsae_triton.commands.cli import main
from rsae_triton.common.errors import ConfigError
from rsae_triton.features import write_features


def parts(path):
    text = path.read_text()
    found = re.findall(r'<script type="application/octet-stream" id="(\w+)">([^<]*)</script>', text)
    return {name: json.loads(zlib.decompress(base64.b64decode(data))) for name, data in found}


@pytest.fixture(scope="module")
def page(world, tmp_path_factory):
    host, store, teacher, rsae = world
    path = tmp_path_factory.mktemp("page") / "features.html"
    labels = {3: "<b>numbers</b>"}
    return write_features(path, rsae, store, teacher=teacher, host=host, labels=labels)


def test_every_feature_is_there(world, page):
    _, store, _, rsae = world
    found = parts(page)
    summary = found.pop("summary")
    assert summary["index"] == list(range(rsae.d_sae))
    assert summary["name"][3] == "<b>numbers</b>"
    assert "<b>numbers" not in page.read_text()
    cards = [card for block in found.values() for card in block["cards"]]
    assert len(cards) == rsae.d_sae
    assert all(sum(card["counts"]) == len(store) for card in cards)
    frequency = np.array([sum(card["active"]) for card in cards]) / len(store)
    assert summary["frequency"] == pytest.approx(frequency.tolist(), rel=1e-3)
    assert 0 < summary["kept"] <= summary["measured"] <= rsae.d_sae
    busy = int(frequency.argmax())
    block = found[f"b{busy // summary['block']}"]
    one = cards[busy]["contexts"][0]
    assert one["shares"][one["peak"]] == 99
    assert block["strings"][one["tokens"][one["peak"]]].strip().startswith("w")


def test_the_features_page_is_small_and_makes_no_requests(page):
    assert page.stat().st_size < 30e6 * 96 / 2304
    assert "http" not in re.sub("http://www.w3.org/2000/svg|http-equiv", "", page.read_text())


def test_the_features_page_of_a_large_sae_shows_a_random_choice(world, tmp_path):
    host, store, _, rsae = world
    path = write_features(tmp_path / "some.html", rsae, store, host=host, most=10)
    summary = parts(path)["summary"]
    assert len(set(summary["index"])) == 10
    assert "partner" not in summary
    with pytest.raises(ConfigError, match="a feature in labels"):
        write_features(tmp_path / "no.html", rsae, store, host=host, labels={960: "x"})


def test_rsae_features_writes_the_page(world, tmp_path, capsys):
    _, store, teacher, rsae = world
    for name, sae in (("rsae", rsae), ("teacher", teacher)):
        sae.save_pretrained(tmp_path / name)
    (tmp_path / "labels.json").write_text('{"5": "fifth"}')
    words = [
        "features", tmp_path / "rsae", "--activations", store.folder, "--teacher", tmp_path / "teacher",
        "--labels", tmp_path / "labels.json",
    ]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    assert capsys.readouterr().out.split()[-1] == str(tmp_path / "rsae" / "features.html")
    assert parts(tmp_path / "rsae" / "features.html")["summary"]["name"][5] == "fifth"
    (tmp_path / "labels.json").write_text('{"five": "fifth"}')
    assert main([str(word) for word in words]) == 2
    assert "holds no labels" in capsys.readouterr().err


def test_in_a_browser(page):
    """Cards are drawn, search and sort work, nothing overflows, no request and no message, light and dark."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright to open the page in a browser")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        for width, scheme in ((380, "light"), (1400, "dark")):
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            tab = context.new_page()
            said, asked = [], []
            tab.on("console", lambda message, to=said: to.append(message.text))
            tab.on("pageerror", lambda error, to=said: to.append(str(error)))
            tab.on("request", lambda request, to=asked: to.append(request.url))
            tab.goto(page.as_uri())
            tab.wait_for_selector("article .columns svg")
            assert tab.evaluate("document.scrollingElement.scrollWidth") <= width
            first = tab.locator("article h2").first.text_content()
            tab.select_option("#sort", "dense")
            tab.wait_for_selector("article .columns svg")
            assert tab.locator("article h2").first.text_content() != first
            tab.fill("#search", "numbers")
            tab.wait_for_selector("article .columns svg")
            assert tab.locator("article").count() == 1
            assert tab.locator("article h2").text_content() == "Feature 3 · <b>numbers</b>"
            assert tab.evaluate("document.scrollingElement.scrollWidth") <= width
            assert said == []
            assert asked == [page.as_uri()]
            context.close()
        browser.close()
