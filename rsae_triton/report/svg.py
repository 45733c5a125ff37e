"""Turns a matplotlib figure into SVG inside HTML, with system fonts and colours that follow the page's theme."""

from __future__ import annotations

import io
import re
from typing import Any
from xml.etree import ElementTree

from rsae_triton.report.style import COLOURS

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


def _rewrite(key: str, text: str, name: str) -> str:
    if key == "id":
        return f"{name}-{text}"
    if key.endswith("href") and text.startswith("#"):
        return f"#{name}-{text[1:]}"
    text = _ID_REFERENCE.sub(rf"url(#{name}-\1)", text)
    # Only in style="...", because a presentation attribute does not accept var().
    return _COLOUR.sub(lambda match: _VARIABLE[match[0].lower()], text) if key == "style" else text
