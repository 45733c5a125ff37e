"""docs/transcoders.md holds the numbers of the committed runs."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNS = sorted((ROOT / "benchmarks" / "results").glob("transcoder-*-smollm2.json"))


@pytest.mark.parametrize("run", RUNS, ids=lambda path: path.stem)
def test_the_page_shows_what_was_measured(run):
    page = (ROOT / "docs" / "transcoders.md").read_text()
    metrics = json.loads(run.read_text())
    for role in ("teacher", "rsae", "control"):
        scores = metrics["matched_l0"][role]
        assert f"| {scores['mse']:.1f} | {scores['fvu']:.3f} | {scores['l0']:.1f} | {scores['delta_ce']:.4f} |" in page
    assert run.name in page
    assert not metrics["meta"]["quick"]
