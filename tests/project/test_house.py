"""The house rules that no linter knows."""

import ast
import re
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


def docstrings(path):
    """The strings that stand by themselves in a file: docstrings, and what is said below an attribute."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value.strip()


@pytest.mark.parametrize("folder", ["rsae_triton", "kernels"])
def test_no_docstring_is_half_a_sentence(folder):
    """A docstring says what a thing does or returns, without the signature: not "Of the above.", "As there."."""
    half = re.compile(r"->|(Of|As|Whose|That of|Those of|The same of) ")
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, text in docstrings(path)
        if half.match(text)
    ]
    assert not found, "\n".join(found)
