"""What the tests of documented encode rules share: random weights, TopK in numpy, and the comparison."""

import numpy as np
import torch

D_IN, D_SAE, K = 6, 20, 4
RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(0, 0.6, shape).astype(np.float32)


def topk(h, k):
    z = np.zeros_like(h)
    rows = np.arange(len(h))[:, None]
    best = np.argsort(-h, axis=1)[:, :k]
    z[rows, best] = h[rows, best]
    return z


def check(teacher, x, z, x_hat):
    x = torch.from_numpy(x)
    with torch.no_grad():
        assert (z != 0).any()
        np.testing.assert_allclose(teacher.encode(x).numpy(), z, atol=1e-5)
        np.testing.assert_allclose(teacher.decode(torch.from_numpy(z), x).numpy(), x_hat, atol=1e-5)
        np.testing.assert_allclose(teacher(x).numpy(), x_hat, atol=1e-5)
