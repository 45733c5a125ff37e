"""The benchmark of whole steps, at sizes of no interest: every contender of ours runs, and tables come of it."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench_steps(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_steps

    return bench_steps


def test_steps_are_measured_and_shown(bench_steps, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_steps.peer_steps, "steps", lambda *_: {"SAELens TopK": lambda: None})
    monkeypatch.setattr(bench_steps, "L0", 4)
    out = tmp_path / "steps.json"
    threads = torch.get_num_threads()
    options = bench_steps.Options(sizes=("48x16x128",), repeat=1, growth=False, out=out)
    try:
        bench_steps.main(options)
    finally:
        torch.set_num_threads(threads)
    import json

    result = json.loads(out.read_text())
    (case,) = result["cases"]
    assert {"RSAE", "RSAE, exact", "RSAE, dense", "TopK teacher", bench_steps.FIVE} <= case["rows"].keys()
    assert all(row["seconds"] >= 0 for row in case["rows"].values())
    text = bench_steps.table(result)
    assert "48 x 16 x 128" in text
    assert "**RSAE, ours**" in text
    assert "| SAELens TopK |" in text
    result["growth"] = [
        {
            "what": "d_sae",
            "tokens": 8,
            "d_sae": size,
            "l0": 4,
            "support": 0.1,
            "seconds": 3 * size**2,
            "peak_bytes": size,
        }
        for size in (64, 128, 256)
    ]
    assert "| d_sae | 64 | 256 | 2.00 | 1.00 |" in bench_steps.growth_table(result)


def test_the_support_of_a_step_is_that_of_trained_saes(bench_steps):
    like, x = bench_steps.inputs(256, 32, 1024)
    run = bench_steps.ours(bench_steps.rational(like, x, 8.0), 256, "sparse")
    row = run.advance(x, False, False, None)[0]
    assert row["l0"] == pytest.approx(8.0, rel=0.3)
    assert row["support"] == pytest.approx(bench_steps.share_of(1024, 8.0), rel=0.3)
