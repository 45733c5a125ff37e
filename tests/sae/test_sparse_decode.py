"""The sparse decoder's gradients, on the CPU path and, in Triton's interpreter, on the kernels'."""

import pytest
import torch
from sparse_cases import make, on_kernels, tokens

from rsae_triton import SparseCode
from rsae_triton.common.errors import ConfigError
from rsae_triton.ops import sparse_ops


def decoder_inputs(dtype=torch.float64, n=7, d_sae=9, d_in=5):
    g = torch.Generator().manual_seed(2)
    z = torch.randn(n, d_sae, generator=g, dtype=torch.float64)
    z[z.abs() < 0.7] = 0
    z[2] = 0
    W, b = torch.randn(d_sae, d_in, generator=g), torch.randn(d_in, generator=g)
    return SparseCode.from_dense(z.to(dtype), 8), W.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()


def test_gradcheck():
    code, W, b = decoder_inputs()
    values = code.values.clone().requires_grad_()

    def run(values, W, b):
        return sparse_ops.sparse_decode(values, code.indices, code.counts, W, b, "cpu")

    assert torch.autograd.gradcheck(run, (values, W, b))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_the_operator_keeps_torchs_rules(backend):
    """Schema, fake kernel, autograd registration and AOTAutograd."""
    if backend == "triton":
        on_kernels(make("gated"))
    code, W, b = decoder_inputs(torch.float32)
    arguments = (code.values.clone().requires_grad_(), code.indices, code.counts, W, b, backend)
    torch.library.opcheck(sparse_ops.sparse_decode, arguments)


@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_gradients_equal_those_of_the_dense_decoder(backend, needs):
    if backend == "triton":
        on_kernels(make("gated"))
    code, W, b = decoder_inputs(torch.float32)
    leaves = [
        one.detach().clone().requires_grad_(bool(need)) for one, need in zip((code.values, W, b), needs, strict=True)
    ]
    dense = [
        one.detach().double().requires_grad_(bool(need)) for one, need in zip((code.values, W, b), needs, strict=True)
    ]
    g = torch.randn(7, 5)
    sparse_ops.sparse_decode(leaves[0], code.indices, code.counts, *leaves[1:], backend).backward(g)
    (code._replace(values=dense[0]).to_dense(9) @ dense[1] + dense[2]).backward(g.double())
    for one, truth, need in zip(leaves, dense, needs, strict=True):
        assert (one.grad is not None) == need
        if need:
            torch.testing.assert_close(one.grad.double(), truth.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_second_derivative_is_refused(backend):
    sae = make("gated")
    sae = on_kernels(sae) if backend == "triton" else sae
    x_hat = sae.decode_sparse(sae.encode_sparse(tokens(3)))
    (grad,) = torch.autograd.grad(x_hat.square().sum(), sae.W_dec, create_graph=True)
    with pytest.raises(ConfigError, match="once"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_gradients_are_summed_in_float32(dtype):
    """One feature on 3000 tokens: sums in bfloat16 would stop growing at 256."""
    values, indices = torch.ones(3000, 1, dtype=dtype), torch.zeros(3000, 1, dtype=torch.int64)
    W, b = torch.zeros(2, 3, dtype=dtype, requires_grad=True), torch.zeros(3, dtype=dtype, requires_grad=True)
    x_hat = sparse_ops.sparse_decode(values, indices, torch.ones(3000, dtype=torch.int64), W, b, "cpu")
    x_hat.backward(torch.ones_like(x_hat))
    assert W.grad.tolist() == [[torch.tensor(3000.0).to(dtype).item()] * 3, [0] * 3]
    assert b.grad.tolist() == [torch.tensor(3000.0).to(dtype).item()] * 3


def test_gradients_have_the_same_bits_in_every_run():
    sae, x = make("gated"), tokens(300)
    code = sae.encode_sparse(x)
    found = []
    for _ in range(2):
        sae.zero_grad()
        sae.decode_sparse(code).square().sum().backward()
        found.append((sae.W_dec.grad.clone(), sae.b_dec.grad.clone()))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_decoding_compiles_without_a_graph_break():
    sae, x = make("gated"), tokens(6)
    code = sae.encode_sparse(x)
    compiled = torch.compile(sae.decode_sparse, backend="aot_eager", fullgraph=True)
    x_hat = compiled(code)
    x_hat.sum().backward()
    torch.testing.assert_close(x_hat, sae(x), atol=1e-5, rtol=1e-5)
    assert sae.W_dec.grad is not None
