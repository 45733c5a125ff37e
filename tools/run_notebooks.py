"""Runs the notebooks of docs/ and keeps their outputs: python tools/run_notebooks.py [NAME ...]

A mark in each says which code the outputs are of, so that a test sees when they are not current. Takes nbconvert and
ipykernel; the tutorial needs the demo's files and its teacher (`make demo`).
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from rsae_triton.common.files import write_text

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
MARK = "ran"


def digest(notebook: dict[str, Any]) -> str:
    """A hash of the code of all cells."""
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256("\n\n".join(code).encode()).hexdigest()[:16]


def main(names: list[str]) -> None:
    import nbformat
    from nbconvert.preprocessors import ExecutePreprocessor

    for path in sorted(FOLDER.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        notebook = nbformat.read(path, as_version=4)
        place = {"metadata": {"path": str(Path.cwd())}}
        ExecutePreprocessor(timeout=1200, kernel_name="python3").preprocess(notebook, place)
        for number, cell in enumerate(notebook["cells"]):
            cell["id"] = f"cell-{number}"
            cell["metadata"] = {}
            if cell["cell_type"] == "code":
                # Warnings and progress of this machine say nothing to a reader.
                cell["outputs"] = [one for one in cell["outputs"] if one.get("name") != "stderr"]
        notebook["metadata"] = {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            MARK: digest(json.loads(nbformat.writes(notebook))),
        }
        write_text(path, json.dumps(json.loads(nbformat.writes(notebook)), indent=1, ensure_ascii=False) + "\n")
        print(path.name)


if __name__ == "__main__":
    main(sys.argv[1:])
