"""Long training with coefficients pulled to where they hurt: no NaN, Q >= 1, gradients bounded. `make soak`: 20,000."""

import os

import pytest
import torch
from synthetic import sparse_activations

from rsae_triton import FusedRationalSAE, upgrade
from rsae_triton.recipes import RECIPES
from rsae_triton.reference import horner
from rsae_triton.teachers import ReluSAE
from rsae_triton.train import train

STEPS = int(os.environ.get("SOAK_STEPS", "150"))
HUGE = (1e3, 1e7, 1e20, 3e37)


def q_of(sae):
    """Q = 1 + |B(s)| on [-1, 1] - c, by group and point, as every backend computes it."""
    gate = sae.gate
    s = torch.linspace(-1, 1, 201)[:, None] - gate.centre.detach()
    return 1 + (horner(s, gate.denominator().detach()) * s).abs()


@pytest.mark.parametrize("form", ["gated", "direct"])
def test_soak_with_stressed_coefficients(form):
    x = sparse_activations()
    torch.manual_seed(0)
    teacher = ReluSAE(16, 48, generator=torch.Generator().manual_seed(1))
    train(teacher, x, steps=100, recipe="relu", batch_size=256, progress=False)
    sae = upgrade(teacher, x, form=form, degree=(5, 4))
    recipe = "hard-trained" if form == "gated" else "paper"
    assert not RECIPES[recipe].frozen
    generator, rounds = torch.Generator().manual_seed(2), 10
    for number in range(rounds):
        with torch.no_grad():  # a kick that an optimiser would never make
            for one in (sae.gate.alpha, sae.gate.beta):
                one.mul_(1 + 0.5 * torch.randn(one.shape, generator=generator))
            sae.gate.beta.mul_(30.0 if number % 3 == 2 else 1.0)
        log = train(sae, x, steps=STEPS // rounds, recipe=recipe, batch_size=256, lr=1e-3, seed=number, progress=False)
        assert all(map(torch.isfinite, map(torch.tensor, log.mse)))
        assert bool((q_of(sae) >= 1).all())
        assert all(bool(one.isfinite().all()) for one in sae.state_dict().values())
        sae.zero_grad()
        sae.autoencode(x[:256], l1_weight=1e-3).total.backward()
        norm = torch.nn.utils.get_total_norm([one.grad for one in sae.parameters() if one.grad is not None])
        assert bool(norm.isfinite())
        assert float(norm) < 1e6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["gated", "direct"])
@pytest.mark.parametrize("backend", ["eager", "cpu", "triton"])
def test_huge_denominators_stay_finite(backend, form, dtype):
    """The safe form divides by 1 + |B|: a denominator of any size makes the gate small, never infinite."""
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    for b in HUGE:
        sae = FusedRationalSAE(16, 40, form=form, degree=(3, 2), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            sae.gate.beta.copy_(torch.tensor([[b, -b]]) / sae.gate.denominator_scale)
        sae = sae.to(dtype)
        sae.backend = backend
        z, counts = sae.encode_with_counts(x)
        x_hat = sae.decode(z)
        (x_hat.float().square().sum() + (counts.sum() if form == "gated" else 0)).backward()
        assert bool(x_hat.isfinite().all()), b
        assert bool((q_of(sae) >= 1).all())
        for name, one in sae.named_parameters():
            assert one.grad is None or bool(one.grad.isfinite().all()), (b, name)
