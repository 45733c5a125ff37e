"""The sparse step by Triton kernels against its sibling of PyTorch's operations, and against the dense step."""

import pytest
import torch

from rsae_triton.ops import pieces, support, support_triton
from rsae_triton.ops.across import Across
from rsae_triton.ops.reference import GateSpec, GateTensors
from rsae_triton.ops.step import Step
from rsae_triton.ops.workspace import StepMemory

N, D_IN, D_SAE = 14, 6, 33
NAMES = ("total", "mse", "l1", "l0", "counts", "x_hat", "dx", "dW_enc", "db_enc", "dW_dec", "db_dec", "da", "db",
         "dcentre", "dinput_scale", "doutput_scale", "dthreshold")  # fmt: skip
WANTED = [False, True, True, True, True, False, False, False, False, True, True]
SPEC = GateSpec(3, 2, form="gated", backward="rational")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def given(sets=1, seed=0):
    """x, W_enc (feature by feature in memory), b_enc, W_dec, b_dec and a gate; a fifth of all places in its support.

    All numbers of the encoder's product are halves and quarters, so that 16 bits hold h as well: no decision depends on
    the dtype.
    """
    generator = torch.Generator().manual_seed(seed)

    def steps(size, *shape):
        return size * torch.randint(-2, 3, shape, generator=generator)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator)

    W_dec = steps(0.5, D_SAE, D_IN)
    gate = GateTensors(
        a=uniform(-0.5, 0.5, sets, 4), b=uniform(-0.5, 0.5, sets, 2), centre=uniform(-0.1, 0.1, sets),
        input_scale=uniform(0.3, 0.5, sets), output_scale=torch.ones(sets), threshold=uniform(1.1, 1.4, D_SAE),
        activity_threshold=torch.zeros(D_SAE),
    )  # fmt: skip
    return steps(0.5, N, D_IN), W_dec.clone().t(), steps(0.25, D_SAE), W_dec, steps(0.5, D_IN), gate


def errors(found, truth):
    """Largest difference over the largest value, by name."""
    assert len(found) == len(truth) == len(NAMES)
    made = {}
    for name, one, other in zip(NAMES, found, truth, strict=True):
        assert one.shape == other.shape, name
        if one.numel():
            difference = (one.double() - other.double()).abs().max()
            made[name] = float(difference / other.abs().max().clamp(min=1e-3))
    return made


def close(found, truth):
    assert max(errors(found, truth).values()) <= 1e-5


def step(inputs, device, dtype=torch.float32, capacity=N * D_SAE, across=None, **options):
    """All results, on the CPU."""
    on = [
        GateTensors(*(t.to(device) for t in one)) if isinstance(one, GateTensors) else one.to(device) for one in inputs
    ]
    spec, weights, subtract, target, scale = settings(**options)
    target, scale = (None if one is None else one.to(device) for one in (target, scale))
    made = Step(*on, spec, *weights, subtract, target, scale, dtype, WANTED, across)
    results = support_triton.run(made, capacity)
    return [one.cpu() for one in results]


def settings(spec=SPEC, weights=(0.1, 0.2), subtract=True, target=None, scale=None):
    return spec, weights, subtract, target, scale


def without_size(results):
    return *results[:6], *results[7:]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sets", [1, D_SAE])
def test_the_sparse_step_equals_the_dense_step(sets, dtype, device):
    inputs = given(sets)
    double = [
        GateTensors(*(t.double() for t in one)) if isinstance(one, GateTensors) else one.double() for one in inputs
    ]
    dense = pieces.run(Step(*double, SPEC, 0.1, 0.2, True, None, None, torch.float64, WANTED), 0, 0, "eager")
    found = errors(without_size(step(inputs, device, dtype)), dense)
    assert max(found.values()) <= TOLERANCE[dtype], found


@pytest.mark.parametrize(
    "options",
    [{"weights": (0.0, 0.0)}, {"subtract": False}, {"target": True, "scale": True},
     {"spec": GateSpec(3, 2, form="gated", backward="soft", amplitude="identity")}],
    ids=str,
)  # fmt: skip
def test_the_kernels_step_equals_the_pytorch_step(options, device):
    inputs = given()
    if "target" in options:
        options = {"target": inputs[0] * 2, "scale": torch.linspace(0.5, 2, N)[:, None]}
    results = step(inputs, device, **options)
    spec, weights, *rest = settings(**options)
    sibling = support.run(Step(*inputs, spec, *weights, *rest, torch.float32, WANTED))
    assert results[6] == sibling[6] > 0
    close(without_size(results), without_size(sibling))


def test_activations_and_targets_may_lie_in_any_order(device):
    inputs = given()
    target = inputs[0] * 2
    whole = without_size(step(inputs, device, target=target))
    strided = [one.t().contiguous().t() for one in (inputs[0], target)]
    close(without_size(step((strided[0], *inputs[1:]), device, target=strided[1])), whole)


def test_norms_are_remembered_until_the_matrix_changes():
    memory, W_dec = StepMemory(), torch.randn(5, 3)
    torch.testing.assert_close(memory.norms(W_dec), W_dec.norm(dim=1))
    memory.know_norms(W_dec, torch.full((5, 1), 2.0))
    assert memory.norms(W_dec).tolist() == [2.0] * 5
    W_dec.mul_(3)
    torch.testing.assert_close(memory.norms(W_dec), W_dec.norm(dim=1))


@pytest.mark.parametrize("weights", [(0.0, 0.2), (0.3, 0.0)])
def test_the_norms_of_the_gradients_come_with_them(weights, device):
    inputs, memory = given(), StepMemory()
    memory.whole = True
    with memory:
        found = dict(zip(NAMES, without_size(step(inputs, device, weights=weights)), strict=True))
    made, W_dec = memory.made, inputs[3]
    radial = (found["dW_dec"] * W_dec).sum(1, keepdim=True) / W_dec.square().sum(1, keepdim=True) * W_dec
    torch.testing.assert_close(made.encoder.cpu(), found["dW_enc"].square().sum())
    torch.testing.assert_close(made.decoder.cpu(), found["dW_dec"].square().sum())
    torch.testing.assert_close(made.without_radial.cpu(), (found["dW_dec"] - radial).square().sum())
    assert float(radial.norm()) > 0.1
    memory.zero_grad([])
    assert memory.made is None


def test_the_size_says_when_the_capacity_was_too_small(device):
    inputs = given()
    whole = step(inputs, device)
    size = int(whole[6])
    short = step(inputs, device, capacity=size - 1)
    assert short[6] == size
    for name, one in zip(NAMES, without_size(short), strict=True):
        if name in ("total", "mse", "x_hat", "db_dec"):
            assert one.isnan().all(), name
        if name.startswith("dW"):
            assert one.isnan().any(), name
    close(without_size(step(inputs, device, capacity=size)), without_size(whole))
    assert support_triton.capacity_for(4096 * 24576) == 1258496
    assert support_triton.capacity_for(1) == 1024


def test_the_sparse_step_gives_the_same_bits_every_time(device):
    first, again = (step(given(D_SAE), device) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_what_it_cannot_make_is_known():
    assert support_triton.can_run(SPEC, WANTED)
    for place in (0, 5, 8):  # x, a and the input scale
        assert not support_triton.can_run(SPEC, [k == place or want for k, want in enumerate(WANTED)])
    for other in ({}, {"form": "gated", "domain": "free"}, {"form": "gated", "hard": False}):
        assert not support_triton.can_run(GateSpec(3, 2, **other), WANTED)


def test_two_processes_that_share_the_features_make_the_whole_step(device):
    """What crosses is x_hat alone."""
    x, W_enc, b_enc, W_dec, b_dec, gate = inputs = given(D_SAE)
    whole = dict(zip(NAMES, without_size(step(inputs, device)), strict=True))
    sums, parts = [], []
    for together in (lambda part: sums.append(part.clone()) or part, lambda part: sums[0] + sums[1]):
        for first, own in ((True, slice(0, 20)), (False, slice(20, D_SAE))):
            half = (x, W_enc[:, own], b_enc[own], W_dec[own], b_dec, GateTensors(*(one[own] for one in gate)))
            results = step(half, device, across=Across(together, first))
            parts.append(dict(zip(NAMES, without_size(results), strict=True)))
    one, other = parts[2:]
    for name in ("mse", "x_hat"):
        torch.testing.assert_close(one[name], other[name])
        torch.testing.assert_close(one[name], whole[name])
    for name in ("l1", "l0", "db_dec"):
        torch.testing.assert_close(one[name] + other[name], whole[name])
    for name in ("counts", "db_enc", "dW_dec", "dthreshold"):
        torch.testing.assert_close(torch.cat([one[name], other[name]]), whole[name])
    torch.testing.assert_close(torch.cat([one["dW_enc"], other["dW_enc"]], 1), whole["dW_enc"])


def test_a_transcoder_writes_in_another_width_than_it_reads(device):
    x, W_enc, b_enc, W_dec, b_dec, gate = given()
    target = torch.linspace(-1, 1, N * 4).reshape(N, 4)
    inputs = (x, W_enc, b_enc, W_dec[:, :4].contiguous(), b_dec[:4], gate)
    options = {"target": target, "subtract": False}
    results = step(inputs, device, **options)
    spec, weights, *rest = settings(**options)
    sibling = support.run(Step(*inputs, spec, *weights, *rest, torch.float32, WANTED))
    close(without_size(results), without_size(sibling))
