"""Data with a known structure, for tests that train."""

import torch


def sparse_activations() -> torch.Tensor:
    """Sparse combinations of 48 known directions plus noise, [2048, 16], mean norm 4 = sqrt(16)."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(48, 16, generator=generator)
    codes = torch.rand(2048, 48, generator=generator) * (torch.rand(2048, 48, generator=generator) < 0.06)
    x = codes @ directions + 0.02 * torch.randn(2048, 16, generator=generator) + 0.3
    return x * 4 / x.norm(dim=1).mean()
