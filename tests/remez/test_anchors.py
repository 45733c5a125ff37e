"""fit_gate against optimal errors computed elsewhere to high precision, and what every gate that ships must satisfy.

relu: E_{n+1,n}(max(t,0)) = E_{n,n}(|x|) / 2 (Varga, Ruttan & Carpenter 1991). step: half of Zolotarev's error
for the sign on the same gap. jumprelu: a high-precision Remez iteration.
"""

import numpy as np
import pytest
from remez.random_gates import denominator_dip, value

from rsae_triton.remez import GateFit, fit_gate
from rsae_triton.remez.table import shipped

ANCHORS = [
    ("relu", (3, 2), 0.0, 0.0, 0.0218445063460),
    ("relu", (5, 4), 0.0, 0.0, 0.00425074235204),
    ("relu", (7, 6), 0.0, 0.0, 0.00114105300486),
    ("relu", (9, 8), 0.0, 0.0, 0.000368281807015),
    ("step", (3, 2), 0.0, 0.1, 0.0360035534),
    ("step", (5, 4), 0.0, 0.1, 0.00247833412),
    ("step", (8, 8), 0.0, 0.1, 4.46726834e-5),
    ("step", (9, 8), 0.0, 0.1, 1.17130109e-5),
    ("step", (9, 8), 0.0, 0.02, 4.57595329e-4),
    ("jumprelu", (9, 8), 0.1, 0.05, 4.92643e-5),
    ("jumprelu", (9, 8), 0.1, 0.02, 2.10967e-4),
    ("jumprelu", (5, 4), 0.1, 0.02, 0.00892948),
    ("jumprelu", (9, 8), 0.4, 0.02, 3.65940e-4),
]


def check_sound(fit: GateFit) -> None:
    """Optimal, alternating, without a pole anywhere, normalised at the lowest Q, and the same in float32."""
    p, q = fit.degree
    t = np.linspace(-1, 1, 100_001)
    domain = t[np.abs(t - fit.theta) >= fit.margin]
    error = value(fit.target, fit.theta, domain) - fit(domain)
    assert 0.9 * fit.error < np.max(np.abs(error)) <= fit.error * (1 + 1e-9)

    assert fit.ratio > 0.9999
    assert len(fit.reference) == p + q + 2
    at_reference = value(fit.target, fit.theta, fit.reference) - fit(fit.reference)
    assert np.all(np.diff(fit.reference) > 0)
    assert np.all(at_reference[1:] * at_reference[:-1] < 0)
    assert np.min(np.abs(at_reference)) >= fit.lower_bound * (1 - 1e-9)

    assert fit.b[0] == 0.0
    assert fit.whole_line
    line = np.concatenate([t, np.linspace(-100, 100, 20_001), np.tan(np.linspace(-1.57079, 1.57079, 20_001))])
    assert denominator_dip(fit.b, fit.centre, line) >= -1e-3

    single = t.astype(np.float32)
    assert fit(single).dtype == np.float32
    assert np.max(np.abs(fit(single) - fit(single.astype(np.float64)))) < 3e-6
    assert fit.float32_error < 3e-6


@pytest.mark.parametrize(("target", "degree", "theta", "margin", "optimum"), ANCHORS)
def test_reaches_the_optimal_error_and_proves_it(target, degree, theta, margin, optimum):
    fit = fit_gate(target, degree, theta=theta, margin=margin, table=False)
    assert fit.error == pytest.approx(optimum, rel=1e-4)
    assert fit.lower_bound <= optimum * (1 + 1e-5)
    check_sound(fit)


@pytest.mark.parametrize("fit", shipped(), ids=lambda f: f"{f.target}-{f.degree}-{f.theta}-{f.margin}")
def test_every_shipped_gate_is_sound(fit):
    check_sound(fit)


def test_the_smallest_relu_gate_has_the_known_coefficients():
    fit = fit_gate("relu", "3,2", table=False)
    np.testing.assert_allclose(fit.a, [0.0218445, 0.5, 1.595744, 1.191488], rtol=3e-5)
    np.testing.assert_allclose(fit.b, [0.0, 2.382977], rtol=3e-5)
