"""Turns a matplotlib figure into SVG, inside HTML or as a file, with colours that follow the light or dark theme."""

from __future__ import annotations

import io
import re
from typing import Any
from xml.etree import ElementTree

from rsae_triton.report.style import COLOURS, DARK

_ID_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_COLOUR = re.compile("|".join(map(re.escape, COLOURS.values())), re.IGNORECASE)
_VARIABLE = {value.lower(): f"var(--{name})" for name, value in COLOURS.items()}


def inline_svg(figure: Any, name: str, title: str, description: str) -> str:
    """Returns the figure as an <svg> element.

    Args:
        figure: a matplotlib `Figure`. name: prefix of all ids, unique in the page.
        title, description: for screen readers.
    """
    import matplotlib as mpl

    buffer = io.BytesIO()
    # fonttype none keeps text as text; a fixed salt gives the same ids, and so the same file, in every run.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = ElementTree.fromstring(buffer.getvalue())
    for parent in svg.iter():
        for child in list(parent):
            # Its style would apply to the whole page, and nobody needs its metadata.
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in svg.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: _rewrite(key, text, name) for key, text in element.attrib.items()}
    for size in ("width", "height", "version"):
        svg.attrib.pop(size, None)
    svg.attrib.update({"role": "img", "aria-labelledby": f"{name}-title {name}-desc"})
    for position, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{name}-{tag}"})
        element.text = text
        svg.insert(position, element)
    return ElementTree.tostring(svg, encoding="unicode", short_empty_elements=False)


def svg_file(figure: Any, name: str, **settings: Any) -> str:
    """Returns the figure as the text of an SVG file that is dark where the reader's theme is.

    The background stays opaque, so that the picture can be read on a page whose theme is not the reader's. Viewers that
    know no style sheets show the light colours.

    Args:
        figure: a matplotlib `Figure`. name: salt of the ids; the same figure and name give the same text.
        settings: matplotlib's rc settings to save with, such as `{"svg.fonttype": "none"}`.
    """
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name, **settings}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    rules = [
        f'[style*="{what}: {light}"] {{ {what}: {dark} !important }}'
        for light, dark in DARK.items()
        for what in ("fill", "stroke")
    ]
    # Glyphs in black have no fill of their own: they take the root's.
    rules.insert(0, f"svg {{ fill: {DARK['#000000']} }}")
    style = f"\n@media (prefers-color-scheme: dark) {{ {' '.join(rules)} }}</style>"
    return buffer.getvalue().replace("</style>", style, 1)


def _rewrite(key: str, text: str, name: str) -> str:
    if key == "id":
        return f"{name}-{text}"
    if key.endswith("href") and text.startswith("#"):
        return f"#{name}-{text[1:]}"
    text = _ID_REFERENCE.sub(rf"url(#{name}-\1)", text)
    # Only in style="...", because a presentation attribute does not accept var().
    return _COLOUR.sub(lambda match: _VARIABLE[match[0].lower()], text) if key == "style" else text
