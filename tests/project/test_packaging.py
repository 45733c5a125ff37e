"""sdist and wheel: `rsae_triton.kernels` is there, a top-level `kernels` never is."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel built from it (not from the checkout)."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=out)
    if done.returncode and "Could not find a version" in done.stdout + done.stderr:
        pytest.skip("the build backend cannot be fetched: no package index in reach")
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


@pytest.mark.slow
@pytest.mark.network
def test_wheel_holds_what_the_package_needs(built):
    wheel, sdist = built
    names = zipfile.ZipFile(wheel).namelist()
    for expected in (
        "rsae_triton/kernels/__init__.py",
        "rsae_triton/kernels/encode_forward.py",
        "rsae_triton/remez/table.json",
        "rsae_triton/report/page.html",
        "rsae_triton/py.typed",
    ):
        assert expected in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"rsae_triton"}
    assert wheel.stat().st_size < 2_000_000
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("/kernels/encode_forward.py") for name in archive.getnames())


@pytest.mark.slow
@pytest.mark.network
def test_installed_wheel_imports_kernels_and_no_top_level_kernels(built, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", built[0]]
    subprocess.run(install, check=True, capture_output=True, timeout=120)
    # Its dependencies come from this environment; its .pth files (an editable install) are not read from there.
    packages = [str(Path(torch.__file__).parents[1])]
    code = (
        "import importlib.util, rsae_triton, rsae_triton.kernels as k; "
        "assert importlib.util.find_spec('kernels') is None; print(rsae_triton.__file__, k.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": "", "TRITON_INTERPRET": "1"}
    (Path(next((tmp_path / "venv" / "lib").glob("python*/site-packages"))) / "host.pth").write_text("\n".join(packages))
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(str(tmp_path) in path for path in done.stdout.split())


def test_editable_install_maps_kernels():
    code = (
        "import importlib.util, rsae_triton.kernels as k; assert importlib.util.find_spec('kernels') is None; "
        "print(k.__name__)"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "rsae_triton.kernels"


def test_one_version_everywhere():
    import tomllib

    import rsae_triton

    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert rsae_triton.__version__ == stated
    assert f"version: {stated}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {stated}" in (ROOT / "CHANGELOG.md").read_text()
