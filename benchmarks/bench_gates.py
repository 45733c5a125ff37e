"""Gate fitting: seconds, failures and how far from the optimum, beside AAA, relaxed Remez and least squares.

    python benchmarks/bench_gates.py --out benchmarks/results/gates-MACHINE.json

Two draws, both of tests/remez/random_gates.py. The first, `n` gates of any type up to (9, 8), is fitted by "minimax"
only. The second, `n_beside` gates of types (3, 2) to (9, 8), is given to every method; AAA gets (p, p), one power of
the denominator more than the others. Under four minutes on one core; no GPU is used.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy: what is timed is one core

import json
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import tyro
from scipy.interpolate import AAA
from scipy.linalg import eigvals

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "remez"))
from random_gates import Draw, draws, value

from rsae_triton.common.errors import ConvergenceError
from rsae_triton.common.files import make_folder, write_text
from rsae_triton.remez import fit_gate

TYPES = ((3, 2), (5, 4), (7, 6), (9, 8))


def domain(theta: float, margin: float, n: int) -> np.ndarray:
    t = np.concatenate([np.linspace(-1, 1, n), [theta - margin, theta + margin]])
    return np.unique(t[np.abs(t - theta) >= margin * (1 - 1e-12)])


def aaa(t: np.ndarray, f: np.ndarray, n: int, *, clean_up: bool) -> tuple[Callable, np.ndarray]:
    """(r of type (n, n), its poles) by scipy's AAA."""
    r = AAA(t, f, max_terms=n + 1, rtol=0.0, clean_up=clean_up)
    return r, r.poles()


def aaa_lawson(t: np.ndarray, f: np.ndarray, n: int, steps: int = 40) -> tuple[Callable, np.ndarray]:
    """(r of type (n, n), its poles) by AAA and Lawson's reweighting (Nakatsukasa & Trefethen 2020); scipy has none.

    Of all steps the one with the least error is kept.
    """
    z = AAA(t, f, max_terms=n + 1, rtol=0.0, clean_up=False).support_points
    keep = ~np.isin(t, z)
    t, f = t[keep], f[keep]
    cauchy = 1 / (t[:, None] - z)
    columns, weight = np.concatenate([cauchy, -f[:, None] * cauchy], axis=1), np.ones_like(t)
    best, least = None, np.inf
    for _ in range(steps):
        u = np.linalg.svd(np.sqrt(weight)[:, None] * columns, full_matrices=False)[2][-1]
        best = u if best is None else best
        error = np.abs(f - (cauchy @ u[: len(z)]) / (cauchy @ u[len(z) :]))
        if not np.all(np.isfinite(error)) or np.max(error) == 0:
            break
        if np.max(error) < least:
            best, least = u, float(np.max(error))
        weight = weight * error
        weight /= np.max(weight)
    alpha, beta = best[: len(z)], best[len(z) :]

    def r(x: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            c = 1 / (x[:, None] - z)
            y = (c @ alpha) / (c @ beta)
        for zj, yj in zip(z, alpha / beta, strict=True):
            y[x == zj] = yj
        return y

    arrow = np.diag(np.append(0.0, z))
    arrow[0, 1:], arrow[1:, 0] = beta, 1.0
    poles = eigvals(arrow, np.diag(np.append(0.0, np.ones(len(z)))))
    return r, poles[np.isfinite(poles)]


def on(target: Any, theta: float, margin: float, r: Callable, poles: np.ndarray) -> tuple[float, int]:
    """(largest error on 40 001 points, poles in [-1, 1]) of a barycentric r; the gap counts for poles."""
    t = domain(theta, margin, 40_001)
    real = (np.abs(poles.imag) < 1e-8) & (np.abs(poles.real) <= 1)
    with np.errstate(all="ignore"):
        error = np.abs(value(target, theta, t) - r(t))
    return float(np.max(np.where(np.isfinite(error), error, np.inf))), int(np.sum(real))


def acceptance(n: int, seed: int) -> dict[str, Any]:
    """Every draw fitted by "minimax": failures, seconds, certificates."""
    cpu, wall, ratios, single, failures = [], [], [], [], []
    for target, degree, theta, margin in draws(n, seed):
        started, began = time.process_time(), time.perf_counter()
        try:
            fit = fit_gate(target, degree, theta=theta, margin=margin, table=False)
        except ConvergenceError as error:
            failures.append(str(error))
            continue
        cpu.append(time.process_time() - started)
        wall.append(time.perf_counter() - began)
        ratios.append(1.0 if fit.certificate == "rounding" else fit.ratio)
        single.append(fit.float32_error)
    return {
        "n": n,
        "failures": failures,
        "cpu_s": spread(cpu),
        "wall_s": spread(wall),
        "least_bound_over_error": float(min(ratios)),
        "median_one_minus_bound_over_error": float(np.median(1 - np.array(ratios))),
        "float32_error_above_3e-6": int(np.sum(np.array(single) > 3e-6)),
    }


def beside(n: int, seed: int) -> dict[str, Any]:
    """{gates of SAEs or callables: {method: error / optimum, seconds, real poles}} on the same gates."""
    rows: dict[tuple[str, str], list[tuple[float, float, int]]] = {}
    for i, (target, _, theta, margin) in enumerate(draws(n, seed)):
        kind = "gates of SAEs" if isinstance(target, str) else "callables"
        draw: Draw = (target, TYPES[i % 4], theta, margin)
        best = fit_gate(draw[0], draw[1], theta=theta, margin=margin, table=False)
        optimum = best.lower_bound if best.certificate != "rounding" else best.error
        for name, (error, poles, seconds) in contenders(draw).items():
            rows.setdefault((kind, name), []).append((error / optimum, seconds, poles))
    found: dict[str, Any] = {}
    for (kind, name), got in rows.items():
        found.setdefault(kind, {})[name] = {
            "error_over_optimum": spread([row[0] for row in got]),
            "cpu_s": spread([row[1] for row in got]),
            "gates_with_a_pole_in_the_interval": sum(row[2] > 0 for row in got),
            "n": len(got),
        }
    return found


def contenders(draw: Draw) -> dict[str, tuple[float, int, float]]:
    """{method: (largest error, poles in [-1, 1], CPU seconds)} for one gate."""
    target, degree, theta, margin = draw
    found = {}
    for method in ("minimax", "least_squares", "relaxed_remez"):
        started = time.process_time()
        fit = fit_gate(target, degree, theta=theta, margin=margin, method=method, table=False)
        found[method] = fit.error, 0, time.process_time() - started  # the safe form has no pole
    t = domain(theta, margin, 4001)
    f = value(target, theta, t)
    for name, make in (
        ("aaa, clean-up", lambda: aaa(t, f, degree[0], clean_up=True)),
        ("aaa, no clean-up", lambda: aaa(t, f, degree[0], clean_up=False)),
        ("aaa-lawson", lambda: aaa_lawson(t, f, degree[0])),
    ):
        started = time.process_time()
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # AAA says that it stopped at max_terms, as it was told to
            r, poles = make()
        seconds = time.process_time() - started
        found[name] = (*on(target, theta, margin, r, poles), seconds)
    return found


def spread(values: list[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "worst": float(np.max(values))}


def machine() -> str:
    try:
        line = next(x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name"))
        return line.split(":", 1)[1].strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main(n: int = 200, n_beside: int = 60, seed: int = 20_260_614, out: Path | None = None) -> None:
    """Runs both draws, prints the table and writes it as JSON.

    Args:
        n: gates of the first draw.
        n_beside: gates every method is tried on.
        seed: of both draws.
        out: the JSON file; benchmarks/results/gates-MACHINE.json if not given.
    """
    began, name = time.perf_counter(), machine()
    fit_gate("relu", "3,2", table=False)  # the first linear program pays for HiGHS' import
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    report: dict[str, Any] = {
        "machine": name,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
        "commit": head.stdout.strip(),
        "seed": seed,
        "acceptance": acceptance(n, seed),
    }
    first = report["acceptance"]
    print(f"{name}; {n} gates of any type up to (9, 8): {len(first['failures'])} failed")
    print("  CPU seconds   median {median:.3f}  worst {worst:.2f}".format(**first["cpu_s"]))
    print("  wall seconds  median {median:.3f}  worst {worst:.2f}".format(**first["wall_s"]))
    print(f"  least lower_bound / error {first['least_bound_over_error']:.6f}")
    report["beside"] = beside(n_beside, seed + 1)
    for kind, methods in report["beside"].items():
        print(f"\n{methods['minimax']['n']} {kind}, types (3, 2) to (9, 8)")
        print(f"{'':18}{'error / optimum':>28}{'CPU seconds':>20}{'gates with':>14}")
        print(f"{'':18}{'median':>14}{'worst':>14}{'median':>10}{'worst':>10}{'real poles':>14}")
        for method, row in methods.items():
            ratio, cpu = row["error_over_optimum"], row["cpu_s"]
            print(
                f"{method:18}{ratio['median']:14.6g}{ratio['worst']:14.4g}{cpu['median']:10.3f}{cpu['worst']:10.2f}"
                f"{row['gates_with_a_pole_in_the_interval']:14}"
            )
    report["minutes"] = (time.perf_counter() - began) / 60
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    out = out or Path(__file__).parent / "results" / f"gates-{slug}.json"
    make_folder(out.parent)
    write_text(out, json.dumps(report, indent=1) + "\n")
    print(f"\n{out}, {report['minutes']:.1f} minutes")


if __name__ == "__main__":
    tyro.cli(main)
