"""Detection of known features against SAELens' own evaluation, on SAELens' own synthetic model."""

import pytest
import torch

from rsae_triton.evaluation.ground_truth import detect, saelens_model, synthsaebench_model
from rsae_triton.teachers import ReluSAE

evals = pytest.importorskip("sae_lens.synthetic.evals")


@pytest.mark.parametrize("correlation", [0.0, 0.3])
def test_scores_are_saelens_own(correlation):
    known = saelens_model(d_in=16, n_features=48, l0=4.0, correlation=correlation)(3000, 1)
    sae = ReluSAE(16, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_enc[:4] = -9.0  # some that never fire
    z = sae.encode(known.x).detach()
    theirs = evals.compute_classification_metrics(z, known.active.float(), sae.W_dec.detach(), known.directions)
    ours = detect(sae, known, chunk=700)
    assert ours.f1 == pytest.approx(theirs.f1_score, abs=1e-6)
    assert ours.precision == pytest.approx(theirs.precision, abs=1e-6)
    assert ours.recall == pytest.approx(theirs.recall, abs=1e-6)
    assert ours.mcc == pytest.approx(evals.mean_correlation_coefficient(sae.W_dec.detach(), known.directions), abs=1e-6)
    assert ours.uniqueness == evals.feature_uniqueness(sae.W_dec.detach(), known.directions)
    assert ours.dead >= 4
    assert known.l0 == pytest.approx(4, rel=0.15)


def test_a_small_synthsaebench_has_trees_whose_children_exclude_each_other(capfd):
    draw = synthsaebench_model(d_in=24, n_features=256, seed=3)
    known, same = draw(4000, 1), draw(4000, 1)
    assert capfd.readouterr().err == ""  # no progress bars in a command's output
    torch.testing.assert_close(known.x, same.x)
    synthetic = pytest.importorskip("sae_lens.synthetic")
    config = synthetic.HierarchyConfig(total_root_nodes=2, branching_factor=4, max_depth=3)
    trees = synthetic.generate_hierarchy(256, config, seed=3 + 3).roots
    parents = [node for root in trees for node in (root, *root.children)]
    for node in parents:
        children = known.active[:, [child.feature_index for child in node.children]]
        assert int(children.sum(1).max()) == 1
        assert bool((known.active[:, node.feature_index] | ~children.any(1)).all())
    frequency = known.active.double().mean(0)
    assert frequency.max() > 0.3 > 0.01 > frequency.median()
    assert known.x.mean(0).norm() > 0.3  # it has a bias, and features are not negative
