"""fit_gate against optimal errors computed elsewhere to high precision.

relu: E_{n+1,n}(max(t,0)) = E_{n,n}(|x|) / 2 (Varga, Ruttan & Carpenter 1991). step: half of Zolotarev's error
for the sign on the same gap. jumprelu: a high-precision Remez iteration.
"""

import numpy as np
import pytest

from rsae_triton.remez import fit_gate

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


@pytest.mark.parametrize(("target", "degree", "theta", "margin", "optimum"), ANCHORS)
def test_reaches_the_optimal_error_and_proves_it(target, degree, theta, margin, optimum):
    fit = fit_gate(target, degree, theta=theta, margin=margin)
    assert fit.error == pytest.approx(optimum, rel=1e-4)
    assert fit.lower_bound <= optimum * (1 + 1e-5)
    assert fit.ratio > 0.9999
    assert fit.b[0] == 0.0
    # The error is the one a user sees, measured here on points of our own.
    t = np.linspace(-1, 1, 100_001)
    t = t[np.abs(t - theta) >= margin]
    truth = np.where(t > theta, 1.0 if target == "step" else t, 0.0)
    assert np.max(np.abs(fit(t) - truth)) <= fit.error * (1 + 1e-9)


def test_the_smallest_relu_gate_has_the_known_coefficients():
    fit = fit_gate("relu", "3,2")
    np.testing.assert_allclose(fit.a, [0.0218445, 0.5, 1.595744, 1.191488], rtol=3e-5)
    np.testing.assert_allclose(fit.b, [0.0, 2.382977], rtol=3e-5)


@pytest.mark.parametrize(("target", "degree", "theta", "margin", "optimum"), ANCHORS)
def test_evaluates_in_float32(target, degree, theta, margin, optimum):
    fit = fit_gate(target, degree, theta=theta, margin=margin)
    t = np.linspace(-1, 1, 20_001)
    t = t[np.abs(t - theta) >= margin]
    single = fit(t.astype(np.float32))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, fit(t.astype(np.float32).astype(np.float64)), atol=4e-6, rtol=0)
