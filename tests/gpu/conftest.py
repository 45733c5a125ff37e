"""Tests that only a CUDA device can do. Without one they are skipped and say so; `make test-gpu` runs them."""

import sys
from pathlib import Path

import pytest
import torch

# They share gate_cases.py with the kernels' other tests.
sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))


def pytest_collection_modifyitems(items):
    here = str(Path(__file__).parent)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
