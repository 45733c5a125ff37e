"""Runs the scripts of examples/ as `python examples/NAME.py ...` does."""

import runpy
import sys
from pathlib import Path

import pytest
import tiny_models
from rational_cases import rsae

EXAMPLES = Path(__file__).parents[2] / "examples"


def prepare(root):
    """(folder of a Rational SAE, folder of its model, folder of text)."""
    sae = rsae(d_in=tiny_models.D_MODEL)
    places = [root / name for name in ("rsae", "model", "text")]
    places[2].mkdir()
    sae.metadata["model_name"] = str(places[1])
    return (
        sae.save_pretrained(places[0]),
        tiny_models.saved(tiny_models.llama(), places[1]),
        tiny_models.text(places[2]),
    )


def run(name, *arguments):
    """The example's globals."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        return runpy.run_path(str(EXAMPLES / f"{name}.py"))
