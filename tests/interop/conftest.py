"""Tests that run other people's libraries: `make test-interop`. Each skips where its library is not installed."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomise(module: torch.nn.Module, scale: float = 0.3) -> None:
    """Every parameter random, so that nothing that is left out or transposed can go unnoticed."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, scale)
