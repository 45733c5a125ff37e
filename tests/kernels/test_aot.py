"""What ptxas makes of the kernels, for GPUs that need not be there. All tiles: `make aot`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rsae_triton.kernels import configs
from rsae_triton.kernels.aot import (
    ARCHS,
    KERNELS,
    PRODUCTS,
    Report,
    Variant,
    every_variant,
    main,
    representative,
    variants,
    write_page,
    write_record,
)
from rsae_triton.kernels.machine_code import Usage

RECORD = Path(__file__).with_name("machine_code.json")
VARIANT = Variant("encode_forward", 90, torch.bfloat16, 3, 2, shared=True)
REPORT = Report(VARIANT, "tile", Usage(200, 0, 0, 100_000, 4, 1000), 255, 20.0)


# Hopper in `make test`; `make aot` compiles more of each generation than this test does.
@pytest.mark.parametrize("arch", [pytest.param(one, marks=[] if one == 90 else pytest.mark.whole) for one in ARCHS])
def test_machine_code_is_clean(arch, tmp_path):
    """No spills, no stack, shared memory and registers in bounds, tensor cores in the products, no new arithmetic."""
    # A process of its own, with the compiler instead of the interpreter, and nothing cached.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "rsae_triton.kernels.aot", "--arch", str(arch), "--few", "--jobs", "1"]
    run = subprocess.run(
        [*command, "--recorded", str(RECORD)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stdout + run.stderr
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in run.stdout.splitlines() if "|" in line]
    reported = {(cells[0], cells[1]): cells for cells in table[2:]}
    assert len(reported) == len(representative(arch))
    for (kernel, _), (*_, registers, spills, stack, shared_memory, tensor_core, _) in reported.items():
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
        ({"registers": 201}, "201 registers, 200 allowed"),
    ],
)
def test_spills_and_too_many_registers_are_reported_as_faults(change, fault):
    report = REPORT._replace(usage=REPORT.usage._replace(**change), ceiling=200)
    assert report.faults() == [] if fault is None else fault in report.faults()[0]


@pytest.mark.parametrize(
    ("recorded", "clean"), [(None, True), (20.0, True), (18.5, True), (18.0, False), (22.5, False)]
)
def test_more_or_less_arithmetic_than_on_record_is_a_fault(recorded, clean):
    assert (REPORT.faults(recorded) == []) == clean


def test_every_compiled_variant_is_in_the_record():
    """`make aot-record` writes the file; with another Triton the counts are not compared."""
    record = json.loads(RECORD.read_text())["fp32_per_element"]
    assert {v.key for arch in ARCHS for v in representative(arch) if v.p} <= set(record)
    assert set(record) <= {v.key for v in every_variant()}
    assert min(record.values()) > 5


def test_the_table_has_every_tile_of_every_generation():
    seen = {(v.kernel, v.arch) for v in variants()}
    assert seen == {(kernel, arch) for kernel in KERNELS for arch in ARCHS}
    for arch in ARCHS:
        for kernel, table in (("encode_forward", configs.MATMUL), ("encode_backward", configs.BACKWARD)):
            backward = kernel == "encode_backward"
            keys = {
                (v.dtype.itemsize, configs.large(v.p, v.q) and (backward or not v.shared))
                for v in variants((arch,))
                if v.kernel == kernel
            }
            assert keys == set(table[arch // 10])


def test_the_cost_model_knows_the_tiles():
    from rsae_triton.ops.cost import TILES

    for generation, tiles in TILES.items():
        for (itemsize, backward, many), sizes in tiles.items():
            tile = (configs.BACKWARD if backward else configs.MATMUL)[generation][itemsize, many]
            assert (tile.features, tile.tokens) == sizes


def test_no_two_variants_share_a_name():
    every = [v.key for v in variants()]
    assert len(set(every)) == len(every)


def test_the_tables_go_between_the_pages_marks(tmp_path):
    page = tmp_path / "page.md"
    begin, end = "<!-- made by `make aot`: begin -->", "<!-- made by `make aot`: end -->"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    write_page(page, [REPORT])
    text = page.read_text()
    assert text.startswith(f"before\n{begin}\n")
    assert text.endswith(f"{end}\nafter\n")
    assert "old" not in text
    assert "| encode_forward | 90 | 1 | 200 to 200 | none | 100000 | 4 |" in text
    write_page(page, [REPORT])
    assert page.read_text() == text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="no place for the table"):
        write_page(page, [REPORT])


def test_the_record_keeps_what_was_not_compiled_now(tmp_path):
    path = tmp_path / "record.json"
    write_record(path, [REPORT])
    other = REPORT._replace(variant=VARIANT._replace(arch=80), arithmetic=30.0)
    foreign = REPORT._replace(variant=VARIANT._replace(p=11), arithmetic=1.0)
    write_record(
        path, [other, foreign, REPORT._replace(variant=Variant("gather_rows", 90, torch.bfloat16), arithmetic=None)]
    )
    assert json.loads(path.read_text())["fp32_per_element"] == {VARIANT.key: 20.0, other.variant.key: 30.0}
    path.write_text(json.dumps({"triton": "another", "fp32_per_element": {other.variant.key: 1.0}}))
    write_record(path, [REPORT])
    assert json.loads(path.read_text())["fp32_per_element"] == {VARIANT.key: 20.0}


def test_nothing_is_compiled_under_the_interpreter(monkeypatch):
    monkeypatch.setattr("rsae_triton.kernels.machine_code.INTERPRETED", True)
    monkeypatch.setattr(sys, "argv", ["aot", "--few", "--arch", "90", "--jobs", "1"])
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        main()


@pytest.mark.parametrize(("capability", "generation"), [(7, 8), (8, 8), (9, 9), (10, 10), (11, 8), (12, 8)])
def test_every_gpu_has_a_table(capability, generation):
    assert configs.generation(capability) == generation
