"""The report in headless Chromium, from file://: no console message, no request, readable at any width, light and dark.

Takes a Chromium (the system's, such as Debian's package, or `playwright install chromium`); skipped without.
"""

import re
import shutil

import pytest
from report_cases import FakeTokenizer

from rsae_triton.report import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright to open the report in a browser")


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_api.sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield found
        found.close()


def luminance(colour):
    channels = [float(one) / 255 for one in re.findall(r"[\d.]+", colour)[:3]]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in channels]
    return sum(weight * one for weight, one in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


# Every piece of text with its colour and the first opaque background behind it (pictures apart).
COLOURS = """() => [...document.querySelectorAll('h1, h2, h3, p, td, th, li, summary, a, figcaption')]
  .filter(e => e.offsetParent !== null && e.textContent.trim() && !e.closest('svg'))
  .map(e => { let b = e; const opaque = c => c !== 'rgba(0, 0, 0, 0)' && c !== 'transparent';
    while (b.parentElement && !opaque(getComputedStyle(b).backgroundColor)) b = b.parentElement;
    const back = getComputedStyle(b).backgroundColor;
    return [e.tagName, getComputedStyle(e).color, opaque(back) ? back : null]; })"""


def test_the_report_in_a_browser(browser, tmp_path, saes, x, metrics, logs, store):
    path = tmp_path / "report.html"
    facts = {"model": "a model", "command": "rsae demo " + "--a-long-option=value " * 12}
    write_report(
        path, title="A run", facts=facts, metrics=metrics, logs=logs, saes=saes, x=x, store=store,
        tokenizer=FakeTokenizer(),
    )  # fmt: skip
    backgrounds = set()
    for width in (380, 1400):
        for scheme in ("light", "dark"):
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page = context.new_page()
            messages, requests = [], []
            page.on("console", lambda message, to=messages: to.append(message.text))
            page.on("pageerror", lambda error, to=messages: to.append(str(error)))
            page.on("request", lambda request, to=requests: to.append(request.url))
            page.goto(path.as_uri())
            assert messages == []
            assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
            wide = page.evaluate("document.scrollingElement.scrollWidth")
            assert wide <= width, f"{wide} px at {width}"
            assert page.evaluate("parseFloat(getComputedStyle(document.body).fontSize)") >= 13
            seen = page.evaluate(COLOURS)
            assert len(seen) > 20
            for tag, colour, back in seen:
                if back is not None:
                    assert contrast(colour, back) >= 4.5, (width, scheme, tag, colour, back)
            backgrounds.add((scheme, page.evaluate("getComputedStyle(document.documentElement).backgroundColor")))
            backgrounds.add((scheme, page.evaluate("getComputedStyle(document.body).backgroundColor")))
            context.close()
    light, dark = ({colour for name, colour in backgrounds if name == one} for one in ("light", "dark"))
    assert light != dark
