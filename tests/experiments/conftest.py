"""A sweep that takes a second or two a cell."""

import pytest
from tiny_sweep import Host, Splits

from rsae_triton.experiments import sweep as module
from rsae_triton.experiments.sweep import Sweep


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A sweep that takes a second or two a cell and reads no language model."""
    monkeypatch.setenv("RSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "load_host", lambda *_, **__: Host())
    monkeypatch.setattr(module, "load_corpus", lambda *_: [])
    monkeypatch.setattr(module, "splits_for", lambda *_: Splits())
    return Sweep(
        teachers=("relu",), sparsities=(0.5, 1.0), widths=(64,), seeds=(0, 1), teacher_steps=30, steps=10,
        batch_size=128, sequences=0, out=tmp_path / "sweep",
    )  # fmt: skip
