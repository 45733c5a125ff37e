"""The README tells the truth: its table is the committed one, its examples run."""

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_tables_are_the_committed_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_steps
    from readme_table import tables

    for page, name, text in (*tables(), *bench_steps.tables()):
        between = re.search(rf"<!-- {name} table:.*?-->\n(.*?)\n<!-- /{name} table -->", page.read_text(), re.DOTALL)
        assert between, f"{page} has no place for the {name} table"
        assert between[1] == text, f"run: python benchmarks/readme_table.py ({page}, {name})"


def test_every_linked_file_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.xdist_group("demo")
def test_python_examples_run(quick, tmp_path, monkeypatch):
    """After `rsae demo --quick`, in the folder where it left out/demo."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(quick, tmp_path / "out" / "demo")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "out" / "my_rsae" / "cfg.json").is_file()
    assert names["feature_acts"].shape == (*names["tokens"].shape, 512)


def test_first_steps_read_what_the_pages_say(monkeypatch):
    """`make first-steps` runs them, in a fresh environment; here only that it finds them."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import first_steps

    shell = first_steps.shell_of(README)
    assert shell.index("git clone") < shell.index("pip install") < shell.index("rsae demo")
    assert first_steps.ADDRESS in shell
    cells = first_steps.cells_of((ROOT / "docs" / "notebooks" / "tutorial.ipynb").read_text())
    assert cells.index("rt.load_teacher") < cells.index("rt.feature(") < cells.index("rt.steer(")
    # What the tutorial loads is what README's demo leaves.
    assert "out/demo/teacher" in cells
