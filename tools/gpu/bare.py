"""Runs the package from a checkout with nothing installed: torch, triton, numpy and safetensors are all it needs."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class _Kernels:
    """Finds `rsae_triton.kernels` in the folder kernels/, as setup.py maps it where the package is installed."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "rsae_triton.kernels":
            return None
        folder = ROOT / "kernels"
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def use_checkout() -> None:
    """Imports of rsae_triton and its kernels are those of this checkout from here on. Idempotent."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    if not any(isinstance(one, type) and one is _Kernels for one in sys.meta_path):
        sys.meta_path.insert(0, _Kernels)  # type: ignore[arg-type]
