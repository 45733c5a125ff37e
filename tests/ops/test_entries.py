"""Entries against the dense computation in float64: what is found, every function over it, every gradient."""

import pytest
import torch

from rsae_triton.ops import finding, native
from rsae_triton.ops.entries import collected, decode_at, encode_at, sum_at
from rsae_triton.ops.finding import can_screen, find_entries, find_largest, find_most

SHAPES = {
    "ragged": (65, 33, 130, 0.8),
    "two blocks": (40, 16, 1100, 1.5),
    "one token": (1, 8, 70, 0.3),
    "no tokens": (0, 8, 20, 0.0),
    "one feature": (7, 8, 1, 0.0),
    "all of them": (9, 8, 70, -99.0),
    "none of them": (9, 8, 70, 99.0),
}


@pytest.fixture(params=["compiled", "tiled", "two threads"])
def engine(request, monkeypatch):
    """The compiled loops, PyTorch's operations, and the compiled loops on more than one thread."""
    monkeypatch.setenv("RSAE_CPU_ENGINE", "tiled" if request.param == "tiled" else "")
    if request.param != "tiled" and native.library() is None:
        pytest.skip("no C++ compiler")
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if request.param == "two threads" else 1)
    yield request.param
    torch.set_num_threads(threads)


def tensors(n, d, f, level, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n + f)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    W_enc = (torch.randn(f, d, generator=generator, dtype=torch.float64) / d**0.5).t()
    b_enc = torch.randn(f, generator=generator, dtype=torch.float64) / 10
    W_dec = torch.randn(f, d, generator=generator, dtype=torch.float64)
    low = torch.full((f,), level, dtype=torch.float64)
    return [one.to(dtype) for one in (x, W_enc, b_enc, W_dec, low)]


def dense(entries, values, f):
    out = values.new_zeros(entries.n_tokens, f)
    out[entries.tokens, entries.features] = values
    return out


def check_order(entries, f):
    key = entries.features * max(entries.n_tokens, 1) + entries.tokens
    assert bool((key[1:] > key[:-1]).all())
    counts = torch.bincount(entries.features, minlength=f)
    assert entries.offsets.tolist() == [0, *counts.cumsum(0).tolist()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_entries_found_are_those_above_the_threshold(shape, dtype, engine):
    n, d, f, level = SHAPES[shape]
    x, W_enc, b_enc, _, low = tensors(n, d, f, level, dtype)
    h = x @ W_enc + b_enc
    found = find_entries(x, W_enc, b_enc, low)
    check_order(found, f)
    # Rounding may move what lies on the edge; nothing does here.
    assert float((h - low).abs().min() if h.numel() else 1) > 1e-6
    assert torch.equal(dense(found, torch.ones_like(found.values), f) > 0, h > low)
    torch.testing.assert_close(dense(found, found.values, f), torch.where(h > low, h, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_the_dense_computation(shape, dtype, together, engine):
    n, d, f, level = SHAPES[shape]

    def leaves(dtype):
        *found, low = tensors(n, d, f, level, dtype)
        return [one.requires_grad_() for one in found], low

    (x, W_enc, b_enc, W_dec), low = leaves(torch.float64)
    h = x @ W_enc + b_enc
    mask = h > low
    z = torch.where(mask, h * h, 0)
    expected = (((z * z) @ W_dec) * (z @ W_dec) - x).square().sum() + z.sum(0).square().sum()
    expected.backward()
    truth = [one.grad for one in (x, W_enc, b_enc, W_dec)]

    own, low = leaves(dtype)
    x, W_enc, b_enc, W_dec = own
    entries = find_entries(x, W_enc, b_enc, low)
    if together:
        W_enc, W_dec = collected(W_enc), collected(W_dec)
    h = encode_at(x, W_enc, b_enc, entries)
    z = h * h
    x_hat = decode_at(z * z, entries, W_dec) * decode_at(z, entries, W_dec)
    loss = (x_hat - x).square().sum() + sum_at(z, entries).square().sum()
    loss.backward()
    within = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(loss.double(), expected, rtol=within, atol=within)
    for name, leaf, true in zip(("x", "W_enc", "b_enc", "W_dec"), own, truth, strict=True):
        error = float((leaf.grad.double() - true).norm())
        assert error <= within * float(true.norm()) + within, f"{name}: {error}"


def test_a_matrix_without_entries_gets_no_gradient_and_one_used_outside_gets_both(engine):
    x, W_enc, b_enc, W_dec, low = tensors(20, 8, 30, 0.5)
    entries = find_entries(x, W_enc, b_enc, low)
    W_dec.requires_grad_()
    W = collected(W_dec)
    (decode_at(entries.values, entries, W).sum() + W.square().sum()).backward()
    per_feature = dense(entries, entries.values, 30).sum(0)
    torch.testing.assert_close(W_dec.grad, per_feature[:, None].expand(-1, 8) + 2 * W_dec.detach())


def test_nan_is_found_in_its_token_alone(engine):
    x, W_enc, b_enc, W_dec, low = tensors(50, 8, 30, 1.0, torch.float32)
    clean = find_entries(x, W_enc, b_enc, low)
    x[3, 2] = torch.nan
    found = find_entries(x, W_enc, b_enc, low)
    assert int((found.tokens == 3).sum()) == 30
    assert torch.equal(found.tokens[found.tokens != 3], clean.tokens[clean.tokens != 3])
    bad = decode_at(found.values, found, W_dec).isnan().any(1)
    assert bad.nonzero().flatten().tolist() == [3]


def test_gives_up_where_there_are_too_many(engine):
    x, W_enc, b_enc, _, low = tensors(50, 8, 2100, 0.0, torch.float32)
    count = len(find_entries(x, W_enc, b_enc, low).tokens)
    assert find_entries(x, W_enc, b_enc, low, most=count) is not None
    assert find_entries(x, W_enc, b_enc, low, most=count - 1) is None
    assert find_entries(x, W_enc, b_enc, low, most=100) is None


def test_memory_grows_while_entries_are_found(engine, monkeypatch):
    monkeypatch.setattr(finding, "BLOCK", 64)
    x, W_enc, b_enc, _, low = tensors(300, 8, 400, -99.0, torch.float32)
    found = find_entries(x, W_enc, b_enc, low)
    assert len(found.tokens) == 300 * 400
    check_order(found, 400)


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_screening_finds_the_same(scale, contiguous):
    x, W_enc, b_enc, _, low = tensors(130, 40, 2100, 1.2, torch.float32)
    if not can_screen(x, x.dtype):
        pytest.skip("no bfloat16 in hardware, or no compiler")
    x[7] *= scale  # a token such as BOS: its norm must not widen the others' margins
    W_enc = W_enc.contiguous() if contiguous else W_enc
    exact, screened = (find_entries(x, W_enc, b_enc, low, screened=one) for one in (False, True))
    h = x.double() @ W_enc.double() + b_enc.double()
    near = (h - low).abs() < 1e-5 * x.norm(dim=1, keepdim=True)
    places = [dense(one, torch.ones_like(one.values), 2100) > 0 for one in (exact, screened)]
    assert bool((places[0] == places[1])[~near].all())
    off = (dense(screened, screened.values, 2100) - torch.where(places[0], h, 0)).abs() / x.norm(dim=1, keepdim=True)
    assert float(off[~near].max()) < 1e-5


def test_a_screen_is_left_out_where_it_cannot_pay(monkeypatch):
    x, W_enc, b_enc, _, low = tensors(130, 40, 4200, 0.0, torch.float32)
    if not can_screen(x, x.dtype):
        pytest.skip("no bfloat16 in hardware, or no compiler")
    made, product = [], finding._Screens.product
    monkeypatch.setattr(finding._Screens, "product", lambda self, weights: made.append(1) or product(self, weights))
    found, exact = (find_entries(x, W_enc, b_enc, low, screened=one) for one in (True, False))
    assert len(made) == 1
    assert len(found.tokens) == pytest.approx(len(exact.tokens), rel=1e-4)
    assert find_entries(x, W_enc, b_enc, low + 3.5, screened=True) is not None
    assert len(made) == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_product_in_low_precision(dtype, engine):
    x, W_enc, b_enc, _, low = tensors(60, 32, 200, 1.0, torch.float32)
    found = find_entries(x, W_enc, b_enc, low, dtype=dtype)
    with torch.autocast("cpu", dtype):
        again = find_entries(x, W_enc, b_enc, low)
    assert torch.equal(found.tokens, again.tokens)
    assert torch.equal(found.values, again.values)
    h = (x.to(dtype) @ W_enc.to(dtype)).float() + b_enc
    assert found.values.dtype == torch.float32
    torch.testing.assert_close(found.values, h[found.tokens, found.features], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("least", [0.0, -torch.inf])
@pytest.mark.parametrize("k", [1, 5, 70])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_largest_of_each_token(k, least, dtype, engine):
    x, W_enc, b_enc, _, _ = tensors(37, 8, 70, 0.0, dtype)
    found = find_largest(x, W_enc, b_enc, k, least=least)
    check_order(found, 70)
    h = x @ W_enc + b_enc
    kept = h.topk(k, dim=1)
    expected = torch.zeros_like(h).scatter(1, kept.indices, kept.values)
    expected = expected.relu() if least == 0 else expected
    torch.testing.assert_close(dense(found, found.values, 70), expected, rtol=1e-5, atol=1e-5)


def test_ties_keep_the_features_with_the_lowest_index(engine):
    x, W_enc, b_enc = torch.ones(5, 4), torch.zeros(4, 1500), torch.ones(1500)
    b_enc[1100], b_enc[3] = 2.0, 0.0
    found = find_largest(x, W_enc, b_enc, 4)
    assert found.features.view(4, 5)[:, 0].tolist() == [0, 1, 2, 1100]


def test_top_k_with_nan_returns_none(engine):
    x, W_enc, b_enc, _, _ = tensors(37, 8, 70, 0.0, torch.float32)
    x[4, 4] = torch.nan
    assert find_largest(x, W_enc, b_enc, 3) is None
    assert find_most(x, W_enc, b_enc, 100) is None


@pytest.mark.parametrize("count", [1, 100, 700, 37 * 70])
def test_the_largest_of_the_batch(count, engine, monkeypatch):
    monkeypatch.setattr(finding, "BLOCK", 16)
    x, W_enc, b_enc, _, _ = tensors(37, 8, 70, 0.0, torch.float32)
    found, smallest = find_most(x, W_enc, b_enc, count)
    check_order(found, 70)
    values = (x @ W_enc + b_enc).relu()
    least = values.flatten().topk(count).values.min()
    torch.testing.assert_close(smallest, least, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        dense(found, found.values, 70), torch.where(values >= least - 1e-6, values, 0), rtol=1e-5, atol=1e-5
    )


def test_the_same_bits_every_time_and_on_any_number_of_threads():
    x, W_enc, b_enc, W_dec, low = tensors(200, 64, 1500, 1.2, torch.float32)

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            leaves = [one.clone().requires_grad_() for one in (W_enc, W_dec)]
            entries = find_entries(x, leaves[0], b_enc, low)
            h = encode_at(x, leaves[0], b_enc, entries)
            decode_at(h, entries, leaves[1]).square().sum().backward()
            return [entries.features, *(one.grad for one in leaves)]
        finally:
            torch.set_num_threads(before)

    first = run(1)
    for again in (run(1), run(3)) if native.library() is not None else (run(1),):
        # A BLAS adds up in another order on other threads; an element of a gradient may cancel, its norm does not.
        assert torch.equal(first[0], again[0])
        for a, b in zip(first[1:], again[1:], strict=True):
            assert float((a - b).norm()) <= 1e-5 * float(a.norm())
    for a, b in zip(first, run(1), strict=True):
        assert torch.equal(a, b)


def test_a_compiler_that_fails_is_reported_and_not_needed(monkeypatch, tmp_path):
    compiler = tmp_path / "broken-compiler"
    compiler.write_text("#!/bin/sh\necho no such option >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("RSAE_CPU_ENGINE", "")
    monkeypatch.setenv("RSAE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", str(compiler))
    x, W_enc, b_enc, _, low = tensors(20, 8, 30, 0.5, torch.float32)
    with pytest.warns(UserWarning, match="no such option"):
        found = find_entries(x, W_enc, b_enc, low)
    assert len(found.tokens)
