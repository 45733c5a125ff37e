"""Fixtures of the report's tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from rsae_triton.evaluation import compare

# pytest's importlib mode puts no test folder on the path; the tests share report_cases.py.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def x():
    from report_cases import D_IN, LENGTH, N_SEQUENCES, generator

    return torch.randn(N_SEQUENCES * (LENGTH - 1), D_IN, generator=generator(0))


@pytest.fixture
def saes():
    from report_cases import make_saes

    return make_saes()


@pytest.fixture
def metrics(saes, x):
    """metrics.json of reconstruction alone: no downstream scores."""
    return compare(saes, x)


@pytest.fixture
def logs():
    from report_cases import make_log

    return {"teacher": None, "rsae": make_log(1), "control": make_log(2).as_dict()}


@pytest.fixture
def store():
    from report_cases import FakeStore

    return FakeStore()
