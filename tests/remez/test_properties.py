"""What holds for best approximants whatever the target, tried on random ones (hypothesis)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from remez.random_gates import gelu, shifted_relu, soft_threshold, tanh_shrink

from rsae_triton.remez import fit_gate

few = settings(max_examples=12, deadline=None, derandomize=True)
degrees = st.tuples(st.integers(0, 7), st.integers(0, 6))
places = st.tuples(st.floats(0, 0.6), st.floats(0.01, 0.1))
CERTIFIED = 1 + 1.1e-3  # an error is certified to this factor of the optimum


@few
@given(st.sampled_from([gelu, tanh_shrink, shifted_relu, np.exp]), degrees, st.floats(-1000, 1000))
def test_scaling_the_target_scales_the_fit(target, degree, by):
    by = by if abs(by) > 1e-3 else 1.0
    plain, scaled = fit_gate(target, degree), fit_gate(lambda t: by * target(t), degree)
    if plain.certificate == "rounding":
        return
    assert scaled.error == pytest.approx(abs(by) * plain.error, rel=1.1e-3)
    t = np.linspace(-1, 1, 501)
    np.testing.assert_allclose(scaled(t) / by, plain(t), atol=0.05 * plain.error)


@few
@given(st.sampled_from(["step", "jumprelu", soft_threshold]), degrees, st.integers(0, 2), st.integers(0, 2), places)
def test_more_coefficients_never_do_worse(target, degree, dp, dq, place):
    theta, margin = place
    smaller, larger = (
        fit_gate(target, d, theta=theta, margin=margin, table=False).error
        for d in (degree, (degree[0] + dp, degree[1] + dq))
    )
    assert larger <= smaller * CERTIFIED


@few
@given(degrees, st.floats(0.2, 5))
def test_the_fit_of_an_even_target_is_even(degree, scale):
    fit = fit_gate(lambda t: np.abs(scale * t), degree)
    t = np.linspace(0, 1, 501)
    np.testing.assert_allclose(fit(t), fit(-t), atol=0.02 * fit.error)


@few
@given(degrees, st.floats(0.01, 0.3))
def test_the_fit_of_an_odd_target_is_odd(degree, margin):
    fit = fit_gate(np.sign, degree, margin=margin)
    t = np.linspace(margin, 1, 501)
    np.testing.assert_allclose(fit(t), -fit(-t), atol=0.02 * fit.error)
