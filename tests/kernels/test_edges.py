"""Where kernels go wrong: NaN, exact ties, nothing to do, huge arguments, bad input, sizes beyond 2^31."""

import pytest
import torch
from gate_cases import FLAVOURS, flags, name_of, oracle, random_gate, to

from rsae_triton.kernels import encode_forward, rational_backward, rational_forward
from rsae_triton.kernels.interpreter import INTERPRETED
from rsae_triton.kernels.launch import PROGRAMS, TOKENS_PER_SUM, split_tokens
from rsae_triton.ops.reference import GateSpec

FORWARD = [f for f in FLAVOURS if f["backward"] == "soft"]


@pytest.mark.parametrize("flavour", FORWARD, ids=name_of)
def test_nan_stays_nan(flavour, device):
    spec, gate = GateSpec(3, 2, **flavour), to(random_gate(3, 2, 4, 1), device)
    h = torch.randn(4, 50, device=device)
    h[1, 7] = h[3, 0] = torch.nan
    z, counts, _ = rational_forward(h, gate, **flags(spec))
    assert torch.equal(z.isnan(), h.isnan())
    assert torch.equal(counts.cpu(), oracle(h.T, None, None, None, gate, spec, torch.float32)["counts"])


def test_nan_in_x_reaches_every_code_of_its_token(device):
    gate = to(random_gate(3, 2, 5, 1), device)
    x, W = torch.randn(20, 6, device=device), torch.randn(6, 5, device=device)
    x[3, 2] = torch.nan
    z, *_ = encode_forward(x, W, torch.zeros(5, device=device), gate, **flags(GateSpec(3, 2)))
    assert z[:, 3].isnan().all()
    assert z.isnan().sum() == 5


@pytest.mark.parametrize("flavour", FLAVOURS, ids=name_of)
def test_ties_are_decided_as_torch_decides_them(flavour, device):
    """h at theta, at both ends of the clip, one step of float32 beside them, and where B(s) = 0."""
    gate = random_gate(3, 2, 3, 1)._replace(
        centre=torch.full((1,), 0.25), input_scale=torch.full((1,), 2.0),
        threshold=torch.tensor([0.0, 0.5, -1.0]),
    )  # fmt: skip
    spec = GateSpec(3, 2, **flavour)
    special = gate.threshold + torch.tensor([0.0, 2.0, -2.0, 0.5])[:, None]
    infinity = torch.tensor(torch.inf)
    h = torch.cat([special, torch.nextafter(special, infinity), torch.nextafter(special, -infinity)])
    dz, dcounts, dl1 = torch.randn(h.shape), torch.randn(3), torch.randn(3)
    truth = oracle(h, dz, dcounts, dl1, gate, spec, torch.float32)
    h, dz = h.T.contiguous().to(device), dz.T.contiguous().to(device)
    z, counts, _ = rational_forward(h, to(gate, device), **flags(spec))
    dh, grads = rational_backward(h, dz, dcounts.to(device), dl1.to(device), to(gate, device), **flags(spec, True))
    torch.testing.assert_close(z.T.cpu(), truth["z"], rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(counts.cpu(), truth["counts"])
    torch.testing.assert_close(dh.T.cpu(), truth["dh"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads.b.cpu(), truth["db"], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(grads.threshold.cpu(), truth["dthreshold"], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("domain", ["clamp", "free"])
def test_large_arguments_do_not_overflow(domain, device):
    """At (9, 8) and |t| of 2000 the square of the denominator is infinite; the gate and its slope are not."""
    gate = to(random_gate(9, 8, 3, 1), device)
    h = torch.tensor([[-3000.0, -300.0, 300.0, 3000.0]] * 3, device=device)
    flavour = flags(GateSpec(9, 8, domain=domain), backward=True)
    dh, grads = rational_backward(h, torch.ones_like(h), None, None, gate, **flavour)
    assert dh.isfinite().all()
    assert all(g.isfinite().all() for g in grads)


def test_unused_rows_of_a_tile_do_not_enter_the_sums(device):
    """A free gate far from 0: where h = 0, as in the unused part of a tile, its polynomials overflow."""
    gate = random_gate(9, 8, 2, 1)._replace(threshold=torch.full((2,), 1e6))
    h = 1e6 + torch.randn(2, 33)
    dz = torch.randn(2, 33)
    spec = GateSpec(9, 8, domain="free", hard=False)
    truth = oracle(h.T, dz.T, None, None, gate, spec, torch.float64)
    dh, grads = rational_backward(h.to(device), dz.to(device), None, None, to(gate, device), **flags(spec, True))
    torch.testing.assert_close(dh.T.cpu().double(), truth["dh"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(grads.a.cpu().double(), truth["da"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["direct", "gated"])
def test_nan_reaches_the_gradients(form, device):
    """A training loop that looks for NaN in gradients must see it there, clip or no clip."""
    spec, gate = flags(GateSpec(3, 2, form=form), True), to(random_gate(3, 2, 4, 4), device)
    h = torch.randn(4, 50, device=device)
    h[2, 7] = torch.nan
    _, grads = rational_backward(h, torch.ones_like(h), torch.ones(4, device=device), None, gate, **spec)
    for gradient in (grads.a[:, 1:], grads.b):
        assert gradient[2].isnan().all()
        assert gradient[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 4, 0), (3, 0, 5)], ids=str)
def test_nothing_to_do(shape, device):
    n_tokens, d_in, n_features = shape
    gate, spec = to(random_gate(3, 2, n_features, 1), device), GateSpec(3, 2)
    x, W = torch.zeros(n_tokens, d_in, device=device), torch.zeros(d_in, n_features, device=device)
    b = torch.zeros(n_features, device=device)
    z, h, counts, _ = encode_forward(x, W, b, gate, save_h=torch.float32, **flags(spec))
    z2, counts2, l1 = rational_forward(h, gate, **flags(spec))
    dh, grads = rational_backward(h, torch.ones_like(h), None, None, gate, **flags(spec, True))
    assert z.shape == h.shape == z2.shape == dh.shape == (n_features, n_tokens)
    assert counts.shape == counts2.shape == l1.shape == grads.threshold.shape == grads.b_enc.shape == (n_features,)
    assert [tuple(g.shape) for g in grads[:5]] == [(1, 4), (1, 2), (1,), (1,), (1,)]
    torch.testing.assert_close(z, z2)
    if n_tokens * n_features == 0:
        assert all((g == 0).all() for g in grads)


def test_wrong_input_is_refused_with_a_reason(device):
    spec = flags(GateSpec(3, 2))
    gate = to(random_gate(3, 2, 5, 1), device)
    x, W, b = torch.zeros(2, 4, device=device), torch.zeros(4, 5, device=device), torch.zeros(5, device=device)
    with pytest.raises(ValueError, match="same dtype"):
        encode_forward(x.bfloat16(), W, b, gate, **spec)
    with pytest.raises(ValueError, match="do not fit"):
        encode_forward(x, W[1:], b, gate, **spec)
    with pytest.raises(ValueError, match="degree"):
        encode_forward(x, W, b, gate, **{**spec, "p": 4})
    with pytest.raises(ValueError, match="coefficient sets"):
        encode_forward(x, W, b, gate._replace(centre=torch.zeros(2, device=device)), **spec)
    with pytest.raises(ValueError, match="does not fit"):
        rational_backward(
            torch.zeros(5, 2, device=device), torch.zeros(5, 3, device=device), None, None, gate,
            **flags(GateSpec(3, 2), True),
        )  # fmt: skip


@pytest.mark.parametrize(("n_tokens", "blocks"), [(1, 1), (4096, 6144), (4096, 3), (10**6, 6144), (10**7, 1)])
def test_split_covers_every_token_once(n_tokens, blocks):
    split = split_tokens(n_tokens, blocks, 256)
    assert split.count * split.tokens >= n_tokens > (split.count - 1) * split.tokens
    assert split.tokens % 256 == 0
    assert split.tokens <= TOKENS_PER_SUM
    assert split.count <= max(PROGRAMS // blocks + 1, -(-n_tokens // TOKENS_PER_SUM) + 1)


@pytest.mark.skipif(not INTERPRETED, reason="about Triton's interpreter")
def test_interpreter_rounds_and_multiplies_bfloat16():
    import triton
    import triton.language as tl

    @triton.jit
    def square(x, out, N: tl.constexpr):
        i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
        tile = tl.load(x + i * N + j)
        tl.store(out + i * N + j, tl.dot(tile, tile).to(tl.bfloat16))

    x = torch.randn(16, 16).bfloat16()
    out = torch.empty_like(x)
    square[(1,)](x, out, N=16)
    assert (out.double() - x.double() @ x.double()).abs().max() < 2**-8 * (x.double() @ x.double()).abs().max()
    assert (out == (x.float() @ x.float()).bfloat16()).float().mean() > 0.9  # truncation would agree on half
