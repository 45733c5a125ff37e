"""The published initialiser, kept for comparison: it must be the real procedure and must not pass for a proof."""

import json

import numpy as np
import pytest
import torch

from rsae_triton.remez import GateFit, fit_gate, relaxed
from rsae_triton.remez.problem import make_problem

GATES = [("relu", (3, 2), {}), ("jumprelu", (5, 4), {"theta": 0.1, "margin": 0.02})]


@pytest.mark.parametrize(("target", "degree", "place"), GATES)
def test_relaxed_remez_fits_worse_and_is_uncertified(target, degree, place):
    fit = fit_gate(target, degree, method="relaxed_remez", **place)
    best = fit_gate(target, degree, **place)
    assert 1.2 * best.error < fit.error < 0.5
    assert fit.mse > best.mse
    assert fit.certificate == "none"
    assert fit.lower_bound == fit.ratio == 0.0
    assert "UNCERTIFIED" in repr(fit)
    assert "UNCERTIFIED" not in repr(best)
    t = np.linspace(-1, 1, 20_001)
    t = t[np.abs(t - fit.theta) >= fit.margin]
    worst = np.max(np.abs(fit(t) - np.where(t > fit.theta, t, 0.0)))
    assert 0.99 * fit.error < worst <= fit.error * (1 + 1e-9)
    assert repr(GateFit.from_dict(json.loads(json.dumps(fit.to_dict())))) == repr(fit)


def test_the_steps_are_adams_on_the_published_loss(monkeypatch):
    """Against torch: its Adam, its gradients, the loss in the authors' words."""
    monkeypatch.setattr(relaxed, "STEPS", 200)
    problem, (p, q) = make_problem("step", 0.2, 0.05), (4, 3)
    ours = relaxed.solve_relaxed(problem, p, q, seed=3)
    monkeypatch.setattr(relaxed, "STEPS", 0)
    start = relaxed.solve_relaxed(problem, p, q, seed=3)

    a = torch.tensor(start.a, requires_grad=True)
    b = torch.tensor(start.d[1:], requires_grad=True)
    level = torch.tensor(1e-8, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([a, b, level], lr=1e-2, betas=(0.5, 0.99), weight_decay=5e-4)
    t = torch.tensor(relaxed.nodes(problem, p + q + 2))
    label, sign = (t > 0.2).double(), torch.tensor([1.0, -1.0] * 5)[: p + q + 2].double()
    for _ in range(200):
        numerator = sum(a[k] * t**k for k in range(p + 1))
        denominator = 1 + sum(b[j - 1] * t**j for j in range(1, q + 1)).abs()
        residual = numerator / denominator - label
        loss = ((residual - sign * level) ** 2).mean() + torch.relu(-sign * residual).sum() + residual.abs().max()
        adam.zero_grad()
        loss.backward()
        adam.step()
    np.testing.assert_allclose(ours.a, a.detach().numpy(), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(ours.d[1:], b.detach().numpy(), rtol=1e-6, atol=1e-9)


def test_nodes_avoid_the_gap():
    problem = make_problem("step", 0.3, 0.1)
    t = relaxed.nodes(problem, 19)
    assert len(np.unique(t)) == 19
    assert np.all(np.diff(t) > 0)
    assert np.all(np.abs(t - 0.3) >= 0.1 - 1e-12)
    assert -1 < t[0] < t[-1] < 1
