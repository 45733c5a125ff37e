"""The page as a file: well-formed, self-contained, safe against what it shows, whole or not there."""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from report_cases import FakeTokenizer, make_log, make_saes

from rsae_triton.common.errors import ConfigError, ShapeError
from rsae_triton.evaluation import compare
from rsae_triton.report import write_report
from rsae_triton.teachers import ReluSAE

VOID = {"meta", "link", "br", "img", "hr", "input", "wbr"}


class Page(HTMLParser):
    """Checks that tags close in order; collects ids, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.attributes, self.text, self.tags = [], [], [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data


def write(path, saes, x, metrics, logs, **options):
    facts = options.pop("facts", {"model": "a model", "hook": "blocks.1.hook_resid_pre"})
    page = write_report(
        path, title=options.pop("title", "A run"), facts=facts, metrics=metrics, logs=logs, saes=saes, x=x, **options
    )
    assert page == path
    return path.read_text(encoding="utf-8")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new folder" / "report.html"


@pytest.fixture
def no_plots(monkeypatch):
    """For what is not about figures: they take nearly all of a page's time."""
    monkeypatch.setattr("rsae_triton.report.page._plots", lambda *_: [])


def test_page_is_well_formed_and_asks_for_nothing(path, saes, x, metrics, logs, store):
    html = write(path, saes, x, metrics, logs, store=store, tokenizer=FakeTokenizer())
    page = Page(html)
    assert "http" not in html.replace("http-equiv", "")
    assert "script" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    for key, value in page.attributes:
        if key in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith("#")
            assert value[1:] in page.ids
        for target in re.findall(r"url\(([^)]*)\)", value or ""):
            assert target.startswith("#")
            assert target[1:] in page.ids
    assert "url(" not in html[html.index("<style>") : html.index("</style>")]
    assert "@import" not in html
    assert page.tags.count("svg") == 6
    assert page.tags.count("title") == 7  # one of the page, one a figure
    assert len(html) < 3_000_000


def test_every_colour_of_a_figure_follows_the_theme(path, saes, x, metrics, logs):
    html = write(path, saes, x, metrics, logs)
    used = set(re.findall(r"var\(--(\w+)\)", html[html.index("<svg") :]))
    root, dark = html[: html.index("@media")], html[html.index("@media") : html.index("</style>")]
    assert {"ink", "rsae", "control"} <= used
    for name in used:
        assert f"--{name}:" in root
        assert f"--{name}:" in dark
    colours = set(re.findall(r"#[0-9a-fA-F]{6}\b", html[html.index("<svg") :]))
    assert colours == set()


def test_rounds_that_nothing_was_trained_for_are_drawn_and_listed(path, saes, x, logs):
    saes = {**saes, "rounds": saes["teacher"].with_rounds(2, x), "rsae-rounds": saes["rsae"].with_rounds(2, x)}
    saes |= {"rectangle": saes["control"], "rectangle-rounds": saes["rounds"]}
    html = write(path, saes, x, compare(saes, x), logs)
    assert html.count("teacher + a round") >= 3  # in both tables and in the picture
    assert "var(--rounds)" in html
    assert "var(--rsae-rounds)" in html
    assert "var(--rectangle)" in html
    assert "var(--rectangle-rounds)" in html


def test_page_shows_the_numbers_and_how_to_load(path, saes, x, metrics, logs, no_plots):
    text = Page(write(path, saes, x, metrics, logs, facts={"seed": "17", "hook": "blocks.9.hook_resid_pre"})).text
    for part in (metrics, metrics["matched_l0"]):
        for role in ("teacher", "init", "rsae", "control"):
            assert format(part[role]["mse"], "#.4g") in text
            assert format(part[role]["l0"], ".2f") in text
    assert "–" in text  # no delta_ce
    assert "17" in text
    assert "from_pretrained" in text
    assert "activations at blocks.9.hook_resid_pre" in text


HOSTILE = """<script>alert(1)</script>"><img src=x onerror='alert(1)'>&lt;b&gt;</p>"""


def test_hostile_text_is_shown_not_obeyed(path, saes, x, metrics, logs, store, no_plots):
    plain = Page(write(path, saes, x, metrics, logs, store=store, tokenizer=FakeTokenizer()))
    facts = {"model": HOSTILE, "hook": HOSTILE, HOSTILE: "x"}
    tokenizer = FakeTokenizer(HOSTILE)
    page = Page(write(path, saes, x, metrics, logs, store=store, tokenizer=tokenizer, facts=facts, title=HOSTILE))
    assert set(page.tags) == set(plain.tags)
    assert page.text.count(HOSTILE) > 20
    assert "<b>source</b>" in page.text


def test_control_characters_and_lone_surrogates_do_no_harm(path, saes, x, metrics, logs, store, no_plots):
    html = write(path, saes, x, metrics, logs, store=store, tokenizer=FakeTokenizer("\x00\x1b\ud800\n\r"))
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", html)
    assert "⏎" in Page(html).text


@pytest.mark.parametrize(
    ("kind", "form"), [("relu", "gated"), ("relu", "direct"), ("jumprelu", "gated"), ("topk", "gated")]
)
def test_every_kind_of_teacher_and_gate(path, x, logs, store, kind, form):
    saes = make_saes(kind, form)
    logs["teacher"] = make_log(3)
    html = write(path, saes, x, compare(saes, x), logs, store=store, tokenizer=FakeTokenizer())
    assert Page(html).tags.count("svg") == 7
    assert "Training of the teacher" in html


def test_without_logs_scores_or_live_features(path, saes, x, store):
    with torch.no_grad():
        saes["rsae"].gate.threshold.fill_(1e6)
    html = write(path, saes, x, {}, {}, store=store, tokenizer=FakeTokenizer())
    page = Page(html)
    assert page.tags.count("svg") == 5
    assert "No feature is active" in page.text
    assert "cannot be compared" in page.text


def test_same_input_same_bytes(path, saes, x, metrics, logs, store):
    first = write(path, saes, x, metrics, logs, store=store, tokenizer=FakeTokenizer())
    assert write(path, saes, x, metrics, logs, store=store, tokenizer=FakeTokenizer()) == first


def test_a_failed_write_leaves_the_old_page(path, saes, x, metrics, logs, monkeypatch, no_plots):
    path.parent.mkdir()
    path.write_text("old")

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write(path, saes, x, metrics, logs)
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == [path.name]


def test_a_report_of_missing_or_mismatched_saes_is_refused(path, saes, x, metrics, logs, store):
    with pytest.raises(ConfigError, match="lacks control"):
        write(path, {role: sae for role, sae in saes.items() if role != "control"}, x, metrics, logs)
    with pytest.raises(ConfigError, match="give a FusedRationalSAE"):
        write(path, {**saes, "rsae": saes["teacher"]}, x, metrics, logs)
    with pytest.raises(ShapeError, match="differ in d_sae"):
        write(path, {**saes, "control": ReluSAE(16, 8)}, x, metrics, logs)
    with pytest.raises(ShapeError, match="d_in=16"):
        write(path, saes, x[:, :5], metrics, logs)
    with pytest.raises(ShapeError, match="the store"):
        write(path, saes, x.repeat(2, 1), metrics, logs, store=store, tokenizer=FakeTokenizer())
    assert not Path(path).exists()


def test_svg_files_follow_the_reader_s_theme():
    """The same dark colours as the page's; every committed picture has them, on an opaque background."""
    from rsae_triton.report import style

    page = (Path(style.__file__).parent / "page.html").read_text()
    dark = page[page.index("@media") : page.index("</style>")]
    for name, light in style.COLOURS.items():
        assert light in style.DARK, name
        if f"--{name}:" in dark:
            assert f"--{name}: {style.DARK[light]};" in dark
    pictures = list((Path(__file__).parents[2] / "docs").glob("*.svg"))
    assert pictures
    for picture in pictures:
        text = picture.read_text()
        rules = text[text.index("@media (prefers-color-scheme: dark)") : text.index("</style>")]
        assert f'[style*="fill: #ffffff"] {{ fill: {style.DARK["#ffffff"]} !important }}' in rules, picture
        assert 'style="fill: #ffffff"' in text, picture
