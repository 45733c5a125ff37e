"""Tests of rsae_triton.kernels. On a GPU where there is one, in Triton's interpreter on the CPU otherwise.

The interpreter has to be switched on before triton is first imported: here, at the latest.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# pytest's importlib mode puts no test folder on the path; the tests share gate_cases.py.
sys.path.insert(0, str(Path(__file__).parent))


def pytest_report_header() -> str:
    where = torch.cuda.get_device_name() if GPU else "no CUDA device: Triton's interpreter (TRITON_INTERPRET=1)"
    return f"kernels: {where}"


def pytest_collection_modifyitems(items) -> None:
    """`pytest -m gpu` on a GPU is these tests too, with the compiler in place of the interpreter."""
    here = str(Path(__file__).parent)
    for item in items:
        if GPU and str(item.path).startswith(here) and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> str:
    if GPU:
        return "cuda"
    from rsae_triton.kernels import INTERPRETED

    assert INTERPRETED, "triton was imported before tests/kernels/conftest.py could set TRITON_INTERPRET=1"
    return "cpu"


def pytest_terminal_summary(terminalreporter) -> None:
    from gate_cases import WORST

    if WORST:
        worst = ", ".join(f"{name} {excess:.1e}" for name, excess in sorted(WORST.items()))
        terminalreporter.write_line(f"kernels: largest error beyond torch's own in the same dtype: {worst}")
