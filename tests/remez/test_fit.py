"""What fit_gate takes, refuses and returns."""

import json

import numpy as np
import pytest
import torch
from remez.random_gates import gelu, shifted_relu, soft_threshold, tanh_shrink

from rsae_triton.common.errors import ConfigError, FormatError, NumericsError
from rsae_triton.remez import GateFit, fit_gate, shipped_gate
from rsae_triton.remez import table as gate_table
from rsae_triton.remez.fit import ladder, parse_degree


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("relu6", "3,2"), {}, "unknown target"),
        ((3.0, "3,2"), {}, "name or a callable"),
        (("relu", "3"), {}, "degree is"),
        (("relu", (3.5, 2)), {}, "degree is"),
        (("relu", (13, 2)), {}, "degree is"),
        (("relu", (3, float("inf"))), {}, "degree is"),
        (("relu", (3, float("nan"))), {}, "degree is"),
        (("relu", 3), {}, "degree is"),
        (("relu", (3, -1)), {}, "degree is"),
        (("step", "3,2"), {}, "margin=0.02"),
        (("jumprelu", "3,2"), {"theta": 0.1}, "margin=0.02"),
        (("relu", "3,2"), {"theta": 0.1}, "use jumprelu"),
        (("step", "3,2"), {"theta": 0.95, "margin": 0.05}, "leaves no domain"),
        (("step", "3,2"), {"margin": 1.0}, "leaves no domain"),
        (("step", "3,2"), {"theta": 1.5, "margin": 0.1}, r"theta must lie in \[-1, 1\]"),
        (("jumprelu", "3,2"), {"theta": -2, "margin": 0.1}, r"theta must lie in \[-1, 1\]"),
        (("step", "3,2"), {"margin": -0.1}, "margin is -0.1"),
        (("step", "3,2"), {"theta": float("nan"), "margin": 0.1}, "finite"),
        (("relu", "3,2"), {"method": "magic"}, "unknown method"),
        (("relu", "3,2"), {"points": 3}, "points"),
        (("relu", "3,2"), {"tol": 1e-9}, "best has 0.021"),
        (("relu", "3,2"), {"tol": 0.0}, "tol is 0.0"),
        (("relu", "3,2"), {"weight": np.ones(7)}, "shape"),
        (("relu", "3,2"), {"weight": lambda t: t}, "weight must be >= 0"),
        (("relu", "3,2"), {"samples": np.empty(0)}, "samples is empty"),
        ((lambda t: 1.0, "3,2"), {}, "vectorised"),
    ],
)
def test_wrong_arguments_are_refused_in_words(arguments, options, message):
    with pytest.raises(ConfigError, match=message):
        fit_gate(*arguments, **options)


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"not finite at t = 0\.5"):
        fit_gate(lambda t: np.where(t >= 0.5, np.nan, t), "3,2")
    with np.errstate(divide="ignore"), pytest.raises(NumericsError, match="not finite at t = 0"):
        fit_gate(lambda t: 1 / t, "3,2")
    with pytest.raises(NumericsError, match="samples"):
        fit_gate("relu", "3,2", samples=np.array([0.0, np.nan]))


@pytest.mark.parametrize(("given", "meant"), [("9,8", (9, 8)), (" 3 , 2", (3, 2)), ([5, 4], (5, 4)), ((0, 0), (0, 0))])
def test_a_degree_is_a_pair_or_its_text(given, meant):
    assert parse_degree(given) == meant


def test_every_small_type_is_fitted():
    """Polynomials, constants and constant numerators included."""
    for p in range(4):
        for q in range(4):
            fit = fit_gate("jumprelu", (p, q), theta=0.1, margin=0.1)
            assert fit.a.shape == fit.numerator_scale.shape == (p + 1,)
            assert fit.b.shape == fit.denominator_scale.shape == (q,)
            assert fit.ratio > 0.999
    # The best constant for values 0 and 0.2 .. 1 is 1/2.
    assert fit_gate("jumprelu", (0, 0), theta=0.1, margin=0.1).a[0] == pytest.approx(0.5, rel=1e-6)


def test_callables_with_a_gap_and_smooth_ones():
    named = fit_gate("step", (5, 4), theta=0.2, margin=0.05)
    own = fit_gate(lambda t: (t > 0.2).astype(float), (5, 4), theta=0.2, margin=0.05)
    assert own.error == pytest.approx(named.error, rel=1e-5)
    silu = fit_gate(lambda t: t / (1 + np.exp(-20 * t)), (6, 6))
    assert silu.ratio > 0.999
    assert silu.error < 1e-4
    # Meinardus' formula p! q! / (2^(p+q) (p+q)! (p+q+1)!) for exp, proved by Braess 1984 as an asymptotic.
    exp = fit_gate(np.exp, (2, 2))
    assert exp.error == pytest.approx(4 / (2**4 * 24 * 120), rel=0.02)
    assert exp.ratio > 0.999


@pytest.mark.parametrize(
    ("target", "degree", "least"),
    [(gelu, (9, 8), 1e-6), (tanh_shrink, (5, 4), 1e-3), (shifted_relu, (9, 8), 1e-3), (soft_threshold, (7, 6), 1e-2)],
)
def test_the_gates_of_other_networks_are_fitted(target, degree, least):
    fit = fit_gate(target, degree)
    assert fit.target == target.__name__
    assert fit.ratio > 0.999
    t = np.linspace(-1, 1, 20_001)
    assert np.max(np.abs(fit(t) - target(t))) <= fit.error * (1 + 1e-9) < least
    larger = fit_gate(target, (degree[0] - 2, degree[1] - 2))
    assert larger.error > 1.5 * fit.error


def test_the_centre_may_lie_beyond_the_interval():
    """exp's Q falls all the way to 1 and has its minimum beyond: centred there, b_1 is 0 and B >= 0 everywhere."""
    fit = fit_gate(np.exp, (1, 2))
    assert fit.centre > 1
    assert fit.b[0] == 0.0
    assert fit.whole_line
    assert fit.float32_error < 3e-6
    # One degree more and the best Q has a real zero beyond [-1, 1]: no centre makes B >= 0 on the whole line.
    beyond = fit_gate(tanh_shrink, (2, 2))
    assert not beyond.whole_line
    assert beyond.b[0] != 0.0
    assert np.all(np.isfinite(beyond(np.linspace(-50, 50, 10_001))))


def test_zero_is_the_best_fit_of_an_odd_target_with_a_constant_numerator():
    """A / Q has one sign, the target takes 1 and -1: 0 is best, and two points prove it (defect)."""
    fit = fit_gate(tanh_shrink, (0, 6))
    assert not np.any(fit.a)
    assert fit.ratio == pytest.approx(1.0)
    np.testing.assert_array_equal(fit.reference, [-1.0, 1.0])


@pytest.mark.parametrize("degree", ["3,2", "6,6"])
def test_a_target_of_the_type_is_met_to_rounding(degree):
    for target in (lambda t: 0 * t, lambda t: 1 + 0 * t, lambda t: t**2, lambda t: (1 + t) / (2 + t**2)):
        fit = fit_gate(target, degree)
        assert fit.error < 1e-11
        assert fit.certificate == "rounding"


def test_a_weight_shifts_the_error_to_where_it_is_small():
    def weight(t):
        return np.where(t < 0, 10.0, 1.0)

    by_function = fit_gate("step", (5, 4), margin=0.05, weight=weight)
    by_values = fit_gate("step", (5, 4), margin=0.05, weight=weight(np.linspace(-1, 1, 4001)))
    assert by_values.error == pytest.approx(by_function.error, rel=1e-6)
    assert by_function.weighted
    assert by_function.ratio > 0.9999
    left, right = np.linspace(-1, -0.05, 20_001), np.linspace(0.05, 1, 20_001)
    assert np.max(np.abs(by_function(left))) == pytest.approx(by_function.error / 10, rel=1e-3)
    assert np.max(np.abs(1 - by_function(right))) == pytest.approx(by_function.error, rel=1e-3)


FLOORS = [((3, 2), 1.337e-4), ((5, 4), 3.479e-6), ((7, 6), 1.732e-7), ((9, 8), 1.276e-8)]


@pytest.mark.parametrize(("degree", "floor"), FLOORS)
def test_least_squares_reaches_the_least_mse(degree, floor):
    fit = fit_gate("relu", degree, method="least_squares")
    assert fit.mse == pytest.approx(floor, rel=0.01)
    t = np.linspace(-1, 1, 4001)
    assert np.mean((fit(t) - np.maximum(t, 0)) ** 2) == pytest.approx(fit.mse, rel=1e-9)
    best = fit_gate("relu", degree)
    assert fit.mse < best.mse
    assert fit.error > best.error >= fit.lower_bound


def test_least_squares_follows_the_samples():
    samples = np.random.default_rng(0).normal(-0.1, 0.08, 50_000)
    everywhere, fitted = (fit_gate("relu", "5,4", method=m, samples=samples) for m in ("minimax", "least_squares"))
    assert fitted.mse < 0.2 * everywhere.mse
    clipped = np.clip(samples, -1, 1)
    assert fitted.mse == pytest.approx(np.mean((fitted(clipped) - np.maximum(clipped, 0)) ** 2), rel=1e-12)
    few = fit_gate("relu", "5,4", method="least_squares", samples=samples[:3000])
    assert few.mse < 0.5 * everywhere.mse
    # Where no sample fell the gate is still a gate.
    assert max(fitted.error, few.error) < 0.2


def test_least_squares_needs_no_gap_at_a_jump():
    fit = fit_gate("step", "9,8", theta=0.1, method="least_squares")
    assert fit.mse < 1e-3
    assert fit.error >= 0.5 * (1 - 1e-9)  # no continuous function comes closer to a jump
    assert fit.b[0] == 0.0


def test_tol_finds_the_smallest_type():
    assert fit_gate("relu", "auto").degree == (9, 8)
    assert fit_gate("relu", "9,8", tol=5e-3).degree == (5, 4)
    assert fit_gate("relu", "12,12", tol=1e-5, method="least_squares").degree == (5, 4)
    assert fit_gate(gelu, "auto", tol=1e-4).degree == (7, 6)
    assert ladder(3, 5) == [(1, 0), (3, 2), (3, 4), (3, 5)]


def test_evaluation_keeps_dtype_shape_and_library():
    fit = fit_gate("jumprelu", "9,8", theta=0.1, margin=0.02)
    t = np.linspace(-1, 1, 24).reshape(2, 3, 4)
    for dtype in (np.float32, np.float64):
        assert fit(t.astype(dtype)).dtype == dtype
        assert fit(t.astype(dtype)).shape == t.shape
    tensor = torch.from_numpy(t).requires_grad_()
    np.testing.assert_allclose(fit(tensor).detach().numpy(), fit(t), rtol=1e-12)
    assert isinstance(fit(0.5), float)


def test_the_fit_survives_json_bit_for_bit():
    fit = fit_gate("jumprelu", "5,4", theta=0.1, margin=0.02)
    plain = json.loads(json.dumps(fit.to_dict()))
    back = GateFit.from_dict(plain)
    for name in ("a", "b", "reference", "numerator_scale", "denominator_scale"):
        np.testing.assert_array_equal(getattr(back, name), getattr(fit, name))
    assert repr(back) == repr(fit)
    assert "error=0.00892948" in repr(fit)
    for broken in (plain | {"a": plain["a"][:-1]}, plain | {"extra": 1}, {"a": [1.0]}):
        with pytest.raises(FormatError, match="not a gate fit"):
            GateFit.from_dict(broken)


def test_the_figure_shows_gate_and_equioscillation(tmp_path):
    fit = fit_gate("jumprelu", "5,4", theta=0.1, margin=0.02)
    figure = fit.plot(tmp_path / "new" / "gate.png")
    assert (tmp_path / "new" / "gate.png").read_bytes().startswith(b"\x89PNG")
    below = figure.axes[1]
    reference = next(line for line in below.lines if line.get_label() == "where it alternates")
    assert len(reference.get_xdata()) == 11
    np.testing.assert_allclose(np.abs(reference.get_ydata()), fit.error, rtol=1e-3)
    again = GateFit.from_dict(fit.to_dict()).plot()
    assert [len(axis.lines) for axis in again.axes] == [len(axis.lines) for axis in figure.axes]
    unknown = GateFit.from_dict(fit_gate(np.abs, "2,2").to_dict()).plot()  # its target was not saved
    assert len(unknown.axes[0].lines) == 1


def test_the_shipped_table_is_what_fitting_gives():
    fits = gate_table.shipped()
    assert [(f.target, f.degree, f.theta, f.margin) for f in fits] == list(gate_table.ENTRIES)
    for target, degree, theta, margin in gate_table.ENTRIES[::9]:
        shipped = shipped_gate(target, degree, theta=theta, margin=margin)
        fresh = fit_gate(target, degree, theta=theta, margin=margin, table=False)
        assert fresh.problem is not None
        assert shipped.error == pytest.approx(fresh.error, rel=1e-4)
        np.testing.assert_allclose(shipped.a / fresh.numerator_scale, fresh.a / fresh.numerator_scale, atol=1e-2)
    assert shipped_gate("relu", "1,1") is None


def test_a_shipped_gate_is_loaded_and_not_fitted():
    def fitted_anew(**options):
        return fit_gate("jumprelu", "9,8", **({"theta": 0.1, "margin": 0.02} | options)).problem is not None

    assert not fitted_anew()
    assert fit_gate("relu", "auto", tol=1e-2).problem is None
    for options in ({"table": False}, {"margin": 0.03}, {"points": 2001}, {"weight": np.ones_like}):
        assert fitted_anew(**options)
    assert fitted_anew(samples=np.zeros(3))
    assert fit_gate("jumprelu", "9,8", theta=0.1, margin=0.02, table=False).error == pytest.approx(
        fit_gate("jumprelu", "9,8", theta=0.1, margin=0.02).error, rel=1e-4
    )


def test_a_broken_table_is_named(tmp_path):
    for text in ("", "[]", '{"format": 99, "fits": []}'):
        (tmp_path / "table.json").write_text(text)
        with pytest.raises(FormatError, match=r"table\.json"):
            gate_table.read_table(tmp_path / "table.json")
    with pytest.raises(FormatError, match="rebuild"):
        gate_table.read_table(tmp_path / "absent.json")
