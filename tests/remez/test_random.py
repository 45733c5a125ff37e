"""The acceptance draw: any target, any type up to (9, 8), any threshold and gap; none may fail."""

import numpy as np
import pytest
from remez.random_gates import denominator_dip, draws, value

from rsae_triton.remez import fit_gate


@pytest.mark.slow
def test_two_hundred_random_gates_are_certified():
    for target, degree, theta, margin in draws(200, seed=20_260_614):
        fit = fit_gate(target, degree, theta=theta, margin=margin, table=False)  # a refusal raises
        assert fit.ratio > 0.999 or fit.certificate == "rounding", fit
        # The certificate is about the interval: no point that the fit did not look at has a larger error.
        t = np.linspace(-1, 1, 40_009)
        domain = t[np.abs(t - theta) >= margin]
        error = np.max(np.abs(fit(domain) - value(target, theta, domain)))
        assert error <= fit.error * (1 + 1e-8) + 1e-13, fit  # 1e-13: what the sums of r cost in float64
        # No pole between -1 and 1, the gap included: B >= 0 there, so that the safe form is P / Q itself.
        assert denominator_dip(fit.b, fit.centre, t) >= -1e-6, fit
        if not isinstance(target, str):
            continue
        # The gates of SAEs have no pole on the whole line, and a centre where b_1 is 0.
        line = np.tan(np.linspace(-1.57, 1.57, 20_001))
        assert denominator_dip(fit.b, fit.centre, line) >= -1e-6, fit
        assert degree[1] < 2 or fit.b[0] == 0.0, fit
        # A numerator two degrees or more below its denominator, or none of the latter, cancels in float32.
        if 2 <= degree[1] // 2 * 2 <= degree[0] + 1:
            assert fit.float32_error < 3e-6, fit
