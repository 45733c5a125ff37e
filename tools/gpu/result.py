"""Rows as one result that `rsae bench` knows, and as a table of text."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

from rsae_triton.ops.cost import CEILINGS

Row = dict[str, Any]


def result_of(rows: list[Row], tiny: bool, minutes: float, root: Path) -> Row:
    """Schema 1 of `rsae_triton.report.speed`, and beside it every row as it was written."""
    machine = next((row for row in rows if row["part"] == "machine" and row.get("status") == "ok"), {})
    cases: dict[str, Row] = {}
    for row in rows:
        if row["part"] == "speed" and "case" in row:
            case = cases.setdefault(str(row["case"]), {**row["case"], "floor_s": None, "contenders": {}})
            case["floor_s"] = row.get("floor_s") or case["floor_s"]
            case["contenders"][row["contender"]] = {
                name: value
                for name, value in row.items()
                if name not in ("part", "item", "case", "contender", "floor_s")
            }
    known = CEILINGS["H200"]
    return {
        "schema": 1,
        "made_by": "tools/gpu_check.py",
        "device": machine.get("device", {"kind": "unknown", "name": "unknown", "cores": None, "threads": None}),
        "clock": machine.get("clock", "unknown"),
        "load_average_before": machine.get("load_average_before", 0.0),
        "load_average_after": os.getloadavg()[0],
        "versions": machine.get("versions", {}),
        "commit": _commit(root),
        "minutes": round(minutes, 2),
        "tiny": tiny,
        "ceilings": machine.get(
            "ceilings",
            {"name": known.name, "products": known.products, "bandwidth": known.bandwidth, "measured": False},
        ),
        "cases": [case for case in cases.values() if case["floor_s"]],
        "other": [
            {"name": f"{row['item']}: {what}", "value": row[key], "unit": "s"}
            for row in rows
            for key, what in (("loss_backward_s", "loss and backward alone"), ("encode_s", "encoding alone"))
            if row.get(key)
        ],
        "checks": summary(rows),
        "routes": [row["route"] for row in rows if row.get("route")],
        "rows": rows,
    }


def _commit(root: Path) -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root).stdout.strip()
    except OSError:
        found = ""
    return found or "unknown"


def summary(rows: list[Row]) -> Row:
    """How many rows of each part are ok, wrong, failed or were not run."""
    found: Row = {}
    for row in rows:
        word = str(row.get("status", "ok")).split(":")[0].split(" (")[0]
        part = found.setdefault(row["part"], {})
        part[word] = part.get(word, 0) + 1
    return found


def text_table(result: Row) -> str:
    """What a terminal shows at the end."""
    device, on = result["device"], result["ceilings"]
    rates = ", ".join(f"{1e-12 * float(rate):.0f} TFLOP/s at {size} bytes" for size, rate in on["products"].items())
    lines = [
        f"\n{device['name']}, {', '.join(f'{name} {version}' for name, version in result['versions'].items())}",
        f"ceilings: {rates}, {1e-12 * on['bandwidth']:.2f} TB/s",
    ]
    for part, counts in result["checks"].items():
        lines.append(f"{part}: {', '.join(f'{count} {word}' for word, count in counts.items())}")
    for case in result["cases"]:
        sets = "shared" if case["groups"] == 1 else "per feature"
        lines.append(f"\n{case['n_tokens']} x {case['d_in']} x {case['d_sae']}, {tuple(case['degree'])} {sets}")
        lines.append(f"{'':26}{'step':>11}{'loss+back':>11}{'predicted':>11}{'of five':>9}{'memory':>10}")
        five = case["contenders"].get("bare products", {}).get("median_s")
        for name, one in case["contenders"].items():
            if not one.get("median_s"):
                lines.append(f"{name:26}{one.get('status')}")
                continue
            cells = [_ms(one["median_s"]), _ms(one.get("loss_backward_s")), _ms(one.get("predicted_s"))]
            peak = one.get("peak_bytes")
            cells += [f"{one['median_s'] / five:.2f}" if five else "", f"{peak / 1e9:.2f} GB" if peak else ""]
            lines.append(
                f"{name:26}"
                + "".join(f"{cell:>{width}}" for cell, width in zip(cells, (11, 11, 11, 9, 10), strict=True))
            )
    return "\n".join(lines)


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3f} ms"


def write(path: Path, result: Row) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(_rounded(result), indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _rounded(value: Any) -> Any:
    """JSON has no infinity, and nobody needs more than six digits."""
    if isinstance(value, dict):
        return {str(key): _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
