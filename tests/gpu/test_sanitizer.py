"""compute-sanitizer over every kernel: memory out of bounds, races, memory read before it is written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SANITIZER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not installed (it comes with the CUDA toolkit)")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_every_kernel_is_clean(tool):
    # Without torch's cache of memory every tensor has borders of its own.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9"]
    script = str(Path(__file__).with_name("every_kernel.py"))
    run = subprocess.run(
        [*command, sys.executable, script], env=environment, capture_output=True, text=True, timeout=1800
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-5000:]
    assert "all finite" in run.stdout
