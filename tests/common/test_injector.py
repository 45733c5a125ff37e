"""Every writer, killed or refused at every call to the file system: afterwards there is the old or the new, whole.

A sample of the calls in `make test`, all of them in `make faults` (FAULTS=all), which also prints the counts for
docs/reliability.md.
"""

import ast
import os
import shutil
import sys
import warnings
from pathlib import Path

import injector
import pytest
from writers import WRITERS

from rsae_triton.common.files import write_text

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and signals")
ALL = os.environ.get("FAULTS") == "all"
SAMPLE = 5  # calls a writer, spread over it, each of another kind
COUNTS = {"tried": 0, "held": 0}


def leftovers(folder):
    names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    return [one for one in names if ".rsae-" in one or ".partial" in one or "/.step-" in one or one.endswith(".tmp")]


@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_leaves_the_old_or_the_new(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    writer = WRITERS[name]()
    origin = tmp_path / "origin"
    origin.mkdir()
    writer.prepare(origin)
    if not writer.first:
        # In a child of its own: what a process has started does not go along into another.
        assert injector.run(lambda: writer.write(origin, 0), origin).said == "ok"
        assert writer.read(origin) == 0
    old = None if writer.first else 0

    def fresh():
        folder = tmp_path / "here"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(origin, folder)
        return folder

    folder = fresh()
    whole = injector.run(lambda: writer.write(folder, 1), folder)
    assert whole.said == "ok"
    assert writer.read(folder) == 1
    assert leftovers(folder) == []
    assert whole.calls >= 5
    step = 1 if ALL else max(1, whole.calls // SAMPLE)
    for number in range(1 if ALL else step, whole.calls + 1, step):
        for kind in injector.KINDS if ALL else (injector.KINDS[number // step % len(injector.KINDS)],):
            folder = fresh()
            where = f"{name}: {kind} at call {number} of {whole.calls}"
            COUNTS["tried"] += 1
            outcome = injector.run(lambda folder=folder: writer.write(folder, 1), folder, number, kind)
            assert outcome.ours, f"{where}: {outcome.said}"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the pair is found in the weights' file, and that is said
                found = writer.read(folder)
            assert found in (old, 1), where
            assert outcome.said != "ok" or found == 1 or writer.optional, where
            again = injector.run(lambda folder=folder: writer.write(folder, 1), folder)
            assert again.said == "ok", f"{where}, and then: {again.said}"
            for left in leftovers(folder) if writer.first else ():
                # Where what is there is not written again, whatever is written next takes away what is left over.
                write_text((folder / left).parent / "beside", "")
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert writer.read(folder) == 1, where
            assert leftovers(folder) == [], where
            COUNTS["held"] += 1
    print(f"\n{name}: {whole.calls} calls; so far {COUNTS['tried']} tried, {COUNTS['held']} held")


# -- and there is no other door

ROOT = Path(__file__).parents[2]
ROOMS = ("rsae_triton", "kernels", "benchmarks", "tools")
# Modules that write into a folder which is not there yet under its name, or append to a log.
INSIDE = {
    "rsae_triton/common/files.py": "the door",
    "rsae_triton/activations/writing.py": "shards of a partial folder, published when whole",
    "rsae_triton/activations/from_tensor.py": "whole_folder",
    "rsae_triton/activations/dequantise.py": "whole_folder",
    "rsae_triton/activations/downloads.py": "parts that go on where they broke off, compared with a checksum",
    "rsae_triton/training/checkpoints.py": "a temporary folder, published when whole",
    "rsae_triton/training/metrics.py": "a log that grows by lines",
    "rsae_triton/report/svg.py": "figures are drawn into memory",
    "benchmarks/scaling.py": "/proc/self/clear_refs",
    "kernels/aot.py": "a page of the documentation, renamed when whole",
    "kernels/machine_code.py": "a folder of the system's for temporary files",
    "tools/gpu_check.py": "rows that grow by lines, on a machine that is lent",
    "tools/gpu/result.py": "renamed when whole, on a machine that is lent",
}
WRITING = {"write_text", "write_bytes", "savefig", "save_file", "symlink_to", "hardlink_to", "copyfile", "copy2",
           "copytree", "to_csv", "tofile", "memmap", "mkstemp", "NamedTemporaryFile"}  # fmt: skip
DUMPING = {"json.dump", "pickle.dump", "torch.save", "np.save", "np.savez", "numpy.save", "shutil.copy", "shutil.move",
           "os.replace", "os.rename"}  # fmt: skip


def writes(path):
    """Lines that write, outside of what is handed to the door as a function."""
    tree = ast.parse(path.read_text())
    handed = {id(inner) for one in ast.walk(tree) if isinstance(one, ast.Lambda) for inner in ast.walk(one)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or id(node) in handed:
            continue
        name = ast.unparse(node.func)
        last = name.rpartition(".")[2]
        modes = [*node.args[:2], *(one.value for one in node.keywords if one.arg == "mode")] if last == "open" else []
        opened = any(isinstance(one, ast.Constant) and str(one.value) in MODES for one in modes)
        # Of text and of dataclasses it has more arguments.
        renames = last in ("replace", "rename") and "." in name and len(node.args) == 1 and not node.keywords
        if opened or renames or name in DUMPING or (last in WRITING and name != "write_text"):
            yield f"{path.relative_to(ROOT)}:{node.lineno} {name}"


MODES = {f"{way}{kind}{plus}" for way in "wax" for kind in ("", "b", "t") for plus in ("", "+")} | {"r+", "r+b", "rb+"}


def test_everything_is_written_through_one_door():
    found = [line for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")) for line in writes(path)]
    rooms = {line.partition(":")[0] for line in found}
    assert [line for line in found if line.partition(":")[0] not in INSIDE] == []
    assert INSIDE.keys() - rooms == set()  # none that no longer writes
