"""The parts a certificate rests on, each against something slower or exact."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsae_triton.remez import fit_gate
from rsae_triton.remez.bound import program_bound
from rsae_triton.remez.extrema import Peaks, alternation, bracket, find_peaks, near_poles
from rsae_triton.remez.fit import certify
from rsae_triton.remez.problem import make_problem
from rsae_triton.remez.rational import Rational, safe_pade, shifted

RELU_3_2 = 0.0218445063460


def best_alternation(error: list[float], count: int) -> float:
    """The largest level at which `count` errors alternate, by trying every level."""
    best = 0.0
    for level in {abs(e) for e in error}:
        signs = [e > 0 for e in error if abs(e) >= level and e != 0]
        runs = sum(i == 0 or signs[i] != signs[i - 1] for i in range(len(signs)))
        if runs >= count:
            best = max(best, level)
    return best


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=14), st.integers(1, 6))
@settings(max_examples=300, deadline=None)
def test_alternation_finds_the_highest_level(values, count):
    error = np.array(values, float)
    chosen = alternation(Peaks(np.arange(len(error)), error), count)
    expected = best_alternation([float(v) for v in values], count)
    assert (chosen is None) == (expected == 0.0)
    if chosen is not None:
        assert np.all(np.diff(chosen) > 0)
        assert np.all(error[chosen][1:] * error[chosen][:-1] < 0)
        assert np.min(np.abs(error[chosen])) == expected


@given(st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=13), st.floats(-1, 1))
@settings(deadline=None)
def test_the_taylor_shift_is_exact_to_double(coefficients, by):
    exact = [Fraction(c) for c in coefficients]
    for i in range(len(exact) - 1):
        for k in range(len(exact) - 2, i - 1, -1):
            exact[k] += Fraction(by) * exact[k + 1]
    size = float(max(abs(c) for c in coefficients)) * 2.0 ** len(coefficients)
    ours = shifted(np.array(coefficients, float), by).astype(np.float64)
    np.testing.assert_allclose(ours, [float(c) for c in exact], rtol=1e-14, atol=1e-17 * size)


def test_a_worse_function_proves_less_but_nothing_false():
    """The lower bound of any function of the type stays below the optimum, however it was made."""
    problem, fit = make_problem("relu"), fit_gate("relu", "3,2")
    rng = np.random.default_rng(0)
    proved = []
    for size in (0.0, 1e-4, 1e-3, 1e-2):
        for _ in range(5):
            r = Rational(fit.a * (1 + size * rng.normal(size=4)), np.concatenate([[1.0], fit.b]), fit.centre)
            peaks = find_peaks(problem, r, near_poles(r, problem))
            bound, _, _ = certify(problem, r, peaks, with_program=True)
            assert bound <= RELU_3_2 * (1 + 1e-6)
            assert bound <= peaks.largest
            proved.append(bound)
    assert max(proved) > 0.9999 * RELU_3_2 > 1.001 * min(proved)


@pytest.mark.parametrize(
    ("target", "degree", "theta", "margin"),
    [("relu", (5, 4), 0.0, 0.0), ("jumprelu", (9, 8), 0.1, 0.02), ("step", (3, 2), -0.4, 0.1)],
)
def test_the_linear_program_agrees_with_the_alternation(target, degree, theta, margin):
    fit = fit_gate(target, degree, theta=theta, margin=margin, table=False)
    r = Rational(fit.a, np.concatenate([[1.0], fit.b]), fit.centre)
    problem = make_problem(target, theta, margin)
    proved, support = program_bound(problem, r, np.union1d(problem.grid[::10], fit.reference))
    assert 0.999 * fit.error <= proved <= fit.error
    assert len(support) >= sum(degree) + 1


def test_peaks_are_found_between_grid_points_and_under_poles():
    problem = make_problem(lambda t: 0 * t, points=101)
    width = 1e-5
    spike = Rational(np.array([1.0]), np.array([1.0, 0.0, width**-2]), 0.51234567)
    peaks = find_peaks(problem, spike, near_poles(spike, problem))
    assert peaks.largest == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("side", [-1, 1])
def test_a_peak_is_found_beyond_a_point_that_nearly_coincides_with_another(side):
    """Rounding gave the first of two such points the larger error; the peak lay beyond the second, unseen."""
    problem = make_problem(lambda t: 0 * t, points=401)
    both = np.array([np.nextafter(0.5, 0.0), 0.5])
    first, second = both[::side]

    def bump(t):
        return 1 - 0.4 * (t - 0.5 - side * 0.0013) ** 2 - 1e-13 * (t == second)

    t = np.union1d(problem.grid, both)
    top = np.flatnonzero(t == first)
    low, high = (t[end[0]] for end in bracket(bump(t), top))
    assert low < 0.5 + side * 0.0013 < high
    assert find_peaks(problem, bump, both).largest == pytest.approx(1.0, abs=1e-13)


def test_a_bracket_ends_at_the_ends_of_the_interval_and_on_a_plateau():
    for size in (np.ones(50), np.arange(50.0), np.arange(50.0)[::-1]):
        for top in (np.array([0, 49]), np.array([25])):
            low, high = bracket(size, top)
            assert np.all((low <= top) & (top <= high))
            assert low.min() >= 0
            assert high.max() <= 49


def test_the_safe_form_has_no_pole_anywhere():
    fit = fit_gate("jumprelu", "9,8", theta=0.1, margin=0.02)
    assert fit.whole_line
    t = np.linspace(-50, 50, 100_001)
    assert np.all(np.isfinite(fit(t)))
    plain = Rational(fit.a, np.concatenate([[1.0], fit.b]), fit.centre)
    np.testing.assert_allclose(fit(t), plain(t), rtol=1e-12)
    assert not Rational(np.ones(1), np.array([1.0, 0.0, -1.0]), 0.0).poles().imag.any()
    np.testing.assert_allclose(safe_pade(np.ones(1), np.array([0.0, -1.0]), 0.0, np.array([2.0])), 0.2)


def test_unit_influence_scales_are_what_they_say():
    fit = fit_gate("relu", "9,8")
    t = np.linspace(-1, 1, 200_001)
    s, q = t - fit.centre, 1 + np.abs((t - fit.centre) * np.polyval(fit.b[::-1], t - fit.centre))
    for k, scale in enumerate(fit.numerator_scale):
        assert scale == pytest.approx(1 / np.max(np.abs(s) ** k / q), rel=1e-3)
    np.testing.assert_allclose(fit.denominator_scale, fit.numerator_scale[1:9], rtol=1e-12)
    assert np.max(np.abs(fit.a / fit.numerator_scale)) < 100
