#!/usr/bin/env python3
"""Ten minutes on a GPU: are the kernels right there, and how fast are they? `python3 tools/gpu_check.py --out FOLDER`

Runs from a bare checkout: torch, triton, numpy and safetensors are all it needs. Every part has a budget of its own and
runs in processes of its own, so that one that hangs or dies takes nothing with it; the whole ends within ten minutes.
FOLDER/gpu_check.json is written after every row, and a run that is started again with the same folder goes on where it
was. `rsae bench --new FOLDER/gpu_check.json --keep --render` takes it over. --tiny runs the same without a GPU, in
Triton's interpreter, at sizes that prove the program and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu.bare import ROOT, use_checkout

use_checkout()

Row = dict[str, Any]
BUDGETS = {"machine": 30, "compile": 60, "correct": 140, "sanitize": 60, "speed": 240, "routes": 50}
"""Seconds of each part, in their order: 9 minutes and 40 seconds in all."""
PROCESSES = {"compile": 16, "correct": 16}
"""How many processes share a part's items; one where nothing is said."""
SANITIZER = "/usr/local/cuda/bin/compute-sanitizer"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), help="folder for the rows and the result")
    parser.add_argument("--tiny", action="store_true", help="no GPU: the interpreter, at the smallest sizes")
    parser.add_argument("--only", action="append", choices=BUDGETS, help="these parts alone")
    parser.add_argument("--minutes", type=float, default=10.0, help="the whole ends by then (default: 10)")
    parser.add_argument("--part", choices=BUDGETS, help=argparse.SUPPRESS)
    parser.add_argument("--share", default="0/1", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=float("inf"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out is None:
        parser.error("--out FOLDER is needed (or the environment variable OUT)")
    options.out = Path(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.tiny:
        os.environ["TRITON_INTERPRET"] = "1"
    if options.part:
        return child(options)
    return parent(options)


def parent(options: argparse.Namespace) -> int:
    """Starts the parts one after the other, collects their rows, and ends them when their time is up."""
    began = time.time()
    end = began + 60 * options.minutes - 15
    for part, budget in BUDGETS.items():
        if part in (options.only or BUDGETS):
            until = min(time.time() + budget, end)
            print(f"{time.time() - began:4.0f} s: {part}, until {until - began:.0f} s", flush=True)
            run_part(part, options, until, began)
    result = collect(options, began)
    tidy(options)
    print(table(result))
    bad = [row for row in result["rows"] if str(row.get("status", "ok")).startswith(("wrong", "failed", "crashed"))]
    for row in bad:
        print(f"{row['part']} {row['item']}: {row['status']}")
    return 1 if bad else 0


def run_part(part: str, options: argparse.Namespace, until: float, began: float) -> None:
    if until <= time.time():
        return
    count = 1 if options.tiny else PROCESSES.get(part, 1)
    command = [sys.executable, *(["-S"] if sys.flags.no_site else []), __file__, "--out", str(options.out)]
    command += ["--part", part, "--until", str(until), *(["--tiny"] if options.tiny else [])]
    if part == "sanitize":
        sanitize(command, options, until)
        collect(options, began)
        return
    started = [_start([*command, "--share", f"{k}/{count}"], options.out / f"{part}-{k}.log") for k in range(count)]
    while any(one.poll() is None for one in started) and time.time() < until + 5:
        time.sleep(0.2)
        collect(options, began)
    for k, one in enumerate(started):
        if one.poll() is None:
            os.killpg(one.pid, signal.SIGKILL)
            one.wait()
        elif one.returncode:
            log = (options.out / f"{part}-{k}.log").read_text().strip().splitlines()
            last = log[-1][:200] if log else ""
            note(options, part, f"process {k}", {"status": f"crashed ({one.returncode}): {last}"})
    collect(options, began)


def _start(command: list[str], log: Path, **more: Any) -> subprocess.Popen[bytes]:
    with open(log, "ab") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, **more)


def sanitize(command: list[str], options: argparse.Namespace, until: float) -> None:
    """compute-sanitizer on the smallest correctness items: memory and races."""
    tool = shutil.which("compute-sanitizer") or (SANITIZER if Path(SANITIZER).exists() else None)
    for name in ("memcheck", "racecheck"):
        if name in done(options, "sanitize"):
            continue
        if options.tiny or tool is None:
            note(options, "sanitize", name, {"status": "not run: no GPU" if options.tiny else "not run: not installed"})
            continue
        log = options.out / f"sanitize-{name}.log"
        log.write_text("")
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        one = _start([tool, "--tool", name, "--error-exitcode", "9", *command, "--share", "0/1"], log, env=environment)
        stop = time.time() + max(5.0, (until - time.time()) / (2 if name == "memcheck" else 1))
        while one.poll() is None and time.time() < stop:
            time.sleep(0.2)
        if one.poll() is None:
            os.killpg(one.pid, signal.SIGKILL)
            one.wait()
        found = [line for line in log.read_text(errors="replace").splitlines() if "ERROR SUMMARY" in line]
        clean = one.returncode == 0 and bool(found)
        status = "ok" if clean else f"wrong: {found[0]}" if one.returncode == 9 else f"not finished ({one.returncode})"
        note(options, "sanitize", name, {"status": status, "summary": found[-1] if found else ""})


def child(options: argparse.Namespace) -> int:
    """One process's share of a part: item by item, a line of JSON after each."""
    import torch

    from rsae_triton.ops.runtime import matmul_precision

    device = torch.device("cpu" if options.tiny else "cuda")
    if options.tiny:
        torch.set_num_threads(1)
    share, count = map(int, options.share.split("/"))
    known = set() if options.part == "sanitize" else done(options, options.part)  # each tool looks at all of them
    with matmul_precision("high"):
        for place, (name, run) in enumerate(part_items(options.part, device, options)):
            if place % count != share or name in known:
                continue
            if time.time() > options.until - 1:
                note(options, options.part, name, {"status": "not run: the part's time was used up"}, share)
                continue
            began = time.time()
            try:
                row = run()
            except Exception as error:
                said = (str(error).strip().splitlines() or [""])[0][:200]
                kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else "failed"
                row = {"status": f"{kind}: {type(error).__name__}: {said}"}
            note(options, options.part, name, row | {"seconds": round(time.time() - began, 2)}, share)
    return 0


def part_items(part: str, device: Any, options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Row]]]:
    """The items of a part: a name, and what makes its row."""
    from gpu import correct, machine, speed

    if part == "machine":
        yield "machine", lambda: machine.described(device, options.tiny)
    elif part == "compile":
        yield from machine.compiled(device, options.tiny)
    elif part == "correct":
        yield from correct.items(device, options.tiny)
    elif part == "sanitize":
        yield from (one for one in correct.smallest(device))
    elif part == "speed":
        yield from speed.items(device, options.tiny, machine.ceilings_of(rows(options)))
    else:
        yield from machine.routes(device, options.tiny)


def note(options: argparse.Namespace, part: str, item: str, row: Row, share: int | str = "parent") -> None:
    with open(options.out / f"rows-{part}-{share}.jsonl", "a", encoding="utf-8") as out:
        out.write(json.dumps({"part": part, "item": item, **row}) + "\n")


def rows(options: argparse.Namespace) -> list[Row]:
    """What all processes wrote, the last row of each item, parts in their order."""
    found: dict[tuple[str, str], Row] = {}
    for path in sorted(options.out.glob("rows-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # a line that a kill cut short
            found[row["part"], row["item"]] = row
    order = list(BUDGETS)
    return sorted(found.values(), key=lambda row: order.index(row["part"]))


def done(options: argparse.Namespace, part: str) -> set[str]:
    return {row["item"] for row in rows(options) if row["part"] == part and row.get("status", "ok") == "ok"}


def collect(options: argparse.Namespace, began: float) -> Row:
    """Writes the result as it is now."""
    from gpu.result import result_of, write

    found = rows(options)
    path = options.out / "gpu_check.json"
    result = result_of(found, options.tiny, (time.time() - began) / 60, ROOT)
    if not path.exists() or len(found) != getattr(collect, "seen", -1):
        write(path, result)
    collect.seen = len(found)  # type: ignore[attr-defined]
    return result


def tidy(options: argparse.Namespace) -> None:
    """All rows in one file and all logs in another: what is left is three files."""
    found = rows(options)
    parts, logs = sorted(options.out.glob("rows-*.jsonl")), sorted(options.out.glob("*.log"))
    whole = options.out / "rows.tmp"
    whole.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    with open(options.out / "log.txt", "a", encoding="utf-8") as out:
        for log in logs:
            out.write(f"== {log.name}\n{log.read_text(encoding='utf-8', errors='replace')}")
    whole.replace(options.out / "rows-all.jsonl")
    for part in (*parts, *logs):
        if part.name != "rows-all.jsonl":
            part.unlink()


def table(result: Row) -> str:
    from gpu.result import text_table

    return text_table(result)


if __name__ == "__main__":
    sys.exit(main())
