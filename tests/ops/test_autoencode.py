"""The loss in pieces, against the reference under autograd: values, every gradient, memory, and what is refused."""

import dataclasses
import itertools

import pytest
import torch
from counting import LiveBytes
from encode_cases import KINDS, D, F, N, inputs, relative
from torch.utils.flop_counter import FlopCounterMode

from rsae_triton.common.errors import ConfigError, ShapeError
from rsae_triton.ops import reference
from rsae_triton.ops.autoencode import Way, rational_autoencode
from rsae_triton.ops.encode import settings
from rsae_triton.ops.pieces import run as autoencode_in_pieces
from rsae_triton.ops.reference import GateSpec, GateTensors
from rsae_triton.ops.step import Step
from rsae_triton.ops.workspace import StepMemory

WEIGHTS = {"l1_weight": 0.3, "l0_weight": 0.2}
ENGINE = pytest.mark.usefixtures("tiled_on_one_thread")
# The tiled engine's buffers: 13 of 30720 numbers.
SCRATCH = 13 * 30720
PIECES = [(None, None), (16, None), (None, 7), (10, 5)]
NAMES = [
    "total",
    "mse",
    "l1",
    "l0",
    "counts",
    "x_hat",
    "x",
    "W_enc",
    "b_enc",
    "W_dec",
    "b_dec",
    *GateTensors._fields[:6],
]


def leaves_of(p, q, sets, dtype=torch.float64, tokens=N):
    """x, W_enc, b_enc, W_dec, b_dec and the gate's first six tensors, all requiring gradients; activity."""
    (x, W_enc, b_enc, b_dec, *gate), activity = inputs(p, q, sets, tokens=tokens)
    W_dec = torch.randn(F, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    rounded = [one.to(dtype) for one in (x, W_enc, b_enc, W_dec, b_dec)]
    exact = torch.promote_types(dtype, torch.float32)
    return [one.requires_grad_() for one in (*rounded, *(one.to(exact) for one in gate))], activity.to(exact)


def eager(leaves, activity, spec, subtract=True, l1_weight=0.0, l0_weight=0.0):
    """The same loss as recipes.losses has it, in plain PyTorch."""
    x, W_enc, b_enc, W_dec, b_dec, *gate = leaves
    z, counts, _ = reference.encode(x, W_enc, b_enc, b_dec if subtract else None, GateTensors(*gate, activity), spec)
    x_hat = z @ W_dec + b_dec
    mse = (x - x_hat).square().sum(-1).mean()
    l1, l0 = (z.abs() @ W_dec.norm(dim=1)).mean(), counts.sum() / len(x)
    return mse + l1_weight * l1 + l0_weight * l0, mse, l1, l0, counts, x_hat


def ours(leaves, activity, spec, subtract=True, backend="cpu", pieces=(None, None), **weights):
    x, W_enc, b_enc, W_dec, b_dec, *gate = leaves
    return rational_autoencode(
        x, W_enc, b_enc, W_dec, b_dec, GateTensors(*gate, activity), spec, **weights, apply_b_dec_to_input=subtract,
        chunk_tokens=pieces[0], chunk_features=pieces[1], backend=backend,
    )  # fmt: skip


def values_and_gradients(result, leaves):
    gradients = torch.autograd.grad(result[0], leaves, allow_unused=True, materialize_grads=True)
    return [*(one.detach() for one in result[:6]), *gradients]


def clear_of_steps(leaves, activity, spec, margin):
    """The first N tokens on which no pre-activation or code is within `margin` of where the gate jumps, so that
    rounding decides nothing."""
    x, W_enc, b_enc, _, b_dec, *gate = (one.detach() for one in leaves)
    h = (x - b_dec) @ W_enc + b_enc
    z, _ = reference.rational_gate(h, GateTensors(*gate, activity), dataclasses.replace(spec, hard=False))
    gap = (h - gate[5]).abs() if spec.form == "gated" else (z.abs() - activity).abs()
    clear = (gap.amin(1) > margin).nonzero().squeeze(1)[:N]
    assert len(clear) == N
    return [x[clear].requires_grad_(), *leaves[1:]]


def check(kind, p, q, sets, backend, dtype, tolerance, pieces, subtract=True, domain="clamp", slack=1.5):
    form, amplitude, hard, backward = kind
    spec = GateSpec(p, q, form, domain, amplitude, hard, backward)
    leaves, activity = leaves_of(p, q, sets, dtype, tokens=N if dtype == torch.float64 else 60 * N)
    if dtype != torch.float64:
        leaves = clear_of_steps(leaves, activity, spec, 1e-4 if dtype == torch.float32 else 0.02)
    wide = [one.detach().double().requires_grad_() for one in leaves]
    truth = values_and_gradients(eager(wide, activity.double(), spec, subtract, **WEIGHTS), wide)
    same = values_and_gradients(eager(leaves, activity, spec, subtract, **WEIGHTS), leaves)
    found = values_and_gradients(ours(leaves, activity, spec, subtract, backend, pieces, **WEIGHTS), leaves)
    for name, value, torchs, true in zip(NAMES, found, same, truth, strict=True):
        assert value.shape == true.shape, name
        assert relative(value, true) <= slack * relative(torchs, true) + tolerance, (name, spec, pieces)


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient_is_exact_in_float64(kind, pieces):
    for sets, domain, backend in ((1, "clamp", "cpu"), (F, "free", "cpu"), (F, "clamp", "eager")):
        check(kind, 3, 2, sets, backend, torch.float64, 1e-12, pieces, domain=domain)
    check(kind, 0, 0, 1, "cpu", torch.float64, 1e-12, pieces, subtract=False)
    check(kind, 9, 8, F, "cpu", torch.float64, 1e-11, pieces, subtract=False)


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_accurate_as_eager(dtype, pieces):
    for kind in (KINDS[0], KINDS[4]):
        check(kind, 3, 2, 1, "cpu", dtype, 1e-5 if dtype == torch.float32 else 1e-2, pieces)


@pytest.mark.parametrize("pieces", [PIECES[0], (20, 13)])
def test_triton_is_as_accurate_as_eager(pieces):
    for kind, sets in ((KINDS[0], F), (KINDS[4], 1)):
        check(kind, 3, 2, sets, "triton", torch.float32, 1e-5, pieces)


@pytest.fixture
def tiled_on_one_thread(monkeypatch):
    """So that a dispatch mode, which is a thread's own, sees all that is computed."""
    monkeypatch.setenv("RSAE_CPU_ENGINE", "tiled")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def problem(n, d_in, d_sae, p=3, q=2):
    """The arguments of `run` up to the gate, float32, shared direct gate."""
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.randn(d_sae, d_in, generator=generator)
    x = torch.randn(n, d_in, generator=generator)
    one, row = torch.ones(1), torch.zeros(d_sae)
    gate = GateTensors(torch.randn(1, p + 1), torch.rand(1, q), one * 0, one, one, row, row + 0.1)
    return (x, W_dec.t().clone(), row.clone(), W_dec, torch.zeros(d_in), gate, GateSpec(p, q))


def run(arguments, tokens, features, differentiate=True):
    wanted = [False, *[differentiate] * 10]
    step = Step(*arguments, 0.1, 0.0, True, None, None, torch.float32, wanted)
    return autoencode_in_pieces(step, tokens, features, "cpu")


@ENGINE
def test_streamed_memory_does_not_depend_on_d_sae():
    n, d_in, block = 32, 16, 2048
    peaks = {}
    for d_sae in (4096, 16384, 65536):
        arguments = problem(n, d_in, d_sae)
        with LiveBytes() as bytes_, torch.no_grad():
            run(arguments, 0, block)
        assert bytes_.largest <= max(d_in * d_sae, n * block)
        peaks[d_sae] = bytes_.peak
    # Two gradients of the weights' size; counts, l1, norms and gradients per feature: 40 numbers.
    for one, other in itertools.pairwise(peaks):
        assert peaks[other] - peaks[one] <= (other - one) * 4 * (2 * d_in + 40)
    # Two [block, n] pieces, some [n, d_in], scratch.
    assert peaks[4096] <= 4 * (4096 * (2 * d_in + 40) + 2 * block * n + 8 * n * d_in + SCRATCH)


@ENGINE
def test_pieces_of_tokens_hold_only_a_piece_of_the_code():
    n, d_in, d_sae = 512, 16, 4096
    arguments = problem(n, d_in, d_sae)
    peaks = {}
    for tokens in (0, 64):
        with LiveBytes() as bytes_, torch.no_grad():
            run(arguments, tokens, 0)
        peaks[tokens] = bytes_.peak
    with LiveBytes() as bytes_:
        leaves = [one.requires_grad_() for one in (*arguments[:5], *arguments[5][:6])]
        eager(leaves, arguments[5][6], arguments[6], l1_weight=0.1)[0].backward()
    whole, rest = 4 * n * d_sae, 4 * (d_sae * (2 * d_in + 40) + 8 * n * d_in + SCRATCH)
    assert peaks[0] <= 2 * whole + rest
    assert peaks[64] <= 1.1 * (2 * whole / 8 + rest)
    assert bytes_.peak >= 10 * whole


@ENGINE
def test_no_product_more_than_needed():
    """10 n d_in d_sae FLOPs, 12 when streamed, 4 without gradients, 2 more for x's own gradient."""
    n, d_in, d_sae = 96, 24, 160
    arguments = problem(n, d_in, d_sae)
    unit = n * d_in * d_sae
    for tokens, features, differentiate, expected in (
        (0, 0, True, 10),
        (32, 0, True, 10),
        (0, 40, True, 12),
        (32, 40, False, 4),
    ):
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            run(arguments, tokens, features, differentiate)
        assert flops.get_total_flops() == expected * unit
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        autoencode_in_pieces(Step(*arguments, 0.1, 0.0, True, None, None, torch.float32, [True] * 11), 0, 0, "cpu")
    assert flops.get_total_flops() == 12 * unit


def test_without_gradients_nothing_is_differentiated():
    leaves, activity = leaves_of(3, 2, 1, torch.float32)
    with torch.no_grad():
        silent = ours(leaves, activity, GateSpec(3, 2), **WEIGHTS)
    assert not silent.total.requires_grad
    assert torch.equal(silent.total, ours(leaves, activity, GateSpec(3, 2), **WEIGHTS).total.detach())


def test_frozen_parameters_get_no_gradient_and_change_none():
    leaves, activity = leaves_of(3, 2, 1)
    spec = GateSpec(3, 2, "gated", backward="rational")
    full = torch.autograd.grad(ours(leaves, activity, spec, **WEIGHTS).total, leaves, allow_unused=True)
    for k in range(1, len(leaves)):
        if full[k] is None:
            continue
        alone = [one.detach().requires_grad_(place == k) for place, one in enumerate(leaves)]
        ours(alone, activity, spec, **WEIGHTS, pieces=(10, 7)).total.backward()
        assert [one.grad is not None for one in alone] == [place == k for place in range(len(leaves))]
        assert torch.allclose(alone[k].grad, full[k], rtol=1e-9, atol=1e-12)


def test_the_upstream_gradient_scales():
    leaves, activity = leaves_of(3, 2, F)
    once = torch.autograd.grad(ours(leaves, activity, GateSpec(3, 2)).total, leaves, allow_unused=True)
    scaled = torch.autograd.grad(ours(leaves, activity, GateSpec(3, 2)).total * -2.5, leaves, allow_unused=True)
    for one, other in zip(once, scaled, strict=True):
        assert (one is None and other is None) or torch.allclose(one * -2.5, other, rtol=1e-12)


@pytest.mark.parametrize("name", ["mse", "l1", "l0", "counts", "x_hat"])
def test_gradients_of_anything_but_the_total_are_refused(name):
    leaves, activity = leaves_of(3, 2, 1)
    result = ours(leaves, activity, GateSpec(3, 2, "gated"))
    with pytest.raises(ConfigError, match="only `total`"):
        (result.total + getattr(result, name).sum()).backward()


def test_second_passes_are_refused():
    leaves, activity = leaves_of(3, 2, 1)
    total = ours(leaves, activity, GateSpec(3, 2)).total
    total.backward(retain_graph=True)
    with pytest.raises(ConfigError, match="differentiated twice"):
        total.backward()
    with pytest.raises(ConfigError, match="create_graph"):
        torch.autograd.grad(ours(leaves, activity, GateSpec(3, 2)).total, leaves[1], create_graph=True)


def test_no_tokens_give_no_loss_and_zero_gradients():
    leaves, activity = leaves_of(3, 2, 1, tokens=0)
    for pieces in PIECES:
        result = ours(leaves, activity, GateSpec(3, 2, "gated", backward="rational"), pieces=pieces, **WEIGHTS)
        for value in values_and_gradients(result, leaves):
            assert not value.any()
        assert result.x_hat.shape == (0, D)


def test_any_leading_shape_and_strides():
    leaves, activity = leaves_of(3, 2, 1, tokens=24)
    flat = ours(leaves, activity, GateSpec(3, 2), **WEIGHTS)
    x = leaves[0].detach().reshape(2, 3, 4, D).transpose(0, 2)
    shaped = ours([x, *leaves[1:]], activity, GateSpec(3, 2), **WEIGHTS, pieces=(5, 7))
    assert shaped.x_hat.shape == x.shape
    assert torch.allclose(shaped.total, flat.total, rtol=1e-12)
    assert torch.allclose(shaped.x_hat.transpose(0, 2).reshape(24, D), flat.x_hat, rtol=1e-10)


def test_autocast_multiplies_in_its_dtype_and_keeps_float32_gradients():
    leaves, activity = leaves_of(3, 2, 1, torch.float32)
    spec = GateSpec(3, 2, domain="free", hard=False)  # nothing in it jumps
    plain = values_and_gradients(ours(leaves, activity, spec, **WEIGHTS), leaves)
    for pieces in PIECES:
        with torch.autocast("cpu", torch.bfloat16):
            result = ours(leaves, activity, spec, pieces=pieces, **WEIGHTS)
        low = values_and_gradients(result, leaves)
        for name, one, other in zip(NAMES, low, plain, strict=True):
            assert one.dtype == torch.float32, name
            assert relative(one, other.double()) < 0.05, (name, pieces)
        assert not torch.equal(low[0], plain[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"l1_weight": -1.0}, ConfigError, "l1_weight"),
        ({"l0_weight": float("nan")}, ConfigError, "l0_weight"),
        ({"chunk_tokens": 0}, ConfigError, "chunk_tokens"),
        ({"chunk_features": 2.5}, ConfigError, "chunk_features"),
        ({"W_dec": torch.zeros(F, D + 1)}, ShapeError, "W_dec"),
        ({"W_dec": torch.zeros(F, D, dtype=torch.bfloat16)}, ConfigError, "bfloat16"),
        ({"x": torch.zeros(3, D, dtype=torch.int64)}, ConfigError, "floating"),
        ({"backend": "gpu"}, ConfigError, "choose one of"),
    ],
)
def test_bad_input_is_named(change, error, message):
    leaves, activity = leaves_of(3, 2, 1, torch.float32)
    names = ["x", "W_enc", "b_enc", "W_dec", "b_dec"]
    arguments = {
        **dict(zip(names, leaves, strict=False)),
        "gate": GateTensors(*leaves[5:], activity),
        "spec": GateSpec(3, 2),
    }
    with pytest.raises(error, match=message):
        rational_autoencode(**{**arguments, **change})


@pytest.mark.parametrize("sparse", [False, True])
def test_the_operator_passes_opcheck(sparse):
    leaves, activity = leaves_of(3, 2, 1)
    spec = GateSpec(3, 2, "gated", backward="rational") if sparse else GateSpec(3, 2)
    arguments = (
        *leaves,
        activity,
        *settings(spec),
        *Way(16, 0, sparse, True, -1, "cpu"),
        *(0.1, 0.0, True, None, None, torch.float64, [not sparse or k not in (5, 6, 7) for k in range(11)]),
    )
    # "test_aot_dispatch_dynamic" would differentiate every output; only `total` may be.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.rsae.autoencode.default, arguments, test_utils=tests)


@pytest.mark.slow
def test_compiled_without_a_graph_break():
    leaves, activity = leaves_of(3, 2, 1)

    def loss(*leaves):
        return ours(list(leaves), activity, GateSpec(3, 2), pieces=(16, None), **WEIGHTS).total * 2

    expected = torch.autograd.grad(loss(*leaves), leaves, allow_unused=True, materialize_grads=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*leaves), leaves, allow_unused=True, materialize_grads=True)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


@ENGINE
def test_steps_with_shared_memory_compute_the_same_in_the_same_memory():
    """In `train()`, the second step's gradients take the memory of the first one's, and are its own."""
    leaves, activity = leaves_of(3, 2, F, torch.float32, tokens=40)
    spec, matrices = GateSpec(3, 2), (leaves[1], leaves[3])
    batches = [leaves[0].detach(), leaves[0].detach().flip(0) * 1.5]
    fresh = []
    for x in batches:
        total = ours([x, *leaves[1:]], activity, spec, pieces=(16, None), **WEIGHTS).total
        fresh.append(torch.autograd.grad(total, leaves[1:]))
    memory, places = StepMemory(), []
    for x, wanted in zip(batches * 2, fresh * 2, strict=True):
        memory.zero_grad(leaves[1:])
        assert all(one.grad is None for one in leaves[1:])
        with memory:
            total = ours([x, *leaves[1:]], activity, spec, pieces=(16, None), **WEIGHTS).total
        total.backward()
        places.append({one.grad.data_ptr() for one in matrices} | {memory.space.take("h", (F, 16), x).data_ptr()})
        for one, gradient in zip(leaves[1:], wanted, strict=True):
            assert torch.equal(one.grad, gradient)
    assert len(set.union(*places)) == 3
    # A second backward pass before zero_grad adds to the first one's, in memory of its own.
    with memory:
        total = ours([batches[0], *leaves[1:]], activity, spec, pieces=(16, None), **WEIGHTS).total
    total.backward()
    assert torch.allclose(leaves[3].grad, fresh[0][2] + fresh[1][2], atol=1e-6)
    memory.zero_grad(leaves[1:], keep=False)
    assert leaves[3].grad is None
    assert not memory._spare


def test_gradients_that_are_views_or_elsewhere_are_left_alone():
    memory, base = StepMemory(), torch.zeros(8, 6)
    whole, part = (torch.nn.Parameter(torch.ones(4, 6)) for _ in range(2))
    whole.grad, part.grad = torch.ones(4, 6), base[:4]
    memory.zero_grad([part])
    assert memory.gradient(part, torch.float32).data_ptr() != base.data_ptr()
    memory.zero_grad([whole])
    assert memory.gradient(whole, torch.float64).dtype == torch.float64
    place = memory.gradient(whole, torch.float32)
    assert memory.gradient(whole, torch.float32).data_ptr() != place.data_ptr()
