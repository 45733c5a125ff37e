"""Every backend against float64 autograd of the reference, for every differentiable output."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from encode_cases import KINDS, D, F, N, inputs, relative

from rsae_triton.common.errors import ConfigError, ShapeError
from rsae_triton.ops import encode as ops
from rsae_triton.ops import explicit
from rsae_triton.ops.reference import GateSpec, GateTensors, rational_gate

NAMES = ["z", "counts", "l1", "x", "W_enc", "b_enc", "b_dec", *GateTensors._fields[:6]]


def outputs_and_gradients(tensors, activity, spec, backend, dtype):
    """z, counts, l1, and the gradients of a random linear function of them (counts only where they have one)."""
    leaves = [one.to(dtype).requires_grad_() for one in tensors]
    # The gate stays float32 at least, whatever the dtype of the matrix product.
    wide = torch.promote_types(dtype, torch.float32)
    gate = GateTensors(*(one.to(wide) for one in leaves[4:]), activity.to(wide))
    z, counts, l1 = ops.rational_encode(*leaves[:4], gate, spec, backend)
    generator = torch.Generator().manual_seed(9)
    total = (z.double() * torch.randn(z.shape, dtype=torch.float64, generator=generator)).sum()
    total = total + (l1.double() * torch.randn(F, dtype=torch.float64, generator=generator)).sum()
    if spec.form == "gated":
        total = total + (counts.double() * torch.randn(F, dtype=torch.float64, generator=generator)).sum()
    gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [z.detach(), counts.detach(), l1.detach(), *gradients]


def check(spec, sets, backend, dtype, tolerance, tokens=N, slack=1.5):
    """The backend's error must not exceed eager torch's in the same dtype, times `slack`, plus the tolerance."""
    tensors, activity = inputs(spec.p, spec.q, sets, tokens=tokens)
    rounded = [one.to(dtype).double() for one in tensors]
    truth = outputs_and_gradients(rounded, activity, spec, "eager", torch.float64)
    ours = outputs_and_gradients(rounded, activity, spec, backend, dtype)
    eager = outputs_and_gradients(rounded, activity, spec, "eager", dtype)
    for name, value, same, true in zip(NAMES, ours, eager, truth, strict=True):
        assert value.shape == true.shape, name
        assert relative(value, true) <= slack * relative(same, true) + tolerance, (name, spec)


@pytest.mark.parametrize("domain", ["clamp", "free"])
@pytest.mark.parametrize("kind", KINDS)
def test_cpu_gradients_are_exact_in_float64(kind, domain, monkeypatch):
    monkeypatch.setenv("RSAE_CPU_ENGINE", "tiled")
    form, amplitude, hard, backward = kind
    for (p, q), sets in itertools.product([(0, 0), (1, 0), (0, 2), (3, 2), (5, 4), (9, 8), (12, 12)], [1, F]):
        spec = GateSpec(p, q, form, domain, amplitude, hard, backward)
        # Sums of twelfth powers cancel; by how much depends on the CPU's vector units.
        check(spec, sets, "cpu", torch.float64, 1e-12 if max(p, q) < 12 else 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_cpu_is_as_accurate_as_eager(kind, dtype, monkeypatch):
    monkeypatch.setenv("RSAE_CPU_ENGINE", "tiled")
    form, amplitude, hard, backward = kind
    for sets in (1, F):
        spec = GateSpec(5, 4, form, "clamp", amplitude, hard, backward)
        check(spec, sets, "cpu", dtype, 2e-6 if dtype == torch.float32 else 8e-3)


# No processor is like that; `make test-cpus` makes torch believe it, and its compiler then leaves out what it names.
INDUCTOR = pytest.mark.skipif(
    os.environ.get("ATEN_CPU_CAPABILITY") == "default", reason="torch's Inductor writes no C++ without vectors"
)


@INDUCTOR
@pytest.mark.slow
@pytest.mark.parametrize("kind", [KINDS[1], KINDS[4], KINDS[6]])
def test_inductor_engine_agrees(kind, monkeypatch):
    monkeypatch.setenv("RSAE_CPU_ENGINE", "inductor")
    form, amplitude, hard, backward = kind
    spec = GateSpec(3, 2, form, "clamp", amplitude, hard, backward)
    check(spec, 1, "cpu", torch.float32, 2e-6)


@INDUCTOR
@pytest.mark.slow
def test_inductor_engine_in_blocks_of_features_agrees(monkeypatch):
    """Gates with many coefficients are computed in blocks; the last block is a smaller one."""
    from rsae_triton.ops import cpu

    monkeypatch.setenv("RSAE_CPU_ENGINE", "inductor")
    monkeypatch.setattr(cpu, "MANY", 0)
    monkeypatch.setattr(cpu, "BLOCK", 5 * N)
    assert len(cpu._blocks(torch.empty(F, N), GateSpec(3, 2))) > 1
    check(GateSpec(3, 2), F, "cpu", torch.float32, 2e-6)


@INDUCTOR
@pytest.mark.slow
@pytest.mark.parametrize("target", ["new", "in place", "elsewhere"])
def test_inductor_engine_writes_where_it_is_told(target, monkeypatch):
    """In place is the way of every encoder without gradients; the tiled path must not silently stand in."""
    from rsae_triton.ops import cpu, tiles

    monkeypatch.setenv("RSAE_CPU_ENGINE", "inductor")
    monkeypatch.setattr(tiles, "gate_forward", None)
    tensors, activity = inputs(3, 2, 1)
    gate = GateTensors(*(one.float() for one in tensors[4:]), activity.float())
    spec = GateSpec(3, 2, "gated", hard=True)
    h = torch.randn(F, 200, generator=torch.Generator().manual_seed(3))
    truth = explicit.gate_forward(h.clone(), gate, spec)
    out = {"new": None, "in place": h, "elsewhere": torch.empty_like(h)}[target]
    done = cpu.gate_forward(h, gate, spec, out)
    assert out is None or done[0] is out
    for value, expected in zip(done, truth, strict=True):
        torch.testing.assert_close(value, expected)


COMPILED = """
import torch
from rsae_triton.ops import cpu, explicit
from rsae_triton.ops.reference import GateSpec, GateTensors

draw = torch.Generator().manual_seed(3)
h, spec = torch.randn(16, 200, generator=draw), GateSpec(1, 1, "gated", hard=True)
coefficients = (torch.rand(1, n, generator=draw) for n in (2, 1))
gate = GateTensors(*coefficients, *torch.rand(4, 16, generator=draw), torch.zeros(16))
truth = explicit.gate_forward(h.clone(), gate, spec)
for value, expected in zip(cpu.gate_forward(h.clone(), gate, spec, torch.full_like(h, 1e30)), truth, strict=True):
    torch.testing.assert_close(value, expected)
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="a processor of one vector width")
def test_code_compiled_for_one_vector_width_is_not_run_at_another(tmp_path):
    """Two kinds of machine may share a cache on a network's disk."""
    for capability in ("avx512", "avx2"):
        own = {
            "ATEN_CPU_CAPABILITY": capability,
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
            "RSAE_CPU_ENGINE": "inductor",
        }
        done = subprocess.run(
            [sys.executable, "-c", COMPILED],
            env={**os.environ, **own, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert "tiled" not in done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_triton_is_as_accurate_as_eager(kind):
    if not torch.cuda.is_available() and not ops.interpreting():
        pytest.skip("neither a GPU nor TRITON_INTERPRET=1")
    form, amplitude, hard, backward = kind
    for sets, way in ((1, "split"), (F, "fused")):
        spec = GateSpec(3, 2, form, "clamp", amplitude, hard, backward)
        check(spec, sets, f"triton:{way}", torch.float32, 1e-5)


def test_tiles_that_split_the_tokens_sum_the_same(monkeypatch):
    """More tokens than fit one tile: the sums run over several tiles of a row."""
    from rsae_triton.ops import tiles

    monkeypatch.setenv("RSAE_CPU_ENGINE", "tiled")
    monkeypatch.setattr(tiles, "TILE", 64)
    check(GateSpec(3, 2, "direct"), F, "cpu", torch.float64, 1e-12, tokens=201)


def test_two_runs_are_bit_equal(monkeypatch):
    monkeypatch.setenv("RSAE_CPU_ENGINE", "tiled")
    tensors, activity = inputs(3, 2, 1, tokens=5000)
    spec = GateSpec(3, 2, "gated", backward="rational")
    first, second = (outputs_and_gradients(tensors, activity, spec, "cpu", torch.float32) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_no_tokens_give_empty_codes_and_zero_gradients():
    tensors, activity = inputs(3, 2, 1, tokens=0)
    for value in outputs_and_gradients(tensors, activity, GateSpec(3, 2), "cpu", torch.float32)[1:]:
        assert not value.any()


def test_reference_passes_gradcheck():
    """The soft derivative is that of the forward: checked by finite differences, away from the kinks."""
    tensors, activity = inputs(3, 2, F, seed=3)
    for form in ("direct", "gated"):
        spec = GateSpec(3, 2, form, hard=False)
        gate = [one.clone().requires_grad_() for one in tensors[4:]]
        h = torch.randn(5, F, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()

        def code(h, *gate, spec=spec):
            return rational_gate(h, GateTensors(*gate, activity), spec)[0]

        assert torch.autograd.gradcheck(code, (h, *gate), eps=1e-7, atol=1e-5)


def test_double_backward_is_refused():
    tensors, activity = inputs(3, 2, 1)
    leaves = [one.float().requires_grad_() for one in tensors]
    gate = GateTensors(*leaves[4:], activity.float())
    z = ops.rational_encode(*leaves[:4], gate, GateSpec(3, 2), "cpu").z
    (gradient,) = torch.autograd.grad(z.square().sum(), leaves[1], create_graph=True)
    with pytest.raises(ConfigError, match="differentiable once"):
        gradient.sum().backward()


def test_nan_reaches_the_code():
    tensors, activity = inputs(3, 2, 1)
    tensors[0][4] = float("nan")
    gate = GateTensors(*(one.float() for one in tensors[4:]), activity.float())
    z, *_ = ops.rational_encode(*(one.float() for one in tensors[:4]), gate, GateSpec(3, 2, hard=False), "cpu")
    assert bool(z[4].isnan().all())
    assert not bool(z[:4].isnan().any())


def test_saves_only_h():
    """Beside the inputs, one [d_sae, n_tokens] tensor lives until the backward pass; eager keeps many."""
    tensors, activity = inputs(5, 4, 1, tokens=200)
    sizes: dict[str, int] = {}
    for backend in ("cpu", "eager"):
        leaves = [one.float().requires_grad_() for one in tensors]
        gate = GateTensors(*leaves[4:], activity.float())
        large = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, large=large: large.append(t) or t, lambda t: t):
            ops.rational_encode(*leaves[:4], gate, GateSpec(5, 4), backend)
        sizes[backend] = sum(one.numel() == 200 * F for one in large)
    assert sizes["cpu"] == 1
    assert sizes["eager"] >= 10


@pytest.mark.slow
def test_a_compiler_that_fails_is_reported_once(tmp_path):
    """Forward and backward go on with the tiled path; a compiler that is not there is not tried again."""
    code = """
import torch
from rsae_triton import FusedRationalSAE
x = torch.randn(64, 8)
ours = FusedRationalSAE(8, 32, backend="cpu")
for _ in range(3):
    ours(x).square().sum().backward()
eager = FusedRationalSAE(8, 32, backend="eager")
eager.load_state_dict(ours.state_dict())
assert (ours(x) - eager(x)).abs().max() < 1e-5
"""
    broken = {"CXX": "/bin/false", "RSAE_CPU_ENGINE": "inductor", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **broken})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("using the tiled path") == 1


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[4]])
def test_the_operator_passes_opcheck(kind):
    """Schema, fake kernel, registration of the derivative and AOTAutograd with dynamic shapes."""
    form, amplitude, hard, backward = kind
    tensors, activity = inputs(3, 2, 1)
    leaves = [one.requires_grad_() for one in tensors]
    spec = GateSpec(3, 2, form, "clamp", amplitude, hard, backward)
    arguments = (*leaves, activity, *ops.settings(spec), "cpu", torch.float64, True)
    torch.library.opcheck(torch.ops.rsae.encode.default, arguments)


@pytest.mark.slow
@INDUCTOR
def test_compiled_without_a_graph_break_the_module_computes_the_same():
    from rsae_triton import FusedRationalSAE

    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for compiled in (False, True):
        sae = FusedRationalSAE(8, 32, form="gated", backward="rational", generator=torch.Generator().manual_seed(1))
        run = torch.compile(sae, fullgraph=True) if compiled else sae
        out = run(x)
        out.square().sum().backward()
        results.append([out.detach(), *(one.grad for one in sae.parameters())])
    for ours, same in zip(*results, strict=True):
        assert (ours is None) == (same is None)
        assert ours is None or torch.allclose(ours, same, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "eager", "triton:split", "triton:fused"])
def test_any_leading_shape_and_strides(backend):
    tensors, activity = inputs(3, 2, 1, tokens=24)
    x, *others = (one.float() for one in tensors)
    gate, spec = GateTensors(*others[3:], activity.float()), GateSpec(3, 2)
    flat = ops.rational_encode(x, *others[:3], gate, spec, backend)
    strided = x.reshape(2, 3, 4, D).transpose(0, 2)
    W_enc = others[0].t().contiguous().t()
    shaped = ops.rational_encode(strided, W_enc, *others[1:3], gate, spec, backend)
    assert shaped.z.shape == (4, 3, 2, F)
    assert torch.allclose(shaped.z.transpose(0, 2).reshape(24, F), flat.z, atol=1e-5)
    assert torch.allclose(shaped.l1, flat.l1, rtol=1e-4)
    one = ops.rational_encode(x[3], *others[:3], gate, spec, backend)
    assert one.z.shape == (F,)
    assert torch.allclose(one.z, flat.z[3], atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "eager", "triton:split", "triton:fused"])
def test_no_tokens_on_any_backend(backend):
    tensors, activity = inputs(3, 2, 1, tokens=0)
    spec = GateSpec(3, 2, "gated", backward="rational")
    z, *rest = outputs_and_gradients(tensors, activity, spec, backend, torch.float32)
    assert z.shape == (0, F)
    assert not any(bool(one.any()) for one in rest)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_autocast_multiplies_in_its_dtype(backend):
    """z is in the dtype of the product; x - b_dec, the gate and every gradient are not."""
    tensors, activity = inputs(3, 2, 1)
    leaves = [one.float().requires_grad_() for one in tensors]
    gate, spec = GateTensors(*leaves[4:], activity.float()), GateSpec(3, 2, hard=False, domain="free")
    exact = ops.rational_encode(*leaves[:4], gate, spec, backend)
    with torch.autocast("cpu", torch.bfloat16):
        low = ops.rational_encode(*leaves[:4], gate, spec, backend)
    assert (low.z.dtype, low.l1.dtype) == (torch.bfloat16, torch.float32)
    assert relative(low.z, exact.z.double()) < 0.02
    truth = torch.autograd.grad(exact.z.square().sum(), leaves, allow_unused=True, materialize_grads=True)
    found = torch.autograd.grad(low.z.float().square().sum(), leaves, allow_unused=True, materialize_grads=True)
    for one, other in zip(found, truth, strict=True):
        assert one.dtype == torch.float32
        assert relative(one, other.double()) < 0.05


@pytest.mark.parametrize(
    ("place", "tensor", "error", "message"),
    [
        (0, torch.zeros(3, D + 1), ShapeError, "x has shape"),
        (0, torch.zeros(3, D, dtype=torch.bfloat16), ConfigError, "W_enc is torch.float32"),
        (0, torch.zeros(3, D, device="meta"), ConfigError, "one device"),
        (2, torch.zeros(F + 1), ShapeError, "b_enc has shape"),
        (3, torch.zeros(D, 1), ShapeError, "b_dec has shape"),
        (4, torch.zeros(1, 3), ShapeError, "a has shape"),
        (7, torch.zeros(2), ShapeError, "input_scale has shape"),
        (9, torch.zeros(1), ShapeError, "threshold has shape"),
    ],
)
def test_bad_input_is_named(place, tensor, error, message):
    tensors, activity = inputs(3, 2, 1)
    given = [one.float() for one in tensors]
    given[place] = tensor
    with pytest.raises(error, match=message):
        ops.rational_encode(*given[:4], GateTensors(*given[4:], activity.float()), GateSpec(3, 2), "cpu")
