"""A round's search by the compiled loops and by PyTorch's operations, against plain formulas in float64."""

import pytest
import torch

from rsae_triton.ops import native
from rsae_triton.ops.entries import collected
from rsae_triton.ops.finding import find_entries
from rsae_triton.ops.search import by_token, search


@pytest.fixture(params=["compiled", "PyTorch"])
def engine(request, monkeypatch):
    if request.param == "PyTorch":
        monkeypatch.setenv("RSAE_CPU_ENGINE", "tiled")
    elif native.library() is None:
        pytest.skip("no compiler")


def case(n, d_in, d_sae, share, dtype=torch.float64):
    """Entries at `share` of all places, half of them open, and what a search takes, from float32 numbers."""
    generator = torch.Generator().manual_seed(n)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator).to(dtype)

    x, W = normal(n, d_in), torch.nn.functional.normalize(normal(d_sae, d_in))
    high = torch.full((d_sae,), float(torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - share))), dtype=dtype)
    there = find_entries(x, W.t(), torch.zeros(d_sae, dtype=dtype), high)
    opened = torch.rand(len(there.tokens), generator=generator) < 0.5
    z = torch.where(opened, normal(len(opened)), 0)
    leaves = [z, normal(len(opened)).abs() + 0.5, normal(n, d_in), W, torch.tensor(1e-2, dtype=dtype)]
    return by_token(there), opened, leaves


def plain(place, opened, z, weight, r, W, epsilon):
    """Dense and by autograd."""
    tokens, features, n = place.there.tokens, place.there.features, place.there.n_tokens

    def dense(values):
        return values.new_zeros(n, len(W)).index_put((tokens, features), values)

    e = r - dense(z) @ W
    g = torch.where(opened, weight * (e @ W.t())[tokens, features], 0)
    m = dense(g) @ W
    alpha = (m * e).sum(1) / (epsilon + m.square().sum(1))
    after = e - alpha[:, None] * m
    return z + alpha[tokens] * g, after, (after @ W.t())[tokens, features]


def gradients(function, leaves, wanted):
    leaves = [one.detach().clone().requires_grad_() for one in leaves]
    found = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    loss = sum((one * torch.randn(one.shape, generator=generator).to(one)).sum() for one in found if len(one) in wanted)
    return [one.detach() for one in found], torch.autograd.grad(loss, leaves)


SIZES = {
    "ragged": (61, 33, 70, 0.3),
    "wide": (40, 200, 90, 0.5),
    "one token": (1, 70, 40, 0.6),
    "one feature": (30, 64, 1, 0.4),
    "few": (200, 96, 50, 0.01),
    "none": (20, 16, 10, 1e-7),
}


@pytest.mark.parametrize("together", [False, True], ids=["apart", "collected"])
@pytest.mark.parametrize("name", SIZES)
def test_values_and_all_gradients(name, together, engine):
    place, opened, leaves = case(*SIZES[name])
    sizes = {len(opened), SIZES[name][0]}
    wanted, truth = gradients(lambda *own: plain(place, opened, *own), leaves, sizes)

    def run(z, weight, r, W, epsilon):
        W = collected(W) if together else W
        return search(z, weight, opened, r, W, epsilon, place, correct=True)

    for dtype, within in ((torch.float64, 1e-12), (torch.float32, 3e-5)):
        found, grads = gradients(run, [one.to(dtype) for one in leaves], sizes)
        for one, two in zip((*found, *grads), (*wanted, *truth), strict=True):
            assert one.dtype == dtype
            assert float((one.double() - two).norm()) <= within * (float(two.norm()) + 1)


def test_without_a_correction_the_rest_is_the_same_bits(engine):
    place, opened, leaves = case(61, 33, 70, 0.3, torch.float32)
    both = [search(*leaves[:2], opened, *leaves[2:], place, correct=correct) for correct in (True, False)]
    assert len(both[1][2]) == 0
    for one, two in zip(both[0][:2], both[1][:2], strict=True):
        assert torch.equal(one, two)
    # And the gradient is that of a loss that does not ask for it.
    wanted = gradients(lambda *own: plain(place, opened, *own)[:2], [one.double() for one in leaves], {len(opened), 61})
    found = gradients(
        lambda *own: search(*own[:2], opened, *own[2:], place, correct=False)[:2], leaves, {len(opened), 61}
    )
    for one, two in zip(found[1], wanted[1], strict=True):
        assert float((one.double() - two).norm()) <= 3e-5 * float(two.norm())


def test_bits_do_not_depend_on_the_number_of_threads(engine):
    place, opened, leaves = case(300, 100, 80, 0.3, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found, grads = gradients(
                lambda *own: search(*own[:2], opened, *own[2:], place, correct=True), leaves, {len(opened), 300}
            )
            results.append([*found, *grads])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for other in results[1:] for one, two in zip(results[0], other, strict=True))


def test_entries_in_the_order_of_their_tokens(engine):
    place, _, _ = case(61, 33, 70, 0.3)
    tokens, features = place.there.tokens[place.order], place.there.features[place.order]
    assert torch.equal(tokens * 70 + features, (tokens * 70 + features).sort().values)
    counts = torch.bincount(place.there.tokens, minlength=61)
    assert torch.equal(place.starts.diff(), counts)


def test_nan_stays_in_its_token(engine):
    place, opened, leaves = case(61, 33, 70, 0.3, torch.float32)
    clean = search(*leaves[:2], opened, *leaves[2:], place, correct=True)
    leaves[2][7, 3] = torch.nan
    found = search(*leaves[:2], opened, *leaves[2:], place, correct=True)
    own = place.there.tokens == 7
    assert bool(found[2][own].isnan().all())
    assert bool(found[0][own & opened].isnan().all())
    assert torch.equal(found[2][~own], clean[2][~own])
    assert torch.equal(found[0][~own], clean[0][~own])
