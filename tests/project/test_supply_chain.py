"""What is promised in SECURITY.md and pyproject.toml, looked for in the source itself; and how long an import takes."""

import ast
import re
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rsae_triton.activations.downloads import DOWNLOADS

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "rsae_triton").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
SLOW = {
    "scipy.optimize", "torch._dynamo", "torch.distributed.tensor", "matplotlib", "transformers", "transformer_lens",
    "datasets", "sklearn", "pandas", "huggingface_hub", "sae_lens",
}  # fmt: skip
FORBIDDEN = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "cPickle.load", "dill.load", "joblib.load", "marshal.loads",
    "shelve.open", "os.system", "os.popen", "eval", "exec", "compile", "pd.read_pickle",
}  # fmt: skip


def calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {one.arg: ast.unparse(one.value) for one in node.keywords}, node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_or_executed(path):
    for name, options, line in calls(path):
        where = f"{path}:{line}"
        assert name not in FORBIDDEN, where
        assert options.get("shell") != "True", where
        assert "trust_remote_code" not in options, where
        if name == "yaml.load":
            assert "SafeLoader" in options.get("Loader", ""), where
        if name == "torch.load":
            assert options.get("weights_only") == "True", where
        if name in ("np.load", "numpy.load"):
            assert options.get("allow_pickle") == "False", where
    imported = re.findall(
        r"^\s*(?:import|from) (pickle|dill|cloudpickle|joblib|marshal|shelve)\b", path.read_text(), re.M
    )
    assert not imported, path


def test_downloads_are_pinned():
    for name, one in DOWNLOADS.items():
        assert re.fullmatch(r"[0-9a-f]{64}", one.sha256), name
        assert one.url.startswith("https://"), name
        assert one.requirement is None or "==" in one.requirement, name


def test_optional_libraries_and_slow_ones_are_not_imported():
    """`import rsae_triton` takes less than 1.5 times what `import torch` takes (processor time, best of three)."""
    code = f"import sys, rsae_triton; print(*({SLOW} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []

    def seconds(module):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds("rsae_triton") for _ in range(3)) < 1.5 * min(seconds("torch") for _ in range(3))


def test_bounds_where_a_peer_broke_before():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {re.match(r"[\w.-]+", one)[0]: one for one in project["dependencies"]}
    for extra in ("host", "interop"):
        named |= {re.match(r"[\w.-]+", one)[0]: one for one in project["optional-dependencies"][extra]}
    for name in ("torch", "numpy", "tyro", "transformers", "transformer-lens", "huggingface_hub", "sae-lens"):
        assert "<" in named[name], name
    for word in ("pickle", "trust_remote_code", "SHA-256", "report"):
        assert word in (ROOT / "SECURITY.md").read_text()
