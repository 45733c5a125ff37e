"""Inputs of the tests of encoders: kinds of gates, random tensors, and how far a value is from the truth."""

import torch

N, D, F = 37, 11, 24
KINDS = [
    ("direct", "rational", True, "soft"),
    ("direct", "rational", True, "rational"),
    ("direct", "rational", False, "soft"),
    ("gated", "rational", True, "soft"),
    ("gated", "rational", True, "rational"),
    ("gated", "rational", False, "soft"),
    ("gated", "identity", True, "rational"),
    ("gated", "identity", True, "soft"),
]


def inputs(p: int, q: int, sets: int, seed: int = 0, tokens: int = N) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    tensors = [normal(tokens, D), normal(D, F) / 3, normal(F) / 10, normal(D) / 10, normal(sets, p + 1)]
    tensors += [normal(sets, q) / 2, normal(sets) / 10, normal(sets).abs() + 0.5, normal(sets), normal(F).abs() / 5]
    return tensors, torch.full((F,), 0.3, dtype=torch.float64)


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    if truth.numel() == 0:
        return 0.0
    return float((value.double() - truth).norm() / truth.norm().clamp_min(1))
