"""Shared by all tests: Triton's interpreter where there is no GPU, one thread each, small real-looking SAEs."""

import functools
import os
import sys
from pathlib import Path

# Before torch and numpy are imported: on tensors this small several threads cost more than they give, and `make test`
# has a worker on every core.
os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
os.environ["OPENBLAS_NUM_THREADS"] = os.environ.get("OPENBLAS_NUM_THREADS", "1")

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


def pytest_collection_modifyitems(items):
    """Tests that share a module's fixture run on one worker (`--dist loadgroup`), so that it is made once."""
    for item in items:
        shared = [made[-1] for made in item._fixtureinfo.name2fixturedefs.values() if made[-1].scope == "module"]
        if shared and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(str(Path(item.fspath).relative_to(Path(__file__).parent))))


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


@pytest.fixture(scope="session")
def quick(tmp_path_factory):
    """One `rsae demo --quick`, in the user's cache: downloads and extraction are reused. Group "demo"."""
    from rsae_triton.activations import fetch
    from rsae_triton.commands.cli import main
    from rsae_triton.common.errors import SourceError

    try:
        for name in ("smollm2", "shakespeare", "kjv"):
            fetch(name)
    except SourceError as error:
        pytest.skip(f"the demo's files cannot be fetched: {error}")
    out = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--quick", "--out", str(out), "--figure", str(out / "figure.png")]) == 0
    return out
