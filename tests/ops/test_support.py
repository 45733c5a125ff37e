"""The sparse way of `rational_autoencode` against the reference under autograd in float64: values, every gradient,
where it gives up and what it refuses."""

import pytest
import torch
from encode_cases import D, F, inputs, relative
from torch.utils.flop_counter import FlopCounterMode

from rsae_triton.common.errors import ConfigError
from rsae_triton.ops import native, reference
from rsae_triton.ops.autoencode import rational_autoencode
from rsae_triton.ops.reference import GateSpec, GateTensors
from rsae_triton.ops.workspace import StepMemory

KINDS = [("rational", "rational"), ("rational", "soft"), ("identity", "rational"), ("identity", "soft")]
# a, b, centre and C_out; the latter is of direct gates.
FROZEN = (5, 6, 7, 9)
NAMES = ("total", "mse", "l1", "l0", "counts", "x_hat", "x", "W_enc", "b_enc", "W_dec", "b_dec", "input_scale", "theta")
LEVELS = {"sparse": 1.5, "dense": 0.0, "none": 99.0, "all": -99.0}


@pytest.fixture(params=["compiled", "tiled"])
def engine(request, monkeypatch):
    monkeypatch.setenv("RSAE_CPU_ENGINE", "tiled" if request.param == "tiled" else "")
    if request.param != "tiled" and native.library() is None:
        pytest.skip("no C++ compiler")
    return request.param


def leaves_of(dtype=torch.float64, *, sets=1, tokens=37, level=1.5, features=F, seed=0):
    (x, W_enc, b_enc, b_dec, *gate), activity = inputs(3, 2, sets, seed, tokens=tokens)
    W_dec = torch.randn(F, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    gate[3], gate[5] = gate[3] / 3, gate[5] + level
    tensors = [x, W_enc[:, :features], b_enc[:features], W_dec[:features], b_dec, *gate[:5], gate[5][:features]]
    tensors[1] = tensors[1].t().contiguous().t()
    exact = torch.promote_types(dtype, torch.float32)
    leaves = [one.to(dtype if k < 5 else exact).requires_grad_(k not in FROZEN) for k, one in enumerate(tensors)]
    return leaves, activity[:features].to(exact)


def trained(leaves):
    return [one for one in leaves if one.requires_grad]


def truth_of(leaves, activity, spec, subtract=True, target=None, scale=None, l1_weight=0.0, l0_weight=0.0):
    own = [one.detach().double().requires_grad_(one.requires_grad) for one in leaves]
    x, W_enc, b_enc, W_dec, b_dec, *gate = own
    z, counts, _ = reference.encode(
        x, W_enc, b_enc, b_dec if subtract else None, GateTensors(*gate, activity.double()), spec
    )
    x_hat = z @ W_dec + b_dec
    residual = (x if target is None else target.double()) - x_hat
    if scale is not None:
        residual = residual * scale.double().reshape(-1, 1)
    n = max(len(x), 1)
    mse, l1 = residual.square().sum() / n, (z.abs() @ W_dec.norm(dim=1)).sum() / n
    l0 = counts.sum() / n
    total = mse + l1_weight * l1 + l0_weight * l0
    gradients = torch.autograd.grad(total, trained(own), allow_unused=True, materialize_grads=True)
    return [*(one.detach() for one in (total, mse, l1, l0, counts, x_hat)), *gradients]


def ours(leaves, activity, spec, subtract=True, target=None, scale=None, memory="sparse", **options):
    x, W_enc, b_enc, W_dec, b_dec, *gate = leaves
    result = rational_autoencode(
        x, W_enc, b_enc, W_dec, b_dec, GateTensors(*gate, activity), spec, memory=memory, apply_b_dec_to_input=subtract,
        target=target, residual_scale=scale, **options,
    )  # fmt: skip
    gradients = torch.autograd.grad(result.total, trained(leaves), allow_unused=True, materialize_grads=True)
    return result, [*(one.detach() for one in result[:6]), *gradients]


WEIGHTS = {"l1_weight": 0.3, "l0_weight": 0.2}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_exact_in_float64(kind, level, engine):
    spec = GateSpec(3, 2, "gated", "clamp", kind[0], True, kind[1])
    for sets, subtract, weights in ((1, True, WEIGHTS), (F, False, WEIGHTS), (1, True, {})):
        leaves, activity = leaves_of(sets=sets, level=LEVELS[level])
        truth = truth_of(leaves, activity, spec, subtract, **weights)
        result, found = ours(leaves, activity, spec, subtract, most_entries=10**9, **weights)
        assert int(result.entries) == {"none": 0, "all": 37 * F}.get(level, int(result.entries))
        for name, value, true in zip(NAMES, found, truth, strict=True):
            assert value.shape == true.shape, name
            assert relative(value, true) < 1e-12, (name, spec)


@pytest.mark.parametrize("tokens", [1, 0, 200])
@pytest.mark.parametrize("features", [1, F])
def test_one_token_one_feature_none_at_all(tokens, features, engine):
    spec = GateSpec(3, 2, "gated", backward="rational")
    leaves, activity = leaves_of(tokens=tokens, features=features, level=0.5)
    truth = truth_of(leaves, activity, spec, **WEIGHTS)
    _, found = ours(leaves, activity, spec, **WEIGHTS)
    for name, value, true in zip(NAMES, found, truth, strict=True):
        assert relative(value, true) < 1e-12, name


def test_normalised_inputs_and_thresholds_of_zero(engine):
    spec = GateSpec(3, 2, "gated", backward="rational")
    leaves, activity = leaves_of(level=0.4)
    leaves[10] = torch.zeros_like(leaves[10]).requires_grad_()
    target, scale = torch.randn(37, D, dtype=torch.float64), torch.rand(37, 1, dtype=torch.float64)
    truth = truth_of(leaves, activity, spec, target=target, scale=scale, **WEIGHTS)
    _, found = ours(leaves, activity, spec, target=target, scale=scale, most_entries=10**9, **WEIGHTS)
    for name, value, true in zip(NAMES, found, truth, strict=True):
        assert relative(value, true) < 1e-12, name


def clear_of_steps(leaves, tokens):
    """Tokens on which rounding decides nothing."""
    x, W_enc, b_enc, _, b_dec, *gate = (one.detach() for one in leaves)
    h = (x - b_dec) @ W_enc + b_enc
    gap = torch.minimum((h - gate[5]).abs(), (h - gate[5] + gate[3]).abs())
    clear = (gap.amin(1) > 1e-4).nonzero().squeeze(1)[:tokens]
    assert len(clear) == tokens
    return [x[clear].requires_grad_(), *leaves[1:]]


def test_float32_is_as_accurate_as_the_dense_way(engine):
    spec = GateSpec(3, 2, "gated", backward="rational")
    leaves, activity = leaves_of(torch.float32, tokens=400)
    leaves = clear_of_steps(leaves, 200)
    truth = truth_of(leaves, activity, spec, **WEIGHTS)
    _, dense = ours(leaves, activity, spec, memory="dense", **WEIGHTS)
    for exact in (True, False):
        _, found = ours(leaves, activity, spec, exact=exact, **WEIGHTS)
        for name, value, other, true in zip(NAMES, found, dense, truth, strict=True):
            assert relative(value, true) <= 2 * relative(other, true) + 1e-6, (name, exact)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_under_autocast_it_is_as_near_as_the_dense_way(low, engine):
    spec = GateSpec(3, 2, "gated", backward="rational")
    leaves, activity = leaves_of(torch.float32, tokens=400)
    truth = truth_of(leaves, activity, spec, **WEIGHTS)
    with torch.autocast("cpu", low):
        _, found = ours(leaves, activity, spec, **WEIGHTS)
        _, dense = ours(leaves, activity, spec, memory="dense", **WEIGHTS)
    for name, value, other, true in zip(NAMES, found, dense, truth, strict=True):
        assert relative(value, true) <= 1.5 * relative(other, true) + 2e-2, name


def test_a_support_that_is_too_large_goes_the_dense_way():
    spec = GateSpec(3, 2, "gated", backward="rational")
    leaves, activity = leaves_of(level=0.2)
    result, _ = ours(leaves, activity, spec, most_entries=10**9)
    count = int(result.entries)
    again, found = ours(leaves, activity, spec, most_entries=count - 1)
    assert int(again.entries) == -1
    for name, value, true in zip(NAMES, found, truth_of(leaves, activity, spec), strict=True):
        assert relative(value, true) < 1e-12, name
    assert int(ours(leaves, activity, spec, most_entries=count)[0].entries) == count


def test_nan_in_one_token_reaches_that_token_only(engine):
    spec = GateSpec(3, 2, "gated", backward="rational")
    leaves, activity = leaves_of(torch.float32)
    clean = ours(leaves, activity, spec)[0]
    with torch.no_grad():
        leaves[0][4, 2] = torch.nan
    result = ours(leaves, activity, spec)[0]
    bad = result.x_hat.isnan().any(1)
    assert bad.nonzero().flatten().tolist() == [4]
    assert result.total.isnan()
    assert torch.equal(result.x_hat[~bad], clean.x_hat[~bad])


def test_the_same_bits_every_time_and_in_memory_that_was_used_before(engine):
    spec = GateSpec(3, 2, "gated", backward="rational")
    leaves, activity = leaves_of(torch.float32, tokens=130)
    names = (1, 3)
    first = ours(leaves, activity, spec, **WEIGHTS)[1]
    memory = StepMemory()
    for _ in range(3):
        memory.zero_grad(leaves)
        with memory:
            x, W_enc, b_enc, W_dec, b_dec, *gate = leaves
            loss = rational_autoencode(
                x, W_enc, b_enc, W_dec, b_dec, GateTensors(*gate, activity), spec, memory="sparse", **WEIGHTS
            ).total
        loss.backward()
        places = [leaves[k].grad.data_ptr() for k in names]
        for value, leaf in zip(first[6:], trained(leaves), strict=True):
            assert torch.equal(value, leaf.grad)
            assert leaf.grad.stride() == leaf.stride()
    memory.zero_grad(leaves)
    with memory:
        loss = rational_autoencode(
            x, W_enc, b_enc, W_dec, b_dec, GateTensors(*gate, activity), spec, memory="sparse", **WEIGHTS
        ).total
    loss.backward()
    assert {leaves[k].grad.data_ptr() for k in names} == set(places)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"form": "direct"}, {}, "gated"),
        ({"domain": "free"}, {}, "clamp"),
        ({"hard": False}, {}, "hard"),
        ({}, {"memory": "thin"}, "choose one of dense, sparse"),
        ({}, {"most_entries": -1}, "most_entries"),
    ],
)
def test_what_has_no_support_is_refused(change, options, message):
    spec = GateSpec(3, 2, **{"form": "gated", "backward": "rational" if change.get("hard", True) else "soft", **change})
    leaves, activity = leaves_of()
    with pytest.raises(ConfigError, match=message):
        ours(leaves, activity, spec, **options)


def test_trained_coefficients_are_refused():
    leaves, activity = leaves_of()
    leaves[5].requires_grad_()
    with pytest.raises(ConfigError, match="freeze alpha"):
        ours(leaves, activity, GateSpec(3, 2, "gated", backward="rational"))


def test_a_sparse_step_counts_the_flops_of_one_product():
    spec = GateSpec(3, 2, "gated", backward="rational")
    leaves, activity = leaves_of(torch.float32)
    with FlopCounterMode(display=False) as flops:
        ours(leaves, activity, spec)
    assert flops.get_total_flops() == 2 * len(leaves[0]) * D * F
