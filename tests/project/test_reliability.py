"""docs/reliability.md names tests, targets and numbers that are there."""

import ast
import math
import re
from pathlib import Path

import pytest
from common import test_faults
from valid_files import SOURCES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text()
CODE = sorted(set(re.findall(r"`([^`\n]+)`", PAGE)))
# name of a test function -> the files that define it
TESTS: dict[str, set[Path]] = {}
for path in (ROOT / "tests").rglob("test_*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            TESTS.setdefault(node.name, set()).add(path)


def cases(module):
    """How many tests pytest makes of a module."""
    marks = [getattr(one, "pytestmark", []) for name, one in vars(module).items() if name.startswith("test_")]
    return sum(math.prod(len(mark.args[1]) for mark in own if mark.name == "parametrize") for own in marks)


@pytest.mark.parametrize("name", [one for one in CODE if re.search(r"(^|::|/)test_\w+|^tests/", one)])
def test_a_named_test_is_there(name):
    place, _, function = name.rpartition("::")
    if not place and not name.endswith(".py"):
        assert name in TESTS
        return
    place, function = (place, function) if place else (name, "")
    files = [path for path in (ROOT / "tests").rglob(Path(place).name) if str(path).endswith(f"/{place}")]
    assert files, f"{place} is not there"
    assert not function or set(files) & TESTS.get(function, set()), f"{place} has no {function}"


def test_named_targets_and_files_are_there():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    named = [one.split()[1] for one in CODE if one.startswith("make ")]
    assert named
    assert set(named) <= set(targets)
    assert all((ROOT / one).exists() for one in CODE if re.fullmatch(r"[\w/-]+\.(md|toml|txt)", one))


def test_numbers_are_those_of_the_tests():
    assert f"{cases(test_faults)} faults are injected" in PAGE
    assert f"any of {len(SOURCES)} formats" in PAGE
