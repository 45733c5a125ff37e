"""fit_gate against theory that shares no code with it: Zolotarev's closed form, symmetries, monotonicity."""

import re

import numpy as np
import pytest
from scipy.optimize import OptimizeResult, linprog
from scipy.special import ellipj, ellipkm1

from rsae_triton.common.errors import ConvergenceError
from rsae_triton.remez import correction, fit_gate


def zolotarev_step_error(p: int, q: int, margin: float) -> float:
    """E_{p,q} of the Heaviside function on [-1, -margin] u [margin, 1], q even, p >= q.

    H = (1 + sign) / 2 has a numerator of degree q at least, hence p >= q. Half the error
    of the best odd approximant to sign(x): M x prod (x^2 + c_{2l}) / (x^2 + c_{2l-1}),
    c_l = margin^2 sn^2(l K' / n) / cn^2(l K' / n) (Zolotarev 1877; Akhiezer, Elements of elliptic functions).
    """
    n = q + 1 if p >= q + 1 else q
    quarter = ellipkm1(margin**2)
    sn, cn, _, _ = ellipj(np.arange(1, n) * quarter / n, 1 - margin**2)
    c = margin**2 * sn**2 / cn**2
    x = np.concatenate([np.geomspace(margin, 1, 200_001), [1.0]])
    r = x.copy()
    for value in c[1::2]:
        r *= x**2 + value
    for value in c[0::2]:
        r /= x**2 + value
    return 0.5 * (r.max() - r.min()) / (r.max() + r.min())


@pytest.mark.parametrize("degree", [(3, 2), (2, 2), (4, 4), (5, 4), (6, 4), (7, 6), (8, 8), (9, 8), (11, 10)])
@pytest.mark.parametrize("margin", [0.3, 0.05, 0.003])
def test_the_step_is_zolotarevs(degree, margin):
    optimum = zolotarev_step_error(*degree, margin)
    fit = fit_gate("step", degree, margin=margin, table=False)
    assert fit.error == pytest.approx(optimum, rel=1e-3)
    assert fit.lower_bound <= optimum * (1 + 1e-6) <= fit.error * (1 + 2e-6)


def test_the_oracle_knows_a_published_number():
    assert zolotarev_step_error(9, 8, 0.1) == pytest.approx(1.17130109e-5, rel=1e-6)


@pytest.mark.parametrize("n", [2, 4, 6])
def test_relu_is_half_the_absolute_value(n):
    """max(t, 0) = (t + |t|) / 2, so E_{n+1,n}(relu) = E_{n,n}(|t|) / 2."""
    assert fit_gate("relu", (n + 1, n), table=False).error == pytest.approx(
        fit_gate(np.abs, (n, n)).error / 2, rel=1e-5
    )


def test_mirroring_the_target_mirrors_the_fit():
    """step(t; theta) + step(-t; -theta) = 1 away from the jump."""
    here = fit_gate("step", (5, 4), theta=0.3, margin=0.05)
    there = fit_gate("step", (5, 4), theta=-0.3, margin=0.05)
    t = np.concatenate([np.linspace(-1, 0.25, 500), np.linspace(0.35, 1, 500)])
    assert here.error == pytest.approx(there.error, rel=1e-5)
    np.testing.assert_allclose(here(t) + there(-t), 1.0, atol=1e-3 * here.error)


@pytest.mark.parametrize(
    ("target", "theta", "margin"), [("relu", 0.0, 0.0), ("step", 0.2, 0.05), ("jumprelu", 0.1, 0.05)]
)
def test_more_coefficients_never_do_worse(target, theta, margin):
    error = {
        (p, q): fit_gate(target, (p, q), theta=theta, margin=margin).error for p in range(1, 7) for q in range(0, 6)
    }
    for (p, q), value in error.items():
        for larger in ((p + 1, q), (p, q + 1)):
            assert error.get(larger, 0.0) <= value * (1 + 1e-5), (p, q, larger)


def test_an_odd_denominator_degree_is_fitted_as_the_even_one_below():
    odd, even = (fit_gate("jumprelu", (4, q), theta=0.2, margin=0.05) for q in (3, 2))
    assert odd.b.shape == odd.denominator_scale.shape == (3,)
    assert odd.b[2] == 0.0
    np.testing.assert_array_equal(odd.b[:2], even.b)
    np.testing.assert_array_equal(odd.a, even.a)


def test_a_jump_without_a_gap_is_refused_with_bounds_on_the_error():
    """A callable that jumps without a gap: 1 is the infimum, and nothing alternates."""
    with pytest.raises(ConvergenceError, match=r"lies in \[0\.\d+, 1") as caught:
        fit_gate(np.sign, "3,2")
    assert "margin" in str(caught.value)


def test_a_linear_program_that_stops_leaves_a_bracket_or_an_error(monkeypatch):
    """HiGHS gives up after the third program: the fit is refused with what was proved until then."""
    solved, real = [], correction.linear_program

    def broken(*arguments, **options):
        solved.append(1)
        return real(*arguments, **options) if len(solved) <= 3 else OptimizeResult(x=None, message="gave up")

    monkeypatch.setattr(correction, "linear_program", broken)
    with pytest.raises(ConvergenceError, match=r"lies in \[\d[^,]*, 0\.\d+") as caught:
        fit_gate("jumprelu", "9,8", theta=0.1, margin=0.03)
    low, high = (float(x) for x in re.search(r"\[(\S+), (\S+)\]", str(caught.value)).groups())
    assert 0 <= low <= fit_gate_error() <= high


def fit_gate_error() -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(correction, "linear_program", linprog)
        return fit_gate("jumprelu", "9,8", theta=0.1, margin=0.03).error
