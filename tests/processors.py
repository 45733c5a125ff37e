"""The numeric tests as other processors compute them: sums in another order, other vector widths.

`make test-cpus` runs all of them under every setting; `make test` a selection under the setting that differs most.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
NUMERIC = ("activations", "evaluation", "kernels", "ops", "remez", "sae", "teachers", "training", "upgrading")
# Certificates between grid points, ties, ranks, kinks, bits that must repeat: what a BLAS has broken before.
SHORT = (
    "evaluation/test_evaluate_matching.py",
    "ops/test_backends_agree.py",
    "remez/test_certificate.py",
    "remez/test_random.py",
    "sae/test_sparse.py",
    "upgrading/test_upgrade.py",
)


class Processor(NamedTuple):
    """openblas: the core type of numpy's and scipy's products; aten: torch's vectors; mkl: torch's products."""

    openblas: str
    aten: str
    mkl: str

    @property
    def environment(self) -> dict[str, str]:
        # torch.compile looks its code up without the vectors' width: a test that compiles a whole module would run code
        # written for another one. (The product's own loops have it in their key.)
        cache = Path(tempfile.gettempdir()) / f"rsae-inductor-{self.aten}"
        return {
            "OPENBLAS_CORETYPE": self.openblas,
            "ATEN_CPU_CAPABILITY": self.aten,
            "MKL_CBWR": self.mkl,
            "TORCHINDUCTOR_CACHE_DIR": str(cache),
        }


PROCESSORS = (
    Processor("Prescott", "default", "COMPATIBLE"),
    Processor("Haswell", "avx2", "AVX2"),
    Processor("Zen", "avx2", "AUTO"),
    Processor("SkylakeX", "avx512", "AUTO"),
)


def here() -> list[Processor]:
    """Those whose instructions this machine has: a library told to use others would be killed."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    return [
        one for one in PROCESSORS if one.aten == "default" or {"avx2": "avx2", "avx512": "avx512f"}[one.aten] in flags
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a selection, under the first setting")
    parser.add_argument("arguments", nargs="*", help="for pytest, after --")
    options = parser.parse_args()
    processors, files = here(), NUMERIC
    if options.short:
        processors, files = processors[:1], SHORT
    if not processors:
        print("not run: this machine is no x86 with Linux")
    failed = []
    for one in processors:
        print(f"\n{' '.join(f'{name}={value}' for name, value in one.environment.items())}", flush=True)
        # What is compiled is the same on every processor.
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not network and not gpu", *options.arguments]
        command += [f"--deselect={HERE / 'kernels/test_aot.py'}", *(str(HERE / name) for name in files)]
        if subprocess.run(command, env={**os.environ, **one.environment}).returncode:
            failed.append(one.openblas)
    if failed:
        print(f"failed as: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
