"""What ptxas makes of the kernels, for GPUs that need not be there. All tiles: python -m rsae_triton.kernels.aot"""

import os
import subprocess
import sys

import pytest
import torch

from rsae_triton.kernels import configs
from rsae_triton.kernels.aot import KERNELS, PRODUCTS, Report, Variant, representative, variants


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_machine_code_is_clean(arch, tmp_path):
    """No spills, no stack, shared memory in bounds, tensor cores in the matrix product."""
    # A process of its own, with the compiler instead of the interpreter, and nothing cached.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "rsae_triton.kernels.aot", "--arch", str(arch), "--few"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in run.stdout.splitlines() if "|" in line]
    reported = {(cells[0], cells[1]): cells for cells in table[2:]}
    assert len(reported) == len(representative(arch))
    for (kernel, _), (*_, registers, spills, stack, shared_memory, tensor_core) in reported.items():
        assert 0 < int(registers) <= 255
        assert int(spills) == int(stack) == 0
        assert int(shared_memory) <= (163 if arch == 80 else 227) * 1024
        assert (int(tensor_core) > 0) == (kernel in PRODUCTS)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"spills": 2}, "spill"),
        ({"stack": 8}, "stack"),
        ({"shared_memory": 300_000}, "shared memory"),
        ({"tensor_core": 0}, "tensor-core"),
    ],
)
def test_faults_are_found(change, fault):
    variant = Variant("encode_forward", 90, torch.bfloat16, 3, 2, shared=True)
    faults = Report(variant, "tile", 200, 0, 0, 100_000, 4)._replace(**change).faults()
    assert faults == [] if fault is None else fault in faults[0]


def test_the_table_has_every_tile_of_every_generation():
    seen = {(v.kernel, v.arch) for v in variants()}
    assert seen == {(kernel, arch) for kernel in KERNELS for arch in (80, 90, 100)}
    for arch in (80, 90, 100):
        keys = {
            (v.dtype.itemsize, v.p + v.q >= configs.LARGE_DEGREE and not v.shared)
            for v in variants((arch,))
            if v.kernel == "encode_forward"
        }
        assert keys == set(configs.MATMUL[arch // 10])


@pytest.mark.parametrize(("capability", "generation"), [(7, 8), (8, 8), (9, 9), (10, 10), (11, 8), (12, 8)])
def test_every_gpu_has_a_table(capability, generation):
    assert configs.generation(capability) == generation
