"""Long training with coefficients pulled to where they hurt: no NaN, Q >= 1, gradients bounded. `make soak`: 20,000."""

import json
import math
import os
import shutil

import pytest
import torch
from synthetic import sparse_activations

from rsae_triton import FusedRationalSAE, upgrade
from rsae_triton.ops.encode import rational_encode
from rsae_triton.ops.reference import GateSpec, GateTensors
from rsae_triton.teachers import ReluSAE
from rsae_triton.training.loop import train
from rsae_triton.training.recipes import RECIPES

STEPS = int(os.environ.get("SOAK_STEPS", "150"))
HUGE = (1e3, 1e7, 1e20, 3e37)


def q_of(sae, backend):
    """Q on [-1, 1] - c as a backend computes it: the direct code of a gate whose numerator is 1 is 1 / Q."""
    (p, q), one, zero = sae.gate.degree, torch.ones(1), torch.zeros(1)
    with torch.no_grad():
        b, centre = sae.gate.denominator(), sae.gate.centre
        gate = GateTensors(torch.eye(1, p + 1), b, centre, one, one, zero, zero)
        t = torch.linspace(-1, 1, 201)[:, None]
        return 1 / rational_encode(t, torch.ones(1, 1), zero, None, gate, GateSpec(p, q, "direct"), backend)[0]


@pytest.mark.parametrize("form", ["gated", "direct"])
def test_soak_with_stressed_coefficients(form, tmp_path, capsys):
    """Rounds of training, each after a kick to the coefficients; they begin again from the fitted ones every ten.

    A kick may move a zero of B under large coefficients, where Q falls from 1e5 to 1: the error of that step is huge
    and so is its gradient, which is clipped. Finite it must be, and far from what overflows when it is squared.
    """
    x = sparse_activations()
    torch.manual_seed(0)
    teacher = ReluSAE(16, 48, generator=torch.Generator().manual_seed(1))
    train(teacher, x, steps=100, recipe="relu", batch_size=256, progress=False)
    sae = upgrade(teacher, x, form=form, degree=(5, 4))
    fitted = {name: one.clone() for name, one in sae.gate.state_dict().items()}
    recipe = "hard-trained" if form == "gated" else "paper"
    assert not RECIPES[recipe].frozen
    generator, rounds = torch.Generator().manual_seed(2), max(10, STEPS // 200)
    norms, ends, least, largest = [], [], float("inf"), 0.0
    for number in range(rounds):
        if number % 10 == 0:
            sae.gate.load_state_dict(fitted)
        with torch.no_grad():  # a kick that an optimiser would never make
            for one in (sae.gate.alpha, sae.gate.beta):
                one.mul_(1 + 0.5 * torch.randn(one.shape, generator=generator))
            sae.gate.beta.mul_(30.0 if number % 3 == 2 else 1.0)
        out = tmp_path / str(number)
        options = {"recipe": recipe, "batch_size": 256, "lr": 1e-3, "seed": number, "log_every": 1, "out": out}
        train(sae, x, steps=STEPS // rounds, progress=False, **options)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if "grad_norm" in row]
        assert len(rows) == STEPS // rounds
        assert all(math.isfinite(row["mse"]) and math.isfinite(row["grad_norm"]) for row in rows)
        norms += [row["grad_norm"] for row in rows]
        ends.append(norms[-1])
        q = torch.cat([q_of(sae, backend) for backend in ("eager", "cpu")])
        assert bool((q >= 1).all()), number  # NaN is not
        least = min(least, float(q.min()))
        largest = max(largest, float(sae.gate.denominator().detach().abs().max()))
        assert all(bool(one.isfinite().all()) for one in sae.state_dict().values())
        shutil.rmtree(out)
    if "SOAK_STEPS" in os.environ:
        with capsys.disabled():
            print(
                f"\nsoak, {form}: {len(norms)} steps, {rounds} kicks; Q >= {least:.6f}, |b| up to {largest:.3g}, "
                f"gradient norms up to {max(norms):.3g} (median {sorted(norms)[len(norms) // 2]:.3g}, at the end of a "
                f"round up to {max(ends):.3g}), "
                f"mse of the last step {rows[-1]['mse']:.4g}"
            )
    assert max(norms) < 1e12


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
        assert bool((q_of(sae, backend) >= 1).all())
        for name, one in sae.named_parameters():
            assert one.grad is None or bool(one.grad.isfinite().all()), (b, name)
