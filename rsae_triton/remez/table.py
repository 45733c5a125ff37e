"""The table of fitted gates that ships with the package, so that common gates need no solving.

`fit_gate` looks here first. `rsae gates rebuild` makes the table from `ENTRIES` alone; a test refits some entries and
measures all of them again.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from rsae_triton.common.errors import FormatError, RsaeError
from rsae_triton.common.files import make_folder, read_json, write_text
from rsae_triton.remez.gatefit import GateFit
from rsae_triton.remez.problem import parse_degree

PATH = Path(__file__).with_name("table.json")
FORMAT = 1

# (target, degree, theta, margin). The paper's degrees are (3, 2) for ReLU and (9, 8) for jumps.
LADDER = ((3, 2), (5, 4), (7, 6), (9, 8))
ENTRIES: tuple[tuple[str, tuple[int, int], float, float], ...] = (
    *(("relu", degree, 0.0, 0.0) for degree in (*LADDER, (11, 10))),
    *(("ramp", degree, 0.0, 0.0) for degree in LADDER),
    *(("step", degree, 0.0, margin) for margin in (0.1, 0.05, 0.02, 0.01) for degree in LADDER),
    *(
        ("jumprelu", degree, theta, margin)
        for theta in (0.05, 0.1, 0.2, 0.4)
        for margin in (0.05, 0.02)
        for degree in ((5, 4), (9, 8))
        if theta > margin
    ),
)


def read_table(path: str | Path = PATH) -> tuple[GateFit, ...]:
    """Reads the fits of a table file. Raises FormatError if it is missing or not such a table."""
    try:
        plain = read_json(Path(path))
    except (OSError, FormatError) as error:
        raise FormatError(
            f"cannot read the gate table {path}: {error}; rebuild it with `rsae gates rebuild`"
        ) from error
    if plain.get("format") != FORMAT or not isinstance(plain.get("fits"), list):
        raise FormatError(f"{path} is not a gate table of format {FORMAT}; rebuild it with `rsae gates rebuild`")
    try:
        return tuple(GateFit.from_dict(fit) for fit in plain["fits"])
    except RsaeError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise FormatError(
            f"{path} holds something that is not a gate fit ({error}); rebuild it with `rsae gates rebuild`"
        ) from error


@cache
def shipped() -> tuple[GateFit, ...]:
    """The shipped table; the file is read once."""
    return read_table()


def shipped_gate(
    target: str, degree: str | Sequence[int], *, theta: float = 0.0, margin: float = 0.0
) -> GateFit | None:
    """Returns the shipped fit for exactly these arguments of `fit_gate`, or None."""
    key = (target, parse_degree(degree), float(theta), float(margin))
    for fit in shipped():
        if (fit.target, fit.degree, fit.theta, fit.margin) == key:
            return fit
    return None


def write_table(fits: Sequence[GateFit], path: str | Path = PATH) -> None:
    """Writes a table file, one fit per line. Raises OSError if it cannot be written."""
    lines = ",\n".join(json.dumps(fit.to_dict()) for fit in fits)
    path = Path(path)
    make_folder(path.parent)
    write_text(path, f'{{"format": {FORMAT}, "fits": [\n{lines}\n]}}\n')
