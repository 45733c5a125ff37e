"""The examples that run a peer."""

import pytest
from example_runs import prepare, run

pytest.importorskip("sae_lens", reason="sae-lens is not installed: make test-interop")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("examples"))


def test_saelens(places):
    found = run("saelens", places[0], places[1])
    assert 0 < (found["codes"] != 0).float().mean() < 1
    assert (found["logits"] - found["clean"]).abs().max() < 1e-4


def test_saebench(places):
    pytest.importorskip("sae_bench", reason="sae-bench is not installed: make test-interop")
    metrics = run("saebench", places[0], places[1], places[2])["metrics"]
    performance = metrics["model_performance_preservation"]
    assert performance["ce_loss_with_sae"] != performance["ce_loss_without_sae"]
    assert 0 < metrics["sparsity"]["l0"] < 40
