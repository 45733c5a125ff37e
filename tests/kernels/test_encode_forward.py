"""encode_forward: the fused encoder against the float64 reference on the same rounded inputs."""

import pytest
import torch
from gate_cases import (
    DEGREES,
    DTYPES,
    FLAVOURS,
    assert_as_good_as_torch,
    doubtful,
    flags,
    name_of,
    oracle,
    random_gate,
    to,
)  # fmt: skip

from rsae_triton.kernels import configs
from rsae_triton.ops.reference import GateSpec

# Of the largest code; float32 products go through three TF32 ones on a GPU, and sums have another order.
TOLERANCE = 4e-6
SHAPE = (45, 70, 37)  # n_tokens, d_in, n_features: nothing divides a tile
FORWARD = [f for f in FLAVOURS if f["backward"] == "soft"]


@pytest.fixture
def small_tiles(monkeypatch):
    """Several programs, and a ragged last one in each direction, at a size the interpreter can do."""

    def use(sub=2):
        for table in configs.MATMUL.values():
            for key in table:
                monkeypatch.setitem(table, key, configs.MatmulTile(16, 32, 16, sub, 4, 2, group=2))
        monkeypatch.setattr(configs, "SPECIALISED", 1)  # keep `sub` although the tests' sizes are ragged

    return use


def inputs(dtype, shape=SHAPE, seed=0):
    n_tokens, d_in, n_features = shape
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, d_in, generator=g).to(dtype)
    W = (torch.randn(d_in, n_features, generator=g) / max(d_in, 1) ** 0.5).to(dtype)
    return x, W, 0.1 * torch.randn(n_features, generator=g)


def check(spec, gate, dtype, device, shape=SHAPE, save_h=None, arrange=lambda x: x):
    from rsae_triton.kernels import encode_forward

    x, W, b = inputs(dtype, shape)
    h = x.double() @ W.double() + b.double()
    z, h_fm, counts, l1 = encode_forward(
        arrange(x.to(device)), arrange(W.to(device)), b.to(device), to(gate, device), save_h=save_h, **flags(spec)
    )
    # The gate sees h as it is saved: in fewer bits that is another number, not a less exact gate.
    seen = h if save_h in (None, torch.float32) else h_fm.T.cpu().double()
    truth = oracle(seen, None, None, None, gate, spec, torch.float64)
    # torch in the same dtype with the one rounding of z that the op makes: float32 accumulation, float32 gate
    exact = x.float() @ W.float() + b if seen is h else seen.float()
    torchs = oracle(exact, None, None, None, gate, spec, torch.float32)
    assert z.shape == (shape[2], shape[0])
    assert z.dtype == dtype
    sure = ~doubtful(seen, gate, spec, 2e-5)
    assert sure.double().mean() > 0.99
    assert_as_good_as_torch("z", z.T.cpu() * sure, truth["z"] * sure, torchs["z"].to(dtype) * sure, TOLERANCE)
    assert ((counts.cpu() - truth["counts"]).abs() <= (~sure).sum(0)).all()
    firm = sure.all(0)
    assert firm.any()
    assert_as_good_as_torch("l1", l1.cpu()[firm], truth["l1"][firm], torchs["l1"][firm], TOLERANCE)
    if save_h is None:
        assert h_fm is None
    else:
        assert h_fm.dtype == save_h
        assert_as_good_as_torch("h", h_fm.T, h, (x.float() @ W.float() + b).to(save_h), TOLERANCE)


@pytest.mark.parametrize("flavour", FORWARD, ids=name_of)
@pytest.mark.parametrize("per_feature", [False, True], ids=["shared", "per_feature"])
def test_every_flavour(flavour, per_feature, device, small_tiles):
    small_tiles()
    check(GateSpec(3, 2, **flavour), random_gate(3, 2, 37, 37 if per_feature else 1), torch.float32, device)


@pytest.mark.parametrize("sub", [1, 2, 4])
@pytest.mark.parametrize("degree", DEGREES, ids=name_of)
def test_every_degree_and_epilogue(degree, sub, device, small_tiles):
    small_tiles(sub)
    check(GateSpec(*degree, form="gated"), random_gate(*degree, 37, 37), torch.float32, device, save_h=torch.float32)


@pytest.mark.parametrize("save_h", [None, torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_every_dtype(dtype, save_h, device, small_tiles):
    small_tiles()
    check(GateSpec(5, 4), random_gate(5, 4, 37, 1), dtype, device, save_h=save_h)


@pytest.mark.parametrize("form", ["direct", "gated"])
def test_what_is_active_is_decided_on_h_as_it_is_saved(form, device, small_tiles):
    """The backward pass reads h rounded to bfloat16: entries at a threshold must not be active for one pass alone."""
    from rsae_triton.kernels import encode_forward, rational_forward

    small_tiles()
    x, W, b = (t.to(device) for t in inputs(torch.bfloat16))
    gate, flavour = to(random_gate(3, 2, 37, 1), device), flags(GateSpec(3, 2, form=form))
    exact, rounded = (
        encode_forward(x, W, b, gate, **flavour, save_h=dtype)[1] for dtype in (torch.float32, torch.bfloat16)
    )
    down = (rounded.float() < exact).int().argmax(1, keepdim=True)  # in every feature a token whose h is rounded down
    gate = gate._replace(threshold=rounded.float().gather(1, down).squeeze(1))
    z, h, counts, _ = encode_forward(x, W, b, gate, **flavour, save_h=torch.bfloat16)
    apart = rational_forward(h, gate, **flavour)
    assert torch.equal(counts, apart[1])
    assert torch.equal(z, apart[0])
    if form == "gated":
        assert (counts != (exact > gate.threshold[:, None]).sum(1)).any()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 33), (33, 1, 1), (32, 16, 16), (200, 40, 150)], ids=str)
def test_ragged_shapes_with_the_shipped_tiles(shape, device):
    check(GateSpec(3, 2), random_gate(3, 2, shape[2], 1), torch.float32, device, shape=shape)


def test_strides(device, small_tiles):
    small_tiles()

    def transposed(t):
        return t.T.contiguous().T

    def spread(t):
        return t.new_zeros(2 * t.shape[0], 3 * t.shape[1])[::2, ::3].copy_(t)

    for arrange in (transposed, spread):
        check(GateSpec(3, 2), random_gate(3, 2, 37, 1), torch.bfloat16, device, arrange=arrange)


def test_bit_reproducible(device, small_tiles):
    from rsae_triton.kernels import encode_forward

    small_tiles()
    x, W, b = (t.to(device) for t in inputs(torch.float32))
    gate, flavour = to(random_gate(3, 2, 37, 1), device), flags(GateSpec(3, 2))
    first = encode_forward(x, W, b, gate, **flavour)
    again = encode_forward(x, W, b, gate, **flavour)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[2], again[2])
    assert torch.equal(first[3], again[3])


def test_float32_products_follow_torchs_setting():
    from rsae_triton.kernels.launch import dot_precision

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert dot_precision(torch.float32) == "tf32x3"
        torch.set_float32_matmul_precision("high")
        assert dot_precision(torch.float32) == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
