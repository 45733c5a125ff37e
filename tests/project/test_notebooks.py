"""The notebooks of docs/ run, cell by cell, and are committed without output."""

import json
import os
from pathlib import Path

import pytest

# The figures of a notebook are shown by nobody here.
os.environ.setdefault("MPLBACKEND", "agg")
FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_there_are_three():
    assert len(NOTEBOOKS) == 3
    page = (FOLDER / "index.md").read_text()
    assert all(f"({path.name})" in page for path in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "transformers" in path.read_text():
        pytest.importorskip("transformers")
    names = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == [], f"cell {number} is committed with its output"
        assert cell["execution_count"] is None
        exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
    assert capsys.readouterr().out
