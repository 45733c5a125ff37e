"""sparse_decode and its gradients against float64, beside torch.nn.functional.embedding_bag in the same dtype."""

from importlib import import_module

import pytest
import torch
from gate_cases import DTYPES, assert_as_good_as_torch, name_of
from torch.nn.functional import embedding_bag

from rsae_triton.kernels import sparse_decode, sparse_decode_dvalues, sparse_decode_dweight

# Of the largest reconstruction, or of the sum of the terms' absolute values: float32 sums in another order.
TOLERANCE = 1e-6
SHAPE = (13, 40, 70, 11)  # n_tokens, d_sae, d_in, width


def rows(dtype, shape=SHAPE, seed=0):
    """Rows of every length from 0 to the width; behind what is in use there is rubbish that must not be read."""
    n_tokens, d_sae, _, width = shape
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, width + 1, (n_tokens,), generator=g)
    counts[: min(n_tokens, 2)] = torch.tensor([0, width])[: min(n_tokens, 2)]
    indices = torch.stack([torch.randperm(d_sae, generator=g)[:width].sort().values for _ in range(n_tokens)])
    used = torch.arange(width) < counts[:, None]
    values = torch.where(used, torch.randn(n_tokens, width, generator=g), torch.nan).to(dtype)
    return values, torch.where(used, indices, -7), counts


def weights(dtype, shape=SHAPE):
    g = torch.Generator().manual_seed(5)
    W, b, g_out = (torch.randn(*size, generator=g) for size in (shape[1:3], shape[2:3], (shape[0], shape[2])))
    return W.to(dtype), b.to(dtype), g_out.to(dtype)


def dense(values, indices, counts, d_sae, dtype=torch.float64):
    used = torch.arange(values.shape[1]) < counts[:, None]
    code = torch.zeros(len(values), d_sae, dtype=dtype)
    return code.scatter_add(1, indices.where(used, 0), values.where(used, 0).to(dtype))


def torchs(values, indices, counts, W, b, g):
    """embedding_bag and its gradients, in the dtype of its arguments."""
    used = torch.arange(values.shape[1]) < counts[:, None]
    kept, W = values[used].requires_grad_(), W.clone().requires_grad_()
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    x_hat = embedding_bag(indices[used], W, starts, mode="sum", per_sample_weights=kept, include_last_offset=True) + b
    dvalues, dW = torch.autograd.grad(x_hat, (kept, W), g)
    full = torch.zeros_like(values)
    full[used] = dvalues
    return x_hat.detach(), full, dW


def check(dtype, device, shape=SHAPE, arrange=lambda t: t):
    code, (W, b, g) = rows(dtype, shape), weights(dtype, shape)
    z = dense(*code, shape[1])
    used = torch.arange(shape[3]) < code[2][:, None]
    truth = z @ W.double() + b.double()
    dvalues = (g.double() @ W.double().T).gather(1, code[1].clamp(min=0)) * used
    theirs = torchs(*code, W, b, g)
    on = [arrange(t.to(device)) for t in code]
    W_on, g_on = arrange(W.to(device)), arrange(g.to(device))
    x_hat = sparse_decode(*on, W_on, b.to(device))
    assert x_hat.dtype == dtype
    assert_as_good_as_torch("x_hat", x_hat, truth, theirs[0], TOLERANCE)
    found = sparse_decode_dvalues(g_on, *on, W_on)
    assert found.dtype == dtype
    assert (found.cpu()[~used] == 0).all()
    scale = (g.double().abs() @ W.double().abs().T).gather(1, code[1].clamp(min=0))
    assert_as_good_as_torch("dvalues", found, dvalues, theirs[1], TOLERANCE, scale)
    found = sparse_decode_dweight(g_on, *on, W_on)
    assert found.dtype == dtype
    scale = z.abs().T @ g.double().abs()
    assert_as_good_as_torch("dW_dec", found, z.T @ g.double(), theirs[2], TOLERANCE, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_every_dtype(dtype, device):
    check(dtype, device)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 9, 513, 9), (40, 3, 5, 2), (2, 30, 1100, 17)], ids=str)
def test_ragged_shapes(shape, device):
    check(torch.float32, device, shape)


def test_strides_and_narrow_integers(device):
    check(torch.float32, device, arrange=lambda t: t.repeat_interleave(2, dim=0)[::2])
    code, (W, b, _) = rows(torch.float32), weights(torch.float32)
    values, indices, counts = (t.to(device) for t in code)
    assert torch.equal(
        sparse_decode(values, indices.int(), counts.int(), W.to(device), b.to(device)),
        sparse_decode(values, indices, counts, W.to(device), b.to(device)),
    )


def test_mixed_dtypes_promote(device):
    """bfloat16 codes (from autocast) beside float32 weights: products and result are float32."""
    values, indices, counts = rows(torch.bfloat16)
    W, b, g = weights(torch.float32)
    x_hat = sparse_decode(*(t.to(device) for t in (values, indices, counts, W, b)))
    assert x_hat.dtype == torch.float32
    truth = dense(values, indices, counts, SHAPE[1]) @ W.double() + b.double()
    assert (x_hat.cpu() - truth).abs().max() < 1e-5
    on = [t.to(device) for t in (g, values, indices, counts, W)]
    assert sparse_decode_dvalues(*on).dtype == torch.bfloat16
    assert sparse_decode_dweight(*on).dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_feature_with_many_entries_is_summed_in_runs(dtype, device, monkeypatch):
    """A feature that is active on every token has several programs, added afterwards, in float32 until the end."""
    monkeypatch.setattr(import_module("rsae_triton.kernels.sparse_decode"), "RUN", 5)
    check(dtype, device, (60, 4, 9, 3))


@pytest.mark.parametrize("wrong", [-1, 40, 2**40])
def test_an_index_out_of_range_is_not_read_and_gives_nan(wrong, device):
    values, indices, counts = (t.to(device) for t in rows(torch.float32))
    W, b, g = (t.to(device) for t in weights(torch.float32))
    indices[1, 4] = wrong
    x_hat = sparse_decode(values, indices, counts, W, b)
    assert x_hat.isnan().all(1).nonzero().flatten().tolist() == [1]
    assert x_hat.isnan().any(1).sum() == 1
    dvalues = sparse_decode_dvalues(g, values, indices, counts, W)
    assert dvalues.isnan().nonzero().tolist() == [[1, 4]]
    counts[1], values[1, 4] = 11, 0
    dW = sparse_decode_dweight(g, values, indices, counts, W)
    want = sparse_decode_dweight(g, values, indices.where(indices != wrong, 0), counts, W)
    assert torch.equal(dW, want)


def test_nan_and_infinity_of_rows_that_are_not_read_stay_there(device):
    values, indices, counts = rows(torch.float32)
    W, b, _ = weights(torch.float32)
    code = dense(values, indices, counts, SHAPE[1])
    W[(code != 0).sum(0).argmin()] = torch.nan
    touched = (code[:, (code != 0).sum(0).argmin()] != 0).nonzero().flatten().tolist()
    x_hat = sparse_decode(*(t.to(device) for t in (values, indices, counts, W, b)))
    assert x_hat.isnan().any(1).nonzero().flatten().tolist() == touched
    assert len(touched) < len(code)


def test_bit_reproducible(device, monkeypatch):
    monkeypatch.setattr(import_module("rsae_triton.kernels.sparse_decode"), "RUN", 5)
    code = [t.to(device) for t in rows(torch.float32)]
    W, b, g = (t.to(device) for t in weights(torch.float32))
    for run in (lambda: sparse_decode(*code, W, b), lambda: sparse_decode_dvalues(g, *code, W),
                lambda: sparse_decode_dweight(g, *code, W)):  # fmt: skip
        assert torch.equal(run(), run())


@pytest.mark.parametrize("shape", [(0, 5, 4, 3), (3, 5, 4, 0), (3, 5, 0, 2), (3, 0, 4, 0)], ids=str)
def test_nothing_to_do(shape, device):
    n_tokens, d_sae, d_in, width = shape
    values, counts = torch.zeros(n_tokens, width, device=device), torch.zeros(n_tokens, device=device).long()
    W, b, g = torch.ones(d_sae, d_in, device=device), torch.ones(d_in, device=device), torch.ones(n_tokens, d_in)
    code = (values, values.long(), counts, W)
    assert torch.equal(sparse_decode(*code, b).cpu(), torch.ones(n_tokens, d_in))
    assert sparse_decode_dvalues(g.to(device), *code).shape == (n_tokens, width)
    assert torch.equal(sparse_decode_dweight(g.to(device), *code).cpu(), torch.zeros(d_sae, d_in))


def test_parts_that_do_not_fit_are_refused(device):
    values, indices, counts = (t.to(device) for t in rows(torch.float32))
    W, b, g = (t.to(device) for t in weights(torch.float32))
    for code in ((values[:, 1:], indices, counts), (values, indices, counts[1:]), (values[0], indices[0], counts[0])):
        with pytest.raises(ValueError, match="do not fit"):
            sparse_decode(*code, W, b)
        with pytest.raises(ValueError, match="do not fit"):
            sparse_decode_dvalues(g, *code, W)
        with pytest.raises(ValueError, match="do not fit"):
            sparse_decode_dweight(g, *code, W)
