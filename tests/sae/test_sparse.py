"""Codes as rows: the public surface, on the CPU path and, in Triton's interpreter, on the kernels'."""

import pytest
import torch
from sparse_cases import D_IN, D_SAE, KINDS, assert_rows, make, on_kernels, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from rsae_triton import SparseCode, decode_sparse, encode_sparse
from rsae_triton.common.errors import ConfigError, NumericsError, ShapeError
from rsae_triton.ops import finding, sparse_ops
from rsae_triton.sae import sparse
from rsae_triton.teachers import ReluSAE


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_what_is_not_zero_in_the_dense_code(kind, backend):
    sae, x = make(kind), tokens(2, 9)
    z = sae.encode(x)
    code = encode_sparse(on_kernels(sae) if backend == "triton" else sae, x)
    assert_rows(code)
    assert 2 < (z != 0).sum(-1).float().mean() < 35
    torch.testing.assert_close(code.to_dense(D_SAE), z.detach(), atol=1e-5, rtol=1e-5)
    assert torch.equal(code.counts, (z != 0).sum(-1))
    assert code.values.shape == (2, 9, int(code.counts.max()))
    torch.testing.assert_close(decode_sparse(sae, code), sae.decode(z), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lead", [(), (5,), (0,), (2, 0, 3), (2, 3, 2)])
def test_any_leading_shape(lead):
    sae, x = make("gated"), tokens(*lead)
    code = sae.encode_sparse(x)
    assert code.counts.shape == lead
    assert (
        code.values.shape == code.indices.shape == (*lead, max(int(code.counts.max()) if code.counts.numel() else 0, 1))
    )
    torch.testing.assert_close(code.to_dense(D_SAE), sae.encode(x).detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.decode_sparse(code), sae(x), atol=1e-5, rtol=1e-5)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in torch.utils._pytree.tree_leaves(out):
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_code_never_exists_whole(kind, monkeypatch):
    sae, x = make(kind), tokens(100)
    whole = encode_sparse(sae, x)
    monkeypatch.setattr(sparse_ops, "CHUNK", 700)
    monkeypatch.setattr(sparse_ops, "TOKENS", 35)
    monkeypatch.setattr(finding, "BLOCK", 20)
    with Largest() as largest:
        code = encode_sparse(sae, x)
        decode_sparse(sae, code)
    rows = 100 * code.values.shape[1]
    assert max(700, rows) <= largest.elements <= max(1500, rows) < 100 * D_SAE
    torch.testing.assert_close(code, whole, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["gated", "topk"])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_capacity_is_a_width_not_a_limit(kind, backend):
    sae, x = make(kind), tokens(9)
    sae = on_kernels(sae) if backend == "triton" else sae
    code = encode_sparse(sae, x)
    fullest = int(code.counts.max())
    for capacity in (1, fullest, fullest + 4):
        wide = encode_sparse(sae, x, capacity)
        assert_rows(wide)
        assert wide.values.shape == (9, max(capacity, fullest))
        assert torch.equal(wide.values[:, :fullest], code.values)
        assert torch.equal(wide.indices[:, :fullest], code.indices)
        assert torch.equal(wide.counts, code.counts)


def test_every_feature_active_and_none():
    for backend in ("cpu", "triton"):
        sae, x = make("gated"), tokens(5)
        sae = on_kernels(sae) if backend == "triton" else sae
        for shift, active in ((40.0, D_SAE), (-40.0, 0)):
            with torch.no_grad():
                sae.b_enc.fill_(shift)
            code = encode_sparse(sae, x, capacity=2)
            assert code.counts.tolist() == [active] * 5
            assert code.values.shape == (5, max(active, 2))
            torch.testing.assert_close(decode_sparse(sae, code), sae(x), atol=1e-3, rtol=1e-5)


def test_kernels_are_asked_again_when_a_token_has_more(monkeypatch):
    """Both guesses too small: the first answer tells how many places are needed, the second is exact."""
    monkeypatch.setattr(sparse, "CAPACITY", 3)
    sae, x = on_kernels(make("relu")), tokens(6)
    assert encode_sparse(sae, x).counts.max() > 3
    torch.testing.assert_close(encode_sparse(sae, x).to_dense(D_SAE), sae.encode(x).detach(), atol=1e-5, rtol=1e-5)
    with torch.no_grad():  # all codes of a token tie: every one is a candidate
        sae.W_enc.fill_(1.0)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    whole = x.abs().round() + 1  # sums of whole numbers are exact, so they tie however a product is split
    assert encode_sparse(sae, whole, k=2).indices.tolist() == [[0, 1]] * 6


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("kind", ["gated", "relu", "topk"])
def test_the_k_largest_with_ties_by_lowest_index(kind, backend):
    sae = make(kind)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randint(-1, 2, sae.W_enc.shape, generator=torch.Generator().manual_seed(3)))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    x = tokens(9).round()
    h = sae.hidden_pre(x)
    z = (sae.gate(h) if kind == "gated" else h.relu()).detach()
    values, order = z.clamp(min=0).sort(dim=-1, descending=True, stable=True)
    sae = on_kernels(sae) if backend == "triton" else sae
    tied = False
    for k in (1, 4):
        want = torch.zeros_like(z).scatter(1, order[:, :k], values[:, :k])
        code = encode_sparse(sae, x, k=k)
        assert_rows(code)
        torch.testing.assert_close(code.to_dense(D_SAE), want, atol=1e-5, rtol=1e-5)
        tied |= bool((values[:, k - 1] == values[:, k]).any())
    assert tied


def test_a_topk_of_negative_codes_keeps_them():
    sae, x = make("signed topk"), tokens(9)
    with torch.no_grad():
        sae.b_enc.sub_(20)
    code = encode_sparse(sae, x)
    assert (code.values < 0).all()
    assert code.values.shape == (9, 6)
    torch.testing.assert_close(code.to_dense(D_SAE), sae.encode(x).detach())


@pytest.mark.parametrize(
    ("kind", "k", "backend"),
    [(kind, k, "cpu") for kind in KINDS for k in (None, 3)]
    + [("direct", None, "triton"), ("gated", None, "triton"), ("topk", None, "triton")],
)
def test_nan_is_an_error_that_names_the_token(kind, k, backend):
    sae, x = make(kind), tokens(9)
    sae = on_kernels(sae) if backend == "triton" else sae
    x[4, 2] = torch.nan
    with pytest.raises(NumericsError, match="token 4"):
        encode_sparse(sae, x, k=k)
    with torch.no_grad():
        sae.b_enc[11] = torch.nan
    with pytest.raises(NumericsError, match="weights"):
        encode_sparse(sae, tokens(3), k=k)


def test_encode_sparse_of_an_unknown_class_uses_its_encode():
    """Only `encode` is known of it; a subclass of a teacher may compute something else than the teacher."""

    class Odd(ReluSAE):
        def encode(self, x):
            return -super().encode(x)[..., :].where(torch.arange(self.d_sae) % 2 == 0, 0)

    sae, x = Odd(D_IN, D_SAE, generator=torch.Generator().manual_seed(0)), tokens(9)
    sae.backend = "triton"
    code = encode_sparse(sae, x)
    assert (code.values < 0).any()
    torch.testing.assert_close(code.to_dense(D_SAE), sae.encode(x).detach())
    assert encode_sparse(sae, x, k=2).counts.sum() == 0


@pytest.mark.parametrize("mode", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("kind", ["gated", "jumprelu", "topk"])
def test_an_sae_that_normalises_every_token(kind, mode):
    sae, x = make(kind, normalize_activations=mode), 3 * tokens(2, 4) + 1
    code = encode_sparse(sae, x)
    torch.testing.assert_close(code.to_dense(D_SAE), sae.encode(x).detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decode_sparse(sae, code, x), sae(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="normalises"):
        decode_sparse(sae, code)


@pytest.mark.parametrize("backend", ["cpu", "triton", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype, backend):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernels have no float64")
    sae, x = make("gated", dtype), tokens(9, dtype=dtype)
    z = sae.encode(x).detach()
    if backend == "triton":
        sae = on_kernels(sae)
    else:
        sae.backend = backend
    code = sae.encode_sparse(x)
    assert code.values.dtype == dtype
    # Where h rounds to theta's other side, codes differ by the amplitude; nowhere else.
    near = (sae.hidden_pre(x).double() - 0.9).abs() < 0.02
    tolerance = {"atol": 1e-2, "rtol": 2e-2} if dtype != torch.float64 else {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(code.to_dense(D_SAE).where(~near, 0), z.where(~near, 0), **tolerance)
    x_hat = sae.decode_sparse(code)
    assert x_hat.dtype == dtype
    torch.testing.assert_close(x_hat, sae.decode(code.to_dense(D_SAE)), **tolerance)


@pytest.mark.parametrize("kind", ["gated", "relu", "topk"])
def test_autocast(kind):
    sae, x = make(kind), tokens(9)
    with torch.autocast("cpu", torch.bfloat16):
        code, z = encode_sparse(sae, x), sae.encode(x)
        x_hat = decode_sparse(sae, code)
    if kind == "gated":
        assert code.values.dtype == z.dtype == torch.bfloat16
    torch.testing.assert_close(code.to_dense(D_SAE).float(), z.float().detach(), atol=0.05, rtol=0.02)
    torch.testing.assert_close(x_hat.float(), sae(x), atol=0.1, rtol=0.1)


def test_no_gradient_is_recorded_when_encoding():
    code = make("gated").encode_sparse(tokens(3).requires_grad_())
    assert not code.values.requires_grad


# -- SparseCode


@pytest.mark.parametrize("layout", [lambda z: z, lambda z: z.t().contiguous().t(), lambda z: z.repeat(1, 2)[:, :9]])
def test_from_dense_and_back(layout):
    z = torch.randn(20, 9, generator=torch.Generator().manual_seed(0))
    z[z.abs() < 0.8] = 0
    z[3], z[5, 2] = 0, torch.nan
    code = SparseCode.from_dense(layout(z), 4)
    used = torch.arange(code.values.shape[1]) < code.counts[:, None]
    assert torch.equal(code.counts, (z != 0).sum(1))
    assert torch.equal(code.indices[used], (z != 0).nonzero()[:, 1])
    torch.testing.assert_close(code.to_dense(9), z, equal_nan=True)
    assert SparseCode.from_dense(z[:0]).values.shape == (0, 1)


def test_to_dense_does_not_read_what_is_not_in_use():
    code = SparseCode(torch.tensor([[2.0, 9.0]]), torch.tensor([[0, 0]]), torch.tensor([1]))
    assert code.to_dense(3).tolist() == [[2, 0, 0]]
    values = code.values.clone().requires_grad_()
    code._replace(values=values).to_dense(3).sum().backward()
    assert values.grad.tolist() == [[1, 0]]


def test_bad_capacities_and_k_are_refused():
    sae, x = make("gated"), tokens(3)
    for capacity in (0, -1, 2.0, True):
        with pytest.raises(ConfigError, match="capacity"):
            sae.encode_sparse(x, capacity)
        with pytest.raises(ConfigError, match="k is"):
            sae.encode_sparse(x, k=capacity)
    with pytest.raises(ShapeError, match="d_in"):
        sae.encode_sparse(x[:, 1:])
    for kind in ("gated", "relu", "topk"):
        with pytest.raises(ConfigError, match="float64"):
            encode_sparse(make(kind), x.double())
    with pytest.raises(ShapeError, match="scalar"):
        SparseCode.from_dense(torch.tensor(1.0))
    code = sae.encode_sparse(x)
    bad = [
        (code._replace(counts=code.counts[1:]), "do not fit"),
        (code._replace(indices=code.indices[:, 1:]), "do not fit"),
        (code._replace(indices=code.indices + D_SAE), "d_sae is 70"),
        (code._replace(indices=code.indices - D_SAE), "d_sae is 70"),
        (code._replace(counts=code.counts + 100), "wide"),
        (code._replace(counts=code.counts - 100), "wide"),
        (code._replace(values=code.values.long()), "floats"),
        (code._replace(indices=code.indices.float()), "floats"),
    ]
    for one, reason in bad:
        with pytest.raises(ShapeError, match=reason):
            sae.decode_sparse(one)
        with pytest.raises(ShapeError, match=reason):
            one.to_dense(D_SAE)
