"""rational_forward: code and activity counts against the float64 reference on the same rounded h."""

import pytest
import torch
from gate_cases import (
    DEGREES,
    DTYPES,
    FLAVOURS,
    assert_as_good_as_torch,
    draw_h,
    flags,
    name_of,
    oracle,
    random_gate,
    relu_gate,
    to,
)  # fmt: skip

from rsae_triton.ops.reference import GateSpec

TOLERANCE = 1e-6  # of the largest code; a 16-bit code is rounded once, as torch's is
FORWARD = [f for f in FLAVOURS if f["backward"] == "soft"]


def check(spec, gate, dtype, device, n_tokens=300, **keywords):
    from rsae_triton.kernels import rational_forward

    h = draw_h(n_tokens, gate, spec, dtype)
    truth = oracle(h, None, None, None, gate, spec, torch.float64)
    torchs = oracle(h, None, None, None, gate, spec, torch.float32)
    z, counts, l1 = rational_forward(h.T.contiguous().to(device), to(gate, device), **flags(spec), **keywords)
    out = keywords.get("out_dtype", dtype)
    assert z.dtype == out
    assert counts.dtype == l1.dtype == torch.float32
    assert_as_good_as_torch("z", z.T, truth["z"], torchs["z"].to(out), TOLERANCE)
    assert torch.equal(counts.cpu().double(), truth["counts"])
    assert_as_good_as_torch("l1", l1, truth["l1"], torchs["l1"], TOLERANCE)


@pytest.mark.parametrize("flavour", FORWARD, ids=name_of)
@pytest.mark.parametrize("per_feature", [False, True], ids=["shared", "per_feature"])
def test_every_flavour(flavour, per_feature, device):
    check(GateSpec(3, 2, **flavour), random_gate(3, 2, 6, 6 if per_feature else 1), torch.float32, device)


@pytest.mark.parametrize("per_feature", [False, True], ids=["shared", "per_feature"])
@pytest.mark.parametrize("degree", [*DEGREES, (0, 3), (4, 0)], ids=name_of)
def test_every_degree(degree, per_feature, device):
    check(GateSpec(*degree), random_gate(*degree, 5, 5 if per_feature else 1), torch.float32, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_every_dtype(dtype, out_dtype, device):
    check(GateSpec(5, 4, form="gated"), random_gate(5, 4, 7, 7), dtype, device, out_dtype=out_dtype)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (257, 1), (511, 4), (513, 13)], ids=str)
def test_ragged_shapes(shape, device):
    check(GateSpec(3, 2), random_gate(3, 2, shape[1], 1), torch.float32, device, n_tokens=shape[0])


def test_a_fitted_relu_is_one(device):
    from rsae_triton.kernels import rational_forward

    h = torch.linspace(-6, 6, 700, device=device).repeat(3, 1)
    z, counts, l1 = rational_forward(h, to(relu_gate(3), device), **flags(GateSpec(3, 2)))
    assert (z - h.relu()).abs().max() < 0.1  # 2 * .022 of fit, and what the activity threshold cut
    assert (z[:, 600:] - h[:, 600:]).abs().max() < 0.05  # beyond the clip: slope one
    assert (z[:, :100] == 0).all()
    assert torch.equal(counts, (z != 0).sum(1).float())
    torch.testing.assert_close(l1, z.abs().sum(1))
