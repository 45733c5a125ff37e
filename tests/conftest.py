"""Shared by all tests: Triton's interpreter where there is no GPU, few threads, small real-looking SAEs."""

import os
import sys
from pathlib import Path

import pytest
import torch

# Before anything imports triton: the kernels then run on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# pytest's importlib mode puts no test folder on the path; some fixtures need what lies here.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def activations() -> torch.Tensor:
    return sparse_activations()


def sparse_activations() -> torch.Tensor:
    """Sparse combinations of 48 known directions plus noise, [2048, 16], mean norm 4 = sqrt(16)."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(48, 16, generator=generator)
    codes = torch.rand(2048, 48, generator=generator) * (torch.rand(2048, 48, generator=generator) < 0.06)
    x = codes @ directions + 0.02 * torch.randn(2048, 16, generator=generator) + 0.3
    return x * 4 / x.norm(dim=1).mean()
