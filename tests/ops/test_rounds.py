"""Rounds by entries against the plain reference in float64, with autograd through all of it."""

import pytest
import torch

from rsae_triton import RationalGate, fit_gate
from rsae_triton.common.errors import ConfigError
from rsae_triton.ops import rounds
from rsae_triton.ops.reference import GateSpec, GateTensors
from rsae_triton.ops.rounds import RoundTensors

SPEC = GateSpec(3, 2, "gated", backward="rational")


def case(n=37, d_in=12, d_sae=50, further=2, theta=0.3, width=0.4, groups=1, weighed=False):
    """x, the four weights, a gate and what further rounds take, in float64."""
    generator = torch.Generator().manual_seed(n)

    def random(*sizes):
        return torch.rand(*sizes, generator=generator, dtype=torch.float64)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    W_dec = torch.nn.functional.normalize(normal(d_sae, d_in))
    W_enc = W_dec.t().clone() + 0.1 * normal(d_in, d_sae)
    made = RationalGate.from_fit(
        fit_gate("ramp", (3, 2)), d_sae, form="gated", groups=groups, input_scale=width,
        threshold=theta + 0.1 * random(d_sae).float(),
    )  # fmt: skip
    gate = GateTensors(*(one.detach().double() for one in made.tensors()))
    more = RoundTensors(
        0.3 + 0.2 * random(further, d_sae), 0.7 + 0.2 * random(further, d_sae), 0.6 + 0.2 * random(further, d_sae),
        theta + 0.2 * random(further, d_sae), 1 + 0.3 * random(further + 1, d_sae), 1 + 0.1 * random(d_sae),
        torch.tensor(1e-3, dtype=torch.float64), 0.3 + random(d_in) if weighed else None,
    )  # fmt: skip
    return [normal(n, d_in), W_enc, 0.1 * random(d_sae), W_dec, 0.1 * random(d_in)], gate, more


def dense(code, n, d_sae):
    place = code.there.tokens * d_sae + code.there.features
    return code.values.new_zeros(n * d_sae).index_put((place,), code.values).view(n, d_sae)


def results(function, inputs, gate, more, spec=SPEC, frozen=(), **options):
    """Code, residual, sums, and the gradient of everything under one random loss that asks for all of them; `frozen`
    are places among x, the weights, the gate's tensors and the rounds' that have none."""
    parts = [*inputs, *gate, *(one for one in more if one is not None)]
    leaves = [one.detach().clone().requires_grad_(place not in frozen) for place, one in enumerate(parts)]
    x, *weights = leaves[:5]
    gate, more = GateTensors(*leaves[5:12]), RoundTensors(*leaves[12:])
    found = function(x, *weights, gate, spec, more, **options)
    n, d_sae = len(x), len(weights[2])
    z = found.z if function is rounds.reference else dense(found, n, d_sae)
    residual = x - weights[3] - z @ weights[2] if function is rounds.reference else found.residual
    generator = torch.Generator().manual_seed(1)
    of_z, of_sums = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((n, d_sae), (2, d_sae)))
    loss = (z * of_z).sum() + residual.square().sum() + (torch.stack([found.counts, found.l1]) * of_sums).sum()
    wanted = [one for place, one in enumerate(leaves) if place not in frozen]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [z, residual, found.counts, found.l1], grads


CASES = {
    "three rounds": {},
    "two": {"further": 1},
    "six": {"further": 5},
    "one token, one feature": {"n": 1, "d_sae": 1},
    "no tokens": {"n": 0},
    "ragged": {"n": 129, "d_in": 33, "d_sae": 101},
    "all are candidates": {"theta": 0.0, "width": 50.0},
    "none is active": {"theta": 50.0},
    "coefficients per feature": {"groups": 50},
    "weighed dimensions": {"weighed": True},
}


def same(one, two):
    """Equal to rounding; None is a gradient of zeros."""
    if one is None or two is None:
        return not any(given is not None and bool(given.any()) for given in (one, two))
    return torch.allclose(one, two, rtol=1e-9, atol=1e-9 * float(one.detach().abs().sum()))


@pytest.mark.parametrize("name", CASES)
def test_entries_are_the_reference_and_so_are_all_gradients(name):
    inputs, gate, more = case(**CASES[name])
    wanted, by_autograd = results(rounds.reference, inputs, gate, more)
    found, gradients = results(rounds.on_entries, inputs, gate, more)
    for one, two in zip((*wanted, *by_autograd), (*found, *gradients), strict=True):
        assert same(one, two)
    if "none" not in name and len(inputs[0]) > 1:
        assert 0.02 < float((wanted[0] != 0).double().mean()) < 0.9


@pytest.mark.parametrize("spec", [
    GateSpec(3, 2, "gated", backward="soft"), GateSpec(3, 2, "gated", backward="rational", amplitude="identity"),
])  # fmt: skip
def test_every_gated_gate(spec):
    inputs, gate, more = case()
    (z, *_), by_autograd = results(rounds.reference, inputs, gate, more, spec)
    (own, *_), gradients = results(rounds.on_entries, inputs, gate, more, spec)
    assert torch.allclose(z, own)
    for one, two in zip(by_autograd, gradients, strict=True):
        assert same(one, two)


# As `train` has it: x and the gate's a, b, centre, C_in and C_out are constants.
CONSTANT = (0, 5, 6, 7, 8, 9, 11)


@pytest.mark.parametrize("spec", [
    SPEC, GateSpec(3, 2, "gated", backward="soft"),
    GateSpec(3, 2, "gated", backward="rational", amplitude="identity"),
    GateSpec(3, 2, "gated", backward="soft", amplitude="identity"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["three rounds", "ragged", "all are candidates", "coefficients per feature",
                                  "weighed dimensions"])  # fmt: skip
def test_with_constant_coefficients(name, spec):
    inputs, gate, more = case(**CASES[name])
    wanted, by_autograd = results(rounds.reference, inputs, gate, more, spec, CONSTANT)
    found, gradients = results(rounds.on_entries, inputs, gate, more, spec, CONSTANT)
    for one, two in zip((*wanted, *by_autograd), (*found, *gradients), strict=True):
        assert same(one, two)


@pytest.mark.parametrize("frozen", [(), CONSTANT], ids=["all", "as trained"])
@pytest.mark.parametrize("engine", ["compiled", "tiled"])
def test_float32_is_float64_to_rounding(engine, frozen, monkeypatch):
    if engine == "tiled":
        monkeypatch.setenv("RSAE_CPU_ENGINE", engine)
    inputs, gate, more = case(n=129, d_in=40, d_sae=101)
    truth, by_autograd = results(rounds.reference, inputs, gate, more, frozen=frozen)
    narrow = [one.float() for one in inputs]
    gate, more = GateTensors(*(one.float() for one in gate)), more.to(torch.float32)
    found, gradients = results(rounds.on_entries, narrow, gate, more, frozen=frozen)
    assert torch.equal(found[0] != 0, truth[0] != 0)  # else the rest says nothing
    for one, two in zip((*found, *gradients), (*truth, *by_autograd), strict=True):
        if one is None or two is None:
            assert not any(given is not None and bool(given.any()) for given in (one, two))
        else:
            assert float((one - two).detach().norm()) <= 1e-4 * float(two.detach().norm())


def test_screening_is_left_out_where_it_is_not_wanted(monkeypatch):
    inputs, gate, more = case()
    asked = []
    found = rounds.find_entries
    monkeypatch.setattr(rounds, "find_entries", lambda *a, **k: asked.append(k["screened"]) or found(*a, **k))
    for options in ({}, {"screened": False}):
        rounds.on_entries(*inputs, gate, SPEC, more, **options)
    assert asked == [True, False]


def test_the_gradient_is_that_of_finite_differences_where_no_mask_changes():
    inputs, gate, more = case(n=3, d_in=4, d_sae=8)
    spec = GateSpec(3, 2, "gated", backward="soft")

    def loss(eta, W_dec):
        code = rounds.on_entries(inputs[0], inputs[1], inputs[2], W_dec, inputs[4], gate, spec, more._replace(eta=eta))
        return code.residual.square().sum() + code.values.sum()

    leaves = [more.eta.clone().requires_grad_(), inputs[3].clone().requires_grad_()]
    assert torch.autograd.gradcheck(loss, leaves, eps=1e-7, atol=1e-5)


def test_codes_are_not_negative_and_counts_are_of_what_is_not_zero():
    inputs, gate, more = case(n=200, theta=0.05)
    more = more._replace(p=3 * more.p, eta=2 * more.eta)
    code = rounds.on_entries(*inputs, gate, SPEC, more)
    z = dense(code, 200, 50)
    assert bool((z >= 0).all())
    assert torch.equal(code.counts.long(), (z != 0).sum(0))
    assert torch.allclose(code.residual, inputs[0] - inputs[4] - z @ inputs[3])
    # The case is worth something: without the last word a search does make codes negative here.
    assert bool((rounds.reference(*inputs, gate, SPEC, more).counts < _opened(inputs, gate, more)).any())


def _opened(inputs, gate, more):
    walk = rounds.Walk(*inputs, gate, SPEC, more.unit, more.epsilon)
    walk.open(walk.theta)
    for k in range(len(more.p)):
        walk.search(walk.at(more.p[k]))
        if k < len(more.a):
            walk.mix(walk.at(more.a[k]), walk.at(more.b[k]), walk.at(more.eta[k]), walk.correction())
            walk.open(walk.at(more.threshold[k]))
    return torch.bincount(walk.there.features[walk.opened], minlength=50)


def test_the_search_leaves_the_least_error_along_its_line():
    inputs, gate, more = case(further=0)
    walk = rounds.Walk(*inputs, gate, SPEC, more.unit, torch.zeros_like(more.epsilon))
    walk.open(walk.theta)
    before = walk.r - dense_of(walk, walk.z) @ inputs[3]
    walk.search(walk.at(more.p[0]))
    moved = before - walk.e
    assert torch.allclose((moved * walk.e).sum(1), torch.zeros(len(moved), dtype=torch.float64), atol=1e-9)
    assert float(walk.e.square().sum()) < 0.99 * float(before.square().sum())


def dense_of(walk, values):
    z = values.new_zeros(len(walk.r), 50)
    z[walk.there.tokens, walk.there.features] = values
    return z


def test_nan_in_one_token_reaches_that_token_only():
    inputs, gate, more = case()
    clean = dense(rounds.on_entries(*inputs, gate, SPEC, more), 37, 50)
    inputs[0][3, 0] = torch.nan
    for function in (rounds.reference, rounds.on_entries):
        found = function(*inputs, gate, SPEC, more)
        z = found.z if function is rounds.reference else dense(found, 37, 50)
        assert bool(z[3].isnan().all())
        others = torch.arange(37) != 3
        assert torch.allclose(z[others], clean[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_dtype_is_much_further_from_float64_than_the_reference_in_it(dtype):
    inputs, gate, more = case(n=64)
    exact = rounds.reference(*inputs, gate, SPEC, more).z
    narrow = [one.to(dtype) for one in inputs]
    gate, more = GateTensors(*(one.float() for one in gate)), more.to(torch.float32)
    with torch.no_grad():
        plain = rounds.reference(*narrow, gate, SPEC, more).z
        code = rounds.on_entries(*narrow, gate, SPEC, more)
    assert code.values.dtype == torch.float32
    error = [float((one.double() - exact).norm() / exact.norm()) for one in (plain, dense(code, 64, 50))]
    assert error[1] <= 2 * error[0] + 1e-6  # a value rounded across a threshold counts whole, and these are few


def test_rounds_start_from_pre_activations_changed_by_a_hook():
    inputs, gate, more = case()
    h = (inputs[0] - inputs[4]) @ inputs[1] + inputs[2]
    h[:, 7] = 2.0
    wanted = rounds.reference(*inputs, gate, SPEC, more, hidden=h).z
    assert torch.allclose(dense(rounds.on_entries(*inputs, gate, SPEC, more, hidden=h), 37, 50), wanted)
    there, values = rounds.candidates_of(h, gate.threshold)
    assert torch.equal(h[there.tokens, there.features], values)


def test_what_has_no_candidates_is_refused():
    inputs, gate, more = case()
    for spec in (GateSpec(3, 2), GateSpec(3, 2, "gated", domain="free"), GateSpec(3, 2, "gated", hard=False)):
        for function in (rounds.reference, rounds.on_entries):
            with pytest.raises(ConfigError, match="rounds"):
                function(*inputs, gate, spec, more)
