"""Shared by all tests: Triton's interpreter where there is no GPU, few threads, small real-looking SAEs."""

import os
import sys
from pathlib import Path

import pytest
import torch

# Before anything imports triton: the kernels then run on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# pytest's importlib mode puts no test folder on the path; tests share synthetic.py and remez/random_gates.py.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def activations() -> torch.Tensor:
    from synthetic import sparse_activations

    return sparse_activations()
