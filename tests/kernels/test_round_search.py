"""A round's search by Triton kernels, and encoders with rounds that are made of them, against float64."""

import pytest
import torch

from rsae_triton import RationalGate, fit_gate
from rsae_triton.kernels.round_search import SEARCH_COLUMNS, round_search, round_search_back
from rsae_triton.ops import rounds
from rsae_triton.ops.entries import Entries
from rsae_triton.ops.entry_loops import offsets_of
from rsae_triton.ops.reference import GateSpec, GateTensors
from rsae_triton.ops.rounds import RoundTensors
from rsae_triton.ops.search import by_token, search

SPEC = GateSpec(3, 2, "gated", backward="rational")
SHAPES = {
    "ragged": (7, 21, 33, 0.4), "whole rows": (4, 32, 16, 0.9), "one token": (1, 5, 40, 0.5), "narrow": (9, 3, 12, 0.3),
    "no entries": (5, 8, 6, 0.0), "no tokens": (0, 8, 6, 0.5),
}  # fmt: skip


def case(n, d_in, d_sae, share, dtype=torch.float32, device="cpu"):
    """Entries at `share` of all places, half of them open, and what a search takes, W rounded to `dtype`."""
    generator = torch.Generator().manual_seed(n + d_in)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator)

    features, tokens = (torch.rand(d_sae, n, generator=generator) < share).nonzero(as_tuple=True)
    opened = torch.rand(len(tokens), generator=generator) < 0.5
    there = Entries(tokens, features, normal(len(tokens)), offsets_of(features, d_sae), n)
    W = torch.nn.functional.normalize(normal(d_sae, d_in)).to(dtype)
    given = [torch.where(opened, normal(len(tokens)), 0), normal(len(tokens)).abs() + 0.5, normal(n, d_in), W,
             torch.tensor(1e-2)]  # fmt: skip
    there = Entries(*(one.to(device) if isinstance(one, torch.Tensor) else one for one in there))
    return there, opened.to(device), [one.to(device) for one in given]


def close(found, wanted, within):
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    assert float((found - wanted).norm()) <= within * (float(wanted.norm()) + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients_are_those_of_float64(name, dtype, device):
    there, opened, given = case(*SHAPES[name], dtype, device)
    place = by_token(there)._replace(triton=True)
    results = {}
    for way in ("kernels", "float64"):
        leaves = [one.detach().clone() if way == "kernels" else one.detach().double() for one in given]
        leaves = [one.requires_grad_() for one in leaves]
        found = search(*leaves[:2], opened, *leaves[2:], place, correct=True)
        generator = torch.Generator().manual_seed(1)
        loss = sum((one * torch.randn(one.shape, generator=generator).to(one)).sum() for one in found)
        results[way] = [*found, *torch.autograd.grad(loss, leaves)]
    for found, wanted in zip(results["kernels"], results["float64"], strict=True):
        # dW is rounded to W's dtype at the end.
        close(found, wanted, 3e-6 if found.dtype == torch.float32 else 5e-3)


def test_without_a_correction_and_without_some_gradients(device):
    there, opened, (z, weight, r, W, epsilon) = case(7, 21, 33, 0.4, device=device)
    place = by_token(there)
    rest = (there.features, place.order, place.starts)
    whole = round_search(z, weight, r, W, epsilon, opened, *rest, correct=True)
    found = round_search(z, weight, r, W, epsilon, opened, *rest, correct=False)
    assert len(found.raw) == 0
    assert all(torch.equal(getattr(found, name), getattr(whole, name)) for name in ("y", "c", "e", "m", "alpha"))
    dy = torch.randn(len(z), generator=torch.Generator().manual_seed(2)).to(device)
    bare = round_search_back(found, weight, W, epsilon, opened, *rest, dy, None, None)
    zeros = round_search_back(found, weight, W, epsilon, opened, *rest, dy, torch.zeros_like(r), torch.zeros_like(z))
    for one, two in zip(bare, zeros, strict=True):
        close(one, two, 1e-6)


def test_nan_stays_in_its_token(device):
    there, opened, (z, weight, r, W, epsilon) = case(7, 21, 33, 0.4, device=device)
    place = by_token(there)
    rest = (epsilon, opened, there.features, place.order, place.starts)
    clean = round_search(z, weight, r, W, *rest, correct=True)
    r[3, 2] = torch.nan
    found = round_search(z, weight, r, W, *rest, correct=True)
    own = there.tokens == 3
    assert bool(found.raw[own].isnan().all())
    assert torch.equal(found.raw[~own], clean.raw[~own])


def test_what_does_not_fit_is_refused(device):
    there, opened, (z, weight, r, W, epsilon) = case(7, 21, 33, 0.4, device=device)
    place = by_token(there)
    rest = (epsilon, opened, there.features, place.order, place.starts)
    with pytest.raises(ValueError, match="do not fit"):
        round_search(z, weight, r[:, :5], W, *rest, correct=True)
    wide = torch.zeros(33, SEARCH_COLUMNS + 1, device=device)
    with pytest.raises(ValueError, match="do not fit"):
        round_search(z, weight, wide[:7], wide, *rest, correct=True)
    with pytest.raises(ValueError, match="float32"):
        round_search(z.double(), weight, r, W, *rest, correct=True)


@pytest.mark.parametrize(
    ("dtype", "groups", "weighed"), [(torch.float32, 1, False), (torch.bfloat16, 18, False), (torch.bfloat16, 1, True)]
)
def test_an_encoder_with_rounds(dtype, groups, weighed, device):
    """All of it: the candidates, gates, searches and matrices' gradients."""
    n, d_in, d_sae, further = 5, 9, 18, 1
    generator = torch.Generator().manual_seed(3)

    def random(*sizes):
        return torch.rand(*sizes, generator=generator)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator)

    W_dec = torch.nn.functional.normalize(normal(d_sae, d_in))
    inputs = [normal(n, d_in), W_dec.t() + 0.1 * normal(d_in, d_sae), 0.1 * random(d_sae), W_dec, 0.1 * random(d_in)]
    inputs = [one.to(dtype).to(device) for one in inputs]
    made = RationalGate.from_fit(
        fit_gate("ramp", (3, 2)), d_sae, form="gated", groups=groups, input_scale=0.4,
        threshold=0.3 + 0.1 * random(d_sae),
    )  # fmt: skip
    gate = GateTensors(*(one.detach().to(device) for one in made.tensors()))
    more = RoundTensors(
        0.3 + 0.2 * random(further, d_sae), 0.7 + 0.2 * random(further, d_sae), 0.6 + 0.2 * random(further, d_sae),
        0.3 + 0.2 * random(further, d_sae), 1 + 0.3 * random(further + 1, d_sae), 1 + 0.1 * random(d_sae),
        torch.tensor(1e-3),
    )  # fmt: skip
    more = [one.to(device) for one in (*more[:7], *[0.3 + random(d_in)] * weighed)]
    # h is rounded in the narrow dtypes: the same h goes into both, so that no decision depends on it.
    h = ((inputs[0] - inputs[4]) @ inputs[1]).float() + inputs[2].float()
    results = []
    for narrow in (True, False):
        parts = [*inputs, *gate, *more] if narrow else [one.double() for one in (*inputs, *gate, *more)]
        wanted = [one.detach().clone() for one in parts]
        places = [1, 2, 3, 4, 10, *range(12, 19)] if dtype == torch.float32 else [3, 4, 10, *range(12, 19)]
        leaves = [wanted[place].requires_grad_() for place in places]
        given = (*wanted[:5], GateTensors(*wanted[5:12]), SPEC, RoundTensors(*wanted[12:]))
        hidden = {} if dtype == torch.float32 else {"hidden": h if narrow else h.double()}
        if narrow:
            code = rounds.on_entries(*given, triton=True, **hidden)
            z = code.values.new_zeros(n * d_sae).index_put(
                (code.there.tokens * d_sae + code.there.features,), code.values
            )
            z, counts, l1, e = z.view(n, d_sae), code.counts, code.l1, code.residual
        else:
            z, counts, l1 = rounds.reference(*given, **hidden)
            e = given[0] - given[4] - z @ given[3]
        loss = e.square().sum() + (z * torch.linspace(0, 1, d_sae).to(z)).sum() + counts.sum() + l1.sum()
        results.append([z, counts, l1, e, *torch.autograd.grad(loss, leaves, allow_unused=True)])
    assert torch.equal(results[0][0] != 0, results[1][0] != 0)
    assert 0.05 < float((results[1][0] != 0).double().mean()) < 0.9
    for found, wanted in zip(*results, strict=True):
        if found is None or wanted is None:
            assert not any(one is not None and bool(one.any()) for one in (found, wanted))
        else:
            close(found, wanted, 1e-5 if found.dtype == torch.float32 else 1e-2)
