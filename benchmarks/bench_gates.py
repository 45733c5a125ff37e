"""Gate fitting: seconds, linear programs and how near the optimum, beside AAA.

    pytest benchmarks/bench_gates.py --benchmark-json=gates.json

Errors and certificates are in each benchmark's extra_info. No GPU is used.
"""

import numpy as np
import pytest
from scipy.interpolate import AAA

from rsae_triton.errors import ConvergenceError
from rsae_triton.remez import GateFit, fit_gate, shipped_gate

GATES = [
    ("relu", (3, 2), 0.0, 0.0),
    ("relu", (9, 8), 0.0, 0.0),
    ("step", (9, 8), 0.0, 0.02),
    ("jumprelu", (5, 4), 0.1, 0.02),
    ("jumprelu", (9, 8), 0.1, 0.02),
    ("jumprelu", (9, 8), 0.4, 0.02),
    ("step", (12, 12), 0.3, 0.005),
]


def _info(fit: GateFit) -> dict[str, float | str]:
    return {"error": fit.error, "ratio": fit.ratio, "certificate": fit.certificate, "n_lps": fit.n_lps}


@pytest.mark.parametrize(("target", "degree", "theta", "margin"), GATES)
def test_minimax(benchmark, target, degree, theta, margin):
    fit = benchmark.pedantic(fit_gate, (target, degree), {"theta": theta, "margin": margin}, rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(_info(fit))


@pytest.mark.parametrize(("target", "degree", "theta", "margin"), GATES[:5])
def test_least_squares_on_the_grid(benchmark, target, degree, theta, margin):
    options = {"theta": theta, "margin": margin, "method": "least_squares"}
    fit = benchmark.pedantic(fit_gate, (target, degree), options, rounds=3)
    benchmark.extra_info.update(_info(fit), mse=fit.mse)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_hundred_random_gates(benchmark, seed):
    """Any target, any type up to (12, 12), any threshold and margin: seconds and proof of each in extra_info."""

    def draw() -> tuple[list[GateFit], int]:
        rng, fits, refused = np.random.default_rng(seed), [], 0
        for _ in range(100):
            target = rng.choice(["relu", "step", "jumprelu"]).item()
            degree = rng.integers(0, 13, 2).tolist()
            theta, margin = float(rng.uniform(-0.7, 0.7)), float(10 ** rng.uniform(-3, -0.7))
            place = {} if target == "relu" else {"theta": theta, "margin": margin}
            try:
                fits.append(fit_gate(target, degree, **place))
            except ConvergenceError:
                refused += 1
        return fits, refused

    fits, refused = benchmark.pedantic(draw, rounds=1)
    seconds, ratios = np.array([fit.seconds for fit in fits]), np.array([fit.ratio for fit in fits])
    benchmark.extra_info.update(
        refused=refused, median_s=float(np.median(seconds)), p90_s=float(np.quantile(seconds, 0.9)),
        worst_s=float(seconds.max()), worst_ratio=float(ratios.min()), median_gap=float(np.median(1 - ratios)),
    )


@pytest.mark.parametrize(("target", "degree", "theta", "margin"), GATES[:6])
def test_aaa_of_the_same_size(benchmark, target, degree, theta, margin):
    """The usual quick way, for comparison: type (q, q) by AAA on the same grid, its error and its real poles."""
    t = np.linspace(-1, 1, 4001)
    t = t[np.abs(t - theta) >= margin]
    value = np.where(t > theta, 1.0 if target == "step" else t, 0.0)
    r = benchmark(AAA, t, value, max_terms=degree[1] + 1, clean_up=False)
    poles = r.poles()
    real = np.sum((np.abs(poles.imag) < 1e-9) & (np.abs(poles.real) <= 1))
    benchmark.extra_info.update(error=float(np.max(np.abs(value - r(t)))), real_poles=int(real))


def test_reading_the_shipped_table(benchmark):
    assert benchmark(shipped_gate, "jumprelu", "9,8", theta=0.1, margin=0.02) is not None
