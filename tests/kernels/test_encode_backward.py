"""encode_backward: the fused backward against float64 autograd of the product with W_dec and of reference.py."""

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
    to,
)  # fmt: skip

from rsae_triton.kernels import configs, encode_backward, rational_backward
from rsae_triton.ops.reference import GateSpec, GateTensors

# dh: of its largest value; sums: of the sum of their terms' absolute values. The product has another order of
# summation than torch's, and on a GPU float32 goes through three TF32 products.
TOLERANCE = 6e-6
SHAPE = (45, 50, 21)  # n_tokens, d_in, n_features: nothing divides a tile


@pytest.fixture
def small_tiles(monkeypatch):
    """Several programs, and a ragged last one in each direction, at a size the interpreter can do."""

    def use(sub=2, lanes=4):
        for table in configs.BACKWARD.values():
            for key in table:
                monkeypatch.setitem(table, key, configs.MatmulTile(16, 32, 16, sub, 4, 2, 2, lanes))
        monkeypatch.setattr(configs, "SPECIALISED", 1)  # keep the tile although the tests' sizes are ragged

    return use


def inputs(spec, gate, dtype, shape, h_dtype=None, sums=True, seed=0):
    """g [n, d_in], W_dec [F, d_in], h [n, F], and dcounts, dl1 [F] or None."""
    n_tokens, d_in, n_features = shape
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(n_tokens, d_in, generator=generator).to(dtype)
    W = (torch.randn(n_features, d_in, generator=generator) / max(d_in, 1) ** 0.5).to(dtype)
    dcounts, dl1 = torch.randn(2, n_features, generator=generator) if sums else (None, None)
    return g, W, draw_h(n_tokens, gate, spec, h_dtype or dtype, seed), dcounts, dl1


def check(spec, gate, dtype, device, shape=SHAPE, h_dtype=None, sums=True, arrange=lambda x: x, **keywords):
    g, W, h, dcounts, dl1 = inputs(spec, gate, dtype, shape, h_dtype, sums)
    g_z = g.double() @ W.double().T
    truth = oracle(h, g_z, dcounts, dl1, gate, spec, torch.float64)
    # torch with the one rounding of dh that the op makes: float32 accumulation, float32 gate
    torchs = oracle(h, g.float() @ W.float().T, dcounts, dl1, gate, spec, torch.float32)
    dh, z, grads = encode_backward(
        arrange(g.to(device)), arrange(W.to(device)), arrange(h.T.contiguous().to(device)),
        *(None if one is None else one.to(device) for one in (dcounts, dl1)), to(gate, device),
        **flags(spec, backward=True), **keywords,
    )  # fmt: skip
    dh_dtype, z_dtype = keywords.get("dh_dtype", dtype), keywords.get("z_dtype")
    assert dh.dtype == dh_dtype
    assert_as_good_as_torch("dh", dh.T, truth["dh"], torchs["dh"].to(dh_dtype), TOLERANCE)
    assert_gradients(grads, truth, torchs, magnitudes(h, g_z, dcounts, dl1, gate, spec), TOLERANCE)
    if z_dtype is None:
        assert z is None
    else:
        assert z.dtype == z_dtype
        assert_as_good_as_torch("z", z.T, truth["z"], torchs["z"].to(z_dtype), TOLERANCE)


@pytest.mark.parametrize("flavour", FLAVOURS, ids=name_of)
@pytest.mark.parametrize("per_feature", [False, True], ids=["shared", "per_feature"])
def test_every_flavour(flavour, per_feature, device, small_tiles):
    small_tiles()
    gate = random_gate(3, 2, 21, 21 if per_feature else 1)
    check(GateSpec(3, 2, **flavour), gate, torch.float32, device, z_dtype=torch.float32)


@pytest.mark.parametrize(("sub", "lanes"), [(1, 4), (2, 1), (4, 4), (4, 1)])
@pytest.mark.parametrize("degree", DEGREES, ids=name_of)
def test_every_degree_and_epilogue(degree, sub, lanes, device, small_tiles):
    small_tiles(sub, lanes)
    spec = GateSpec(*degree, form="gated" if lanes == 1 else "direct", backward="rational")
    check(spec, random_gate(*degree, 21, 21), torch.float32, device)


@pytest.mark.parametrize("h_dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("form", ["direct", "gated"])
def test_every_dtype(form, dtype, h_dtype, device, small_tiles):
    """Each of g and h has its own dtype, and so have dh and z; without the sums' gradients, as a plain loss has it."""
    small_tiles()
    spec, gate = GateSpec(5, 4, form=form), random_gate(5, 4, 21, 21)
    check(spec, gate, dtype, device, h_dtype=h_dtype, sums=False)
    check(spec, gate, dtype, device, h_dtype=h_dtype, dh_dtype=torch.float32, z_dtype=torch.bfloat16)


@pytest.mark.parametrize("n_sets", [1, 7, 21])
def test_groups(n_sets, device, small_tiles):
    """Coefficients shared by groups arrive expanded to one set per feature."""
    small_tiles()
    gate = random_gate(3, 2, 21, n_sets)
    expanded = gate._replace(**{
        name: getattr(gate, name).repeat_interleave(21 // n_sets if n_sets > 1 else 1, 0)
        for name in ("a", "b", "centre", "input_scale", "output_scale")
    })  # fmt: skip
    check(GateSpec(3, 2, form="gated", backward="rational"), expanded, torch.bfloat16, device)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 33), (33, 1, 1), (32, 16, 16), (130, 40, 70)], ids=str)
def test_ragged_shapes_with_the_shipped_tiles(shape, device):
    check(GateSpec(3, 2), random_gate(3, 2, shape[2], 1), torch.float32, device, shape=shape, z_dtype=torch.float32)


def test_strides(device, small_tiles):
    small_tiles()

    def transposed(t):
        return t.T.contiguous().T

    def spread(t):
        return t.new_zeros(2 * t.shape[0], 3 * t.shape[1])[::2, ::3].copy_(t)

    for arrange in (transposed, spread):
        check(GateSpec(3, 2), random_gate(3, 2, 21, 1), torch.bfloat16, device, arrange=arrange)


def test_agrees_with_the_two_kernels_it_replaces(device, small_tiles):
    small_tiles()
    spec, gate = GateSpec(5, 4, form="gated", backward="rational"), random_gate(5, 4, 21, 21)
    g, W, h, dcounts, dl1 = inputs(spec, gate, torch.float32, SHAPE)
    g, W, dcounts, dl1 = (t.to(device) for t in (g, W, dcounts, dl1))
    h, gate, flavour = h.T.contiguous().to(device), to(gate, device), flags(spec, True)
    dh, _, grads = encode_backward(g, W, h, dcounts, dl1, gate, **flavour)
    apart, apart_grads = rational_backward(h, W @ g.T, dcounts, dl1, gate, **flavour)
    torch.testing.assert_close(dh, apart, rtol=1e-4, atol=1e-5)
    for found, expected in zip(grads, apart_grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_bit_reproducible(device, small_tiles):
    small_tiles()
    spec, gate = GateSpec(3, 2, form="gated"), random_gate(3, 2, 21, 1)
    g, W, h, dcounts, dl1 = (t.to(device) for t in inputs(spec, gate, torch.float32, SHAPE))
    h, gate, keywords = h.T.contiguous(), to(gate, device), {**flags(spec, True), "z_dtype": torch.float32}
    first = encode_backward(g, W, h, dcounts, dl1, gate, **keywords)
    again = encode_backward(g, W, h, dcounts, dl1, gate, **keywords)
    for one, other in zip((*first[:2], *first[2]), (*again[:2], *again[2]), strict=True):
        assert torch.equal(one, other)


def test_unused_rows_of_a_tile_do_not_enter_the_sums(device, small_tiles):
    """A free gate far from 0: where h = 0, as in the unused part of a tile, its polynomials overflow."""
    small_tiles()
    gate = random_gate(9, 8, 21, 1)._replace(threshold=torch.full((21,), 1e6))
    spec = GateSpec(9, 8, domain="free", hard=False)
    g, W = torch.randn(33, 8), torch.randn(21, 8)
    h, dl1 = 1e6 + torch.randn(33, 21), torch.randn(21)
    truth = oracle(h, g @ W.T, None, dl1, gate, spec, torch.float64)
    dh, _, grads = encode_backward(
        g.to(device), W.to(device), h.T.to(device), None, dl1.to(device), to(gate, device), **flags(spec, True)
    )
    torch.testing.assert_close(dh.T.cpu().double(), truth["dh"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(grads.a.cpu().double(), truth["da"], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 4, 0), (3, 0, 5)], ids=str)
def test_nothing_to_do(shape, device):
    n_tokens, d_in, n_features = shape
    gate, spec = to(random_gate(3, 2, n_features, 1), device), GateSpec(3, 2)
    g, W = torch.zeros(n_tokens, d_in, device=device), torch.zeros(n_features, d_in, device=device)
    h = torch.zeros(n_features, n_tokens, device=device)
    dh, z, grads = encode_backward(g, W, h, None, None, gate, z_dtype=torch.float32, **flags(spec, True))
    assert dh.shape == z.shape == (n_features, n_tokens)
    assert all((one == 0).all() for one in (dh, *grads))


def test_wrong_input_is_refused_with_a_reason(device):
    spec, gate = flags(GateSpec(3, 2), True), to(random_gate(3, 2, 5, 1), device)
    g, W, h = (torch.zeros(*shape, device=device) for shape in ((2, 4), (5, 4), (5, 2)))
    with pytest.raises(ValueError, match="same dtype"):
        encode_backward(g.bfloat16(), W, h, None, None, gate, **spec)
    with pytest.raises(ValueError, match="do not fit"):
        encode_backward(g, W.T, h, None, None, gate, **spec)
    with pytest.raises(ValueError, match="do not fit"):
        encode_backward(g, W, h.T, None, None, gate, **spec)


@pytest.mark.parametrize("way", ["split", "fused"])
def test_autoencode_takes_the_way_that_is_named(way, device, monkeypatch, small_tiles):
    """Every gradient of the loss, chunk by chunk, against the eager backend."""
    from rsae_triton import kernels
    from rsae_triton.ops.autoencode import rational_autoencode

    small_tiles()
    called = []
    fused = kernels.encode_backward
    monkeypatch.setattr(kernels, "encode_backward", lambda *args, **kw: called.append(1) or fused(*args, **kw))
    n_tokens, d_in, d_sae = 37, 10, 21
    generator = torch.Generator().manual_seed(5)
    x, W_enc, b_enc, W_dec, b_dec = (
        torch.randn(*shape, generator=generator).div(3).to(device)
        for shape in ((n_tokens, d_in), (d_in, d_sae), (d_sae,), (d_sae, d_in), (d_in,))
    )
    parameters = [
        one.requires_grad_() for one in (W_enc, b_enc, W_dec, b_dec, *to(random_gate(3, 2, d_sae, 1), device))
    ]
    gate, spec = GateTensors(*parameters[4:]), GateSpec(3, 2, form="gated", backward="rational")
    gradients = {}
    for backend in (f"triton:{way}", "eager"):
        loss = rational_autoencode(
            x, *parameters[:4], gate, spec, l1_weight=0.1, l0_weight=0.2, chunk_tokens=16, backend=backend
        )
        gradients[backend] = [loss.total, *torch.autograd.grad(loss.total, parameters[:10], allow_unused=True)]
    assert len(called) == (3 if way == "fused" else 0)
    for found, expected in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)


def test_euler_identity(device, small_tiles):
    """sum i a_i da_i + sum j b_j db_j = sum g_r s r': exact where nothing is clipped, and so for the whole sum."""
    small_tiles()
    n_features = 21
    gate = random_gate(5, 4, n_features, 1)
    gate = gate._replace(centre=torch.zeros(1), threshold=torch.zeros(n_features))
    spec = GateSpec(5, 4, domain="free", hard=False)
    g, W, h, _, _ = inputs(spec, gate, torch.float32, SHAPE, sums=False)
    h = h.T.contiguous().to(device)
    _, _, grads = encode_backward(g.to(device), W.to(device), h, None, None, to(gate, device), **flags(spec, True))
    euler = (torch.arange(6) * gate.a[0] * grads.a[0].cpu()).sum()
    euler += (torch.arange(1, 5) * gate.b[0] * grads.b[0].cpu()).sum()
    torch.testing.assert_close(euler, -(grads.input_scale.cpu() * gate.input_scale)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["direct", "gated"])
def test_frozen_coefficients(form, device, small_tiles):
    small_tiles()
    spec, gate = GateSpec(3, 2, form=form, backward="rational"), random_gate(3, 2, 21, 21)
    g, W, h, dcounts, dl1 = (one.to(device) for one in inputs(spec, gate, torch.float32, SHAPE))
    given = (g, W, h.T.contiguous(), dcounts, dl1, to(gate, device))
    frozen, whole = (encode_backward(*given, **flags(spec, True), coefficients=trained) for trained in (False, True))
    assert torch.equal(frozen[0], whole[0])
    assert_frozen(frozen[2], whole[2])
