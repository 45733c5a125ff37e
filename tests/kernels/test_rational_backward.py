"""rational_backward: every gradient of every flavour against float64 autograd of reference.py."""

from importlib import import_module

import pytest
import torch
from gate_cases import (
    DEGREES,
    DTYPES,
    FLAVOURS,
    assert_as_good_as_torch,
    assert_frozen,
    assert_gradients,
    draw_h,
    flags,
    magnitudes,
    name_of,
    oracle,
    random_gate,
    relu_gate,
    to,
)  # fmt: skip

from rsae_triton.ops.reference import GateSpec

# dh: of its largest value. Sums: of the sum of their terms' absolute values. float32 has an epsilon of 1.2e-7;
# 16-bit dh is rounded once, as torch's is.
TOLERANCE = 2e-6


def check(spec, gate, dtype, device, n_tokens=300, sums=True, seed=0, **keywords):
    from rsae_triton.kernels import rational_backward

    g = torch.Generator().manual_seed(seed + 1)
    h = draw_h(n_tokens, gate, spec, dtype, seed)
    dz = torch.randn(h.shape, generator=g).to(dtype)
    dcounts, dl1 = torch.randn(2, h.shape[1], generator=g) if sums else (None, None)
    truth = oracle(h, dz, dcounts, dl1, gate, spec, torch.float64)
    torchs = oracle(h, dz, dcounts, dl1, gate, spec, torch.float32)
    dh, grads = rational_backward(
        h.T.contiguous().to(device), dz.T.contiguous().to(device),
        *(None if one is None else one.to(device) for one in (dcounts, dl1)), to(gate, device),
        **flags(spec, backward=True), **keywords,
    )  # fmt: skip
    assert dh.dtype == dtype
    assert_as_good_as_torch("dh", dh.T, truth["dh"], torchs["dh"].to(dtype), TOLERANCE)
    assert_gradients(grads, truth, torchs, magnitudes(h, dz, dcounts, dl1, gate, spec), TOLERANCE)


@pytest.mark.parametrize("flavour", FLAVOURS, ids=name_of)
@pytest.mark.parametrize("per_feature", [False, True], ids=["shared", "per_feature"])
def test_every_flavour(flavour, per_feature, device):
    spec = GateSpec(3, 2, **flavour)
    check(spec, random_gate(3, 2, 6, 6 if per_feature else 1), torch.float32, device)


@pytest.mark.parametrize("form", ["direct", "gated"])
@pytest.mark.parametrize("per_feature", [False, True], ids=["shared", "per_feature"])
@pytest.mark.parametrize("degree", [*DEGREES, (0, 3), (4, 0)], ids=name_of)
def test_every_degree(degree, per_feature, form, device):
    spec = GateSpec(*degree, form=form, backward="rational")
    check(spec, random_gate(*degree, 5, 5 if per_feature else 1), torch.float32, device, n_tokens=200)


@pytest.mark.parametrize("form", ["direct", "gated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_every_dtype(dtype, form, device):
    spec = GateSpec(5, 4, form=form)
    check(spec, random_gate(5, 4, 9, 9), dtype, device, sums=False)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (257, 1), (511, 4), (513, 13)], ids=str)
def test_ragged_shapes(shape, device):
    n_tokens, n_features = shape
    spec = GateSpec(3, 2, form="gated", backward="rational")
    check(spec, random_gate(3, 2, n_features, n_features), torch.float32, device, n_tokens=n_tokens)


@pytest.mark.parametrize("backward", ["soft", "rational"])
def test_a_fitted_relu(backward, device):
    check(GateSpec(3, 2, backward=backward), relu_gate(6), torch.float32, device)


def test_one_program_over_many_blocks(device, monkeypatch):
    """The loop over tokens inside a program, which small shapes do not reach by themselves."""
    monkeypatch.setattr(import_module("rsae_triton.kernels.launch"), "PROGRAMS", 1)
    spec = GateSpec(5, 4, form="gated", backward="rational")
    check(spec, random_gate(5, 4, 5, 5), torch.float32, device, n_tokens=900)


def test_sets_of_different_number(device):
    """Shared polynomials with one scale per feature: the wrapper expands, and folds what was shared."""
    one, many = random_gate(3, 2, 6, 1), random_gate(3, 2, 6, 6)
    check(GateSpec(3, 2), one._replace(input_scale=many.input_scale), torch.float32, device)


def test_in_place_and_strides(device):
    from rsae_triton.kernels import rational_backward

    spec, gate = GateSpec(3, 2), to(random_gate(3, 2, 6, 1), device)
    h = draw_h(70, random_gate(3, 2, 6, 1), spec, torch.float32).T.contiguous().to(device)
    dz = torch.randn(6, 70, device=device)
    kept = dz.clone()
    dh, grads = rational_backward(h, dz, None, None, gate, **flags(spec, True))
    assert torch.equal(dz, kept)
    token_major = dz.T.contiguous().T
    strided, strided_grads = rational_backward(h, token_major, None, None, gate, **flags(spec, True), inplace=True)
    assert torch.equal(token_major, kept)
    over, over_grads = rational_backward(h, dz, None, None, gate, **flags(spec, True), inplace=True)
    assert over.data_ptr() == dz.data_ptr()
    for found, found_grads in ((strided, strided_grads), (over, over_grads)):
        assert torch.equal(found, dh)
        assert all(torch.equal(x, y) for x, y in zip(found_grads, grads, strict=True))


def test_mixed_precision(device):
    """bfloat16 h beside float32 dz, and the other way round: dh is in dz's dtype."""
    from rsae_triton.kernels import rational_backward

    spec, gate = GateSpec(3, 2), random_gate(3, 2, 4, 1)
    h = draw_h(100, gate, spec, torch.bfloat16)
    dz = torch.randn(100, 4).to(torch.bfloat16)
    truth = oracle(h, dz, None, None, gate, spec, torch.float64)
    for h_dtype, dz_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        dh, grads = rational_backward(
            h.T.contiguous().to(device, h_dtype), dz.T.contiguous().to(device, dz_dtype), None, None,
            to(gate, device), **flags(spec, True),
        )  # fmt: skip
        assert dh.dtype == dz_dtype
        assert_as_good_as_torch("dh", dh.T, truth["dh"], truth["dh"].to(dz_dtype), TOLERANCE)
        scale = magnitudes(h, dz, None, None, gate, spec)
        assert_as_good_as_torch("da", grads.a, truth["da"], truth["da"].float(), TOLERANCE, scale["da"])


def test_euler_identity(device):
    """sum i a_i da_i + sum j b_j db_j = sum g_r s r': holds where nothing is clipped, and ties three sums together."""
    from rsae_triton.kernels import rational_backward

    n_features = 6
    gate = random_gate(5, 4, n_features, 1)
    gate = gate._replace(centre=torch.zeros(1), threshold=torch.zeros(n_features))
    spec = GateSpec(5, 4, domain="free", hard=False)
    h = draw_h(200, gate, spec, torch.float32).T.contiguous().to(device)
    _, grads = rational_backward(h, torch.randn_like(h), None, None, to(gate, device), **flags(spec, True))
    euler = (torch.arange(6) * gate.a[0] * grads.a[0].cpu()).sum() + (
        torch.arange(1, 5) * gate.b[0] * grads.b[0].cpu()
    ).sum()
    torch.testing.assert_close(euler, -(grads.input_scale.cpu() * gate.input_scale)[0], rtol=1e-4, atol=1e-4)


def test_bit_reproducible(device):
    from rsae_triton.kernels import rational_backward

    spec, gate = GateSpec(3, 2, form="gated"), to(random_gate(3, 2, 6, 1), device)
    h = torch.randn(6, 1000, device=device)
    dz, (dcounts, dl1) = torch.randn_like(h), torch.randn(2, 6, device=device)
    first, first_grads = rational_backward(h, dz, dcounts, dl1, gate, **flags(spec, True))
    again, again_grads = rational_backward(h, dz, dcounts, dl1, gate, **flags(spec, True))
    assert torch.equal(first, again)
    assert all(torch.equal(x, y) for x, y in zip(first_grads, again_grads, strict=True))


@pytest.mark.parametrize("form", ["direct", "gated"])
@pytest.mark.parametrize("sets", [1, 6])
@pytest.mark.parametrize("degree", [(0, 0), (3, 2)], ids=name_of)
def test_frozen_coefficients(degree, sets, form, device):
    from rsae_triton.kernels import rational_backward

    spec, gate = GateSpec(*degree, form=form, backward="rational"), to(random_gate(*degree, 6, sets), device)
    h = torch.randn(6, 300, device=device)
    dz, (dcounts, dl1) = torch.randn_like(h), torch.randn(2, 6, device=device)
    found = [
        rational_backward(h, dz, dcounts, dl1, gate, **flags(spec, True), coefficients=trained)
        for trained in (False, True)
    ]
    assert torch.equal(found[0][0], found[1][0])
    assert_frozen(found[0][1], found[1][1])
