"""A benchmark's result: one JSON object per device, which is read, written and compared by ratios."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rsae_triton.common.errors import FormatError
from rsae_triton.common.files import make_folder, read_json, write_text

SCHEMA = 1
EAGER = ("eager, Horner", "eager, powers")
FLOOR = "bare products"
SWEEPS = ("d_sae", "n_tokens", "degree", "groups")
SIZES = ("work", "n_tokens", "d_in", "d_sae", "degree", "groups", "form", "dtype", "tf32", "sweep")
ENOUGH_TURNS = 3
"""With fewer turns there is no verdict on a target, and no warning."""
SLACK = 1.25
"""How much worse a ratio may get before the guard warns."""


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Writes a result as JSON."""
    make_folder(path.parent)
    text = json.dumps(_rounded(result), indent=1) + "\n"
    # Puts a list of numbers on one line.
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text)
    write_text(path, text)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    # JSON does not have infinity.
    return (float(f"{value:.6g}") if math.isfinite(value) else None) if isinstance(value, float) else value


def read_result(path: Path) -> dict[str, Any]:
    """Reads a result that `write_result` wrote.

    Raises:
        FormatError: the file is not JSON, or not such a result.
    """
    result = read_json(path)
    wanted = {"schema", "device", "versions", "ceilings", "cases"}
    if not wanted <= result.keys() or result["schema"] != SCHEMA:
        raise FormatError(f"{path} is no benchmark result of schema {SCHEMA}; make one with `make bench`")
    return result


def load_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns {name: result} of the files speed-NAME.json in a folder, GPUs first."""
    found = {path.stem.removeprefix("speed-"): read_result(path) for path in sorted(folder.glob("speed-*.json"))}
    return dict(sorted(found.items(), key=lambda item: item[1]["device"]["kind"] != "cuda"))


def slug(result: dict[str, Any]) -> str:
    """A file name for the result's device."""
    return re.sub(r"[^a-z0-9]+", "-", f"{result['device']['kind']} {result['device']['name']}".lower()).strip("-")


def key(case: dict[str, Any]) -> str:
    """A key that two results of the same case share."""
    return json.dumps([case[name] for name in SIZES])


def timed(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The contenders that were timed."""
    return {name: one for name, one in case.get("contenders", {}).items() if one.get("median_s")}


def eager(case: dict[str, Any]) -> tuple[str, float] | None:
    """The faster of the two eager implementations, and its median."""
    found = [(name, timed(case)[name]["median_s"]) for name in EAGER if name in timed(case)]
    return min(found, key=lambda pair: pair[1]) if found else None


def ours(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The timed contenders of this package."""
    return {name: one for name, one in timed(case).items() if name.startswith("ours")}


def turns(case: dict[str, Any]) -> int:
    """The least number of turns of any contender, without the slower eager implementation, which no verdict uses."""
    base = eager(case)
    slower = [name for name in EAGER if base is not None and name != base[0]]
    return min((one["turns"] for name, one in timed(case).items() if name not in slower), default=0)


def guard(new: dict[str, Any], old: dict[str, Any]) -> tuple[list[str], int]:
    """Finds cases in which ours became slower, relative to eager PyTorch, than SLACK times the committed ratio.

    Absolute times are never compared.

    Returns:
        A line for each such case, and the number of ratios that could be compared.
    """
    known = {key(case): case for case in old["cases"]}
    found, compared = [], 0
    for case in new["cases"]:
        before = known.get(key(case))
        if before is None or min(turns(case), turns(before)) < ENOUGH_TURNS:
            continue
        if (now := eager(case)) is None or (then := eager(before)) is None:
            continue
        for name, one in ours(case).items():
            if name not in timed(before):
                continue
            compared += 1
            ratio, was = one["median_s"] / now[1], timed(before)[name]["median_s"] / then[1]
            if ratio > SLACK * was:
                found.append(f"{title(case)}: {name} takes {ratio:.2f} of eager PyTorch's time, committed is {was:.2f}")
    return found, compared


def title(case: dict[str, Any]) -> str:
    """A one-line description of a case."""
    sets = {0: "per feature", 1: "shared"}.get(case["groups"], f"{case['groups']} groups")
    dtype = case["dtype"] + (" (tf32)" if case["tf32"] else "")
    p, q = case["degree"]
    return f"{case['n_tokens']} x {case['d_in']} x {case['d_sae']}, ({p}, {q}) {sets}, {case['form']}, {dtype}"


def size_of(case: dict[str, Any], sweep: str) -> float:
    """The number that a sweep varies; p + q for a degree, d_sae for groups of 0."""
    if sweep == "degree":
        return float(sum(case["degree"]))
    return float(case["groups"] or case["d_sae"]) if sweep == "groups" else float(case[sweep])


def series(result: dict[str, Any], sweep: str, what: str) -> dict[str, list[tuple[float, float]]]:
    """{contender: [(size, value), ...]} over a sweep; what: "median_s" or "peak_bytes"."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for case in result["cases"]:
        if case["sweep"] == sweep:
            for name, one in timed(case).items():
                if one.get(what):
                    lines.setdefault(name, []).append((size_of(case, sweep), one[what]))
    return {name: sorted(points) for name, points in lines.items()}


def exponents(result: dict[str, Any]) -> Iterator[tuple[str, str, str, float]]:
    """Yields (sweep, contender, "median_s" or "peak_bytes", exponent): the slope of a least-squares line on logarithms.

    Only the larger half of the sizes is used (at least three), because small sizes are dominated by fixed costs.
    """
    for sweep in SWEEPS:
        for what in ("median_s", "peak_bytes"):
            for name, points in series(result, sweep, what).items():
                points = points[-max(3, (len(points) + 1) // 2) :]
                if len(points) >= 3:
                    x, y = np.log(np.array(points)).T
                    yield sweep, name, what, float(np.polyfit(x, y, 1)[0])
