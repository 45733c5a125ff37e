"""Options of the suite, and the JSON that it writes: `pytest benchmarks --bench-out FILE` (see the Makefile)."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

# The benchmarks are no package, and pytest's importlib mode puts no folder on the path.
sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rsae benchmarks")
    group.addoption("--bench-device", default="cpu", choices=("cpu", "cuda"))
    group.addoption("--bench-sizes", default="full", choices=("full", "tiny"), help="tiny: a test of the program")
    group.addoption("--bench-minutes", type=float, default=9.0, help="cases that would start later are left out")
    group.addoption("--bench-threads", type=int, default=1, help="CPU threads; with one the clock is CPU time")
    group.addoption("--bench-tokens", type=int, default=0, help="n_tokens of all cases but the sweeps; 0: as listed")
    group.addoption("--bench-resume", action="store_true", help="keep the cases that --bench-out already has")
    group.addoption("--bench-out", type=Path, default=None, help="the JSON file; nothing is written without")


class Session:
    """What the cases share: device, clock, ceilings, the time that is left, and the results."""

    def __init__(self, config: pytest.Config) -> None:
        from measuring import ceilings, environment

        from rsae_triton.report.speed import read_result

        self.began = time.perf_counter()
        self.device = torch.device(config.getoption("--bench-device"))
        self.tiny = config.getoption("--bench-sizes") == "tiny"
        self.minutes = config.getoption("--bench-minutes")
        self.out = config.getoption("--bench-out")
        threads = config.getoption("--bench-threads")
        torch.set_num_threads(threads)
        self.clock = "process" if threads == 1 else "wall"
        self.environment = environment(self.device, threads, self.clock)
        self.ceilings = ceilings(self.device, self.clock, self.tiny)
        old: dict[str, Any] = {"cases": [], "other": [], "minutes": 0.0}
        if config.getoption("--bench-resume") and self.out is not None and self.out.exists():
            old = read_result(self.out)
        self.cases: list[dict[str, Any]] = [case for case in old["cases"] if "contenders" in case]
        self.other: list[dict[str, Any]] = old["other"]
        self.before: float = old["minutes"]
        self.commit = self.environment["commit"]

    def left(self) -> float:
        """Seconds of the budget."""
        return 60 * self.minutes - (time.perf_counter() - self.began)

    def has(self, case: dict[str, Any]) -> bool:
        from rsae_triton.report.speed.results import key

        return key(case) in {key(one) for one in self.cases}

    def save(self) -> None:
        """After every case, so that a run that is cut off keeps what it has."""
        if self.out is not None:
            from rsae_triton.report.speed import write_result

            write_result(self.out, self.result())

    def result(self) -> dict[str, Any]:
        import peers

        self.environment["versions"] |= peers.versions()
        return {
            "schema": 1,
            **self.environment,
            "load_average_after": os.getloadavg()[0],
            "minutes": round(self.before + (time.perf_counter() - self.began) / 60, 2),
            "tiny": self.tiny,
            "ceilings": asdict(self.ceilings),
            "cases": self.cases,
            "other": self.other,
        }


_SESSION = pytest.StashKey[Session]()


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    if request.config.getoption("--bench-device") == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    stash = request.config.stash
    if _SESSION not in stash:
        stash[_SESSION] = Session(request.config)
    return stash[_SESSION]
