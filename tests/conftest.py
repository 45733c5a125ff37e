"""Shared by all tests: Triton's interpreter where there is no GPU, few threads, small real-looking SAEs."""

import functools
import os
import sys
from pathlib import Path

import pytest
import torch

# Before anything imports triton: the kernels then run on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# pytest's importlib mode puts no test folder on the path; tests share helpers/ and remez/random_gates.py.
sys.path[:0] = [str(Path(__file__).parent / "helpers"), str(Path(__file__).parent)]


def untraced(function):
    """`function` with the trace function (coverage's, a debugger's) off while it runs."""

    @functools.wraps(function)
    def run(*arguments, **named):
        tracing = sys.gettrace()
        sys.settrace(None)
        try:
            return function(*arguments, **named)
        finally:
            sys.settrace(tracing)

    return run


@pytest.fixture(scope="session", autouse=True)
def kernels_are_not_traced():
    """Interpreting a kernel calls a function for every number; tracing each would double the time of the tests.

    Coverage leaves kernels out (pyproject.toml): only the lines that launch them count.
    """
    if sys.gettrace() is not None and os.environ.get("TRITON_INTERPRET") == "1":
        from triton.runtime.interpreter import GridExecutor

        GridExecutor.__call__ = untraced(GridExecutor.__call__)


@pytest.fixture
def activations() -> torch.Tensor:
    from synthetic import sparse_activations

    return sparse_activations()
