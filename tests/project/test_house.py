"""The house rules that no linter knows."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("rsae_triton", "kernels", "tests", "benchmarks", "tools", "examples", "fuzz")


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_is_longer_than_four_hundred_lines(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    long = {name: length for name, length in lengths.items() if length > 400}
    assert not long, f"split these along what they do: {long}"
