"""Names, colours and line styles of the codes, for plots and tables alike."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

ROLES = ("teacher", "init", "rsae", "control")
"""The codes in every report."""
MORE = {"rounds": "teacher", "rsae-rounds": "rsae", "rectangle": "control", "rectangle-rounds": "control"}
"""Optional codes, each with the role that it is listed after."""
NAMES = {
    "teacher": "teacher",
    "rounds": "teacher + a round",
    "rsae-rounds": "RSAE + a round",
    "init": "RSAE, stage 1",
    "rsae": "RSAE",
    "control": "control",
    "rectangle": "rectangle",
    "rectangle-rounds": "rectangle + a round",
    # These occur in sweeps only.
    "thresholds": "fixed thresholds",
    "scratch": "from scratch",
    "refined": "RSAE, two rounds trained",
    "rectangle-refined": "rectangle, two rounds trained",
    "control-compute": "control, equal compute",
    **{
        f"{base}@{n}{mark}": f"{said} + {n - 1} round{'s' * (n > 2)}, untrained{', weighed' * bool(mark)}"
        for base, said in (("teacher", "teacher"), ("rsae", "RSAE"), ("rectangle", "rectangle"), ("control", "control"))
        for n in range(2, 9)
        for mark in ("", "w")
    },
}

# For a white background; page.html holds the same names for a dark one. All values must differ, because the SVG writer
# finds colours by value.
COLOURS = {
    "ink": "#24292e",
    "grid": "#d5d9de",
    "fill": "#dfe3e8",
    "teacher": "#6b7480",
    "init": "#a87500",
    "rsae": "#0b63ce",
    "control": "#c4361c",
    "rectangle": "#2d8a4e",
    "thresholds": "#8a5ac2",
    "scratch": "#3a3f45",
    "rounds": "#117a7a",
    "rsae-rounds": "#5b3fd0",
    "rectangle-rounds": "#7a9a01",
}
# The same on a dark background, for pictures that are files of their own: the values of page.html. Colours that are not
# listed read on both.
DARK = {
    **{"#ffffff": "#12161b", "#000000": "#e2e6ea", COLOURS["ink"]: "#e2e6ea", COLOURS["grid"]: "#323a43"},
    **{COLOURS["fill"]: "#2a323b", COLOURS["teacher"]: "#a3adb8", COLOURS["init"]: "#dba520"},
    **{COLOURS["rsae"]: "#62a8ff", COLOURS["control"]: "#ff7d63", COLOURS["rectangle"]: "#5fc983"},
    **{COLOURS["thresholds"]: "#c39af5", COLOURS["scratch"]: "#c3c9cf", COLOURS["rounds"]: "#3fc4c4"},
    **{COLOURS["rsae-rounds"]: "#a893ff", COLOURS["rectangle-rounds"]: "#b9d63c", "#0072b2": "#3d9be0"},
}
# So that lines can be told apart without colour.
DASHES: dict[str, Any] = {
    "teacher": (0, (5, 2)),
    "init": (0, (1, 1.5)),
    "rsae": "-",
    "control": (0, (6, 2, 1, 2)),
    "rectangle": (0, (3, 1)),
    "rounds": (0, (4, 1)),
    "rsae-rounds": (0, (8, 2)),
    "rectangle-rounds": (0, (3, 1, 1, 1)),
}


def roles_in(found: Container[str]) -> list[str]:
    """ROLES, each followed by the entries of MORE that are found and belong after it."""
    return [
        one for role in ROLES for one in (role, *(name for name, of in MORE.items() if of == role and name in found))
    ]


def line(role: str, **options: Any) -> dict[str, Any]:
    """Keyword arguments for the line of the code `role`. The second control's is broad and lies below, because the
    RSAE's line runs along it."""
    second = role.startswith("rectangle")
    look = {"linewidth": 5.0, "alpha": 0.4, "zorder": 1.5, "linestyle": "-"} if second else {"linewidth": 1.6}
    return {"color": COLOURS[role], "linestyle": DASHES[role], "label": NAMES[role], **look, **options}
