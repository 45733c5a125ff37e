"""The notebooks of docs/ run, cell by cell; the outputs they are committed with are of the code that they hold."""

import json
import os
from pathlib import Path

import pytest

# The figures of a notebook are shown by nobody here.
os.environ.setdefault("MPLBACKEND", "agg")
FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_every_notebook_is_listed_in_the_index():
    assert len(NOTEBOOKS) >= 4
    page = (FOLDER / "index.md").read_text()
    assert all(f"({path.name})" in page for path in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_committed_outputs_of_a_notebook_belong_to_its_code(path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER.parents[1] / "tools"))
    run_notebooks = pytest.importorskip("run_notebooks")
    notebook = json.loads(path.read_text())
    assert notebook["metadata"].get("ran") == run_notebooks.digest(notebook), "run: make notebooks"
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert any(cell["outputs"] for cell in cells)
    for cell in cells:
        assert all(one["output_type"] != "error" for one in cell["outputs"])


# The tutorial takes minutes and the demo's files: `make notebooks` runs it.
@pytest.mark.parametrize("path", [one for one in NOTEBOOKS if one.stem != "tutorial"], ids=lambda path: path.stem)
def test_the_notebook_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "transformers" in path.read_text():
        pytest.importorskip("transformers")
    names = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        if cell["cell_type"] != "code":
            continue
        exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
    assert capsys.readouterr().out
