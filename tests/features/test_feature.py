"""One feature: its numbers are those of the code, its text is the text, and it looks like something."""

import copy

import numpy as np
import pytest
import torch

import rsae_triton as rt
from rsae_triton.common.errors import ConfigError, ShapeError
from rsae_triton.features.source import logits_of


@pytest.fixture(scope="module")
def busiest(world):
    _, store, _, rsae = world
    z = copy.deepcopy(rsae).to_units_(store.scale).encode(store.tensor()).detach()
    return int((z != 0).sum(0).argmax()), z


def test_a_feature_says_what_the_code_says(world, busiest):
    host, store, teacher, rsae = world
    index, z = busiest
    found = rt.feature(rsae, store, index, teacher=teacher, host=host, contexts=4)
    mine = z[:, index]
    assert found.n_tokens == len(store)
    assert found.frequency == pytest.approx(float((mine != 0).float().mean()))
    assert found.largest == pytest.approx(float(mine.abs().max()), rel=1e-5)
    assert found.threshold == pytest.approx(float(rsae.gate.threshold[index].detach()))
    assert found.counts.sum() == len(store)
    assert found.active_counts.sum() == (mine != 0).sum()
    values = [one.value for one in found.contexts]
    assert values == sorted(values, reverse=True)
    assert values[0] == pytest.approx(found.largest, rel=1e-5)
    row = int(mine.abs().argmax())
    (peak,) = [token for token in found.contexts[0].tokens if token.peak]
    assert peak.text.strip() == host.tokenizer.decode([int(store.tokens[row])]).strip()
    assert found.teacher.index == index
    assert found.cosine > 0.9
    theirs = copy.deepcopy(teacher).to_units_(store.scale).encode(store.tensor()).detach()[:, index]
    assert found.correlation == pytest.approx(float(np.corrcoef(mine, theirs)[0, 1]), abs=1e-4)
    cosines = torch.nn.functional.cosine_similarity(rsae.W_dec[index][None], rsae.W_dec)
    cosines[index] = -2
    assert found.similar[0] == (int(cosines.argmax()), pytest.approx(float(cosines.max()), abs=1e-5))
    shown = repr(found)
    assert f"Feature {index} of" in shown
    assert "promotes" in shown
    assert "teacher     feature" in shown
    page = found._repr_html_()
    assert "<svg" in page
    assert page.count("<p") >= 7
    assert found.plot().axes


def test_the_lens_is_the_models_own_output_layer(world):
    host, _, _, rsae = world
    direction = rsae.W_dec[:1].detach()
    logits = logits_of(host, direction)
    rms = direction / direction.square().mean().sqrt()
    expected = (rms * host.model.model.norm.weight) @ host.model.lm_head.weight.t()
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    found = rt.feature(rsae, world[1], 0, host=host)
    ranked = logits[0].argsort(descending=True)
    assert found.promoted[0] == (host.tokenizer.decode([int(ranked[0])]), pytest.approx(float(logits[0].max())))
    assert found.suppressed[0][1] == pytest.approx(float(logits[0].min()))
    assert logits_of(host, torch.randn(2, 5)) is None


def test_a_topk_has_no_gate_to_draw_and_a_dead_feature_no_contexts(world):
    host, store, _, _ = world
    sae = rt.TopKSAE(store.d_in, 8, k=2)
    with torch.no_grad():
        sae.b_enc[3] = -1e6
    found = rt.feature(sae, store, 3, host=host)
    assert found.gate is None
    assert found.threshold is None
    assert found.frequency == 0
    assert found.contexts == []
    assert "active on 0.00%" in repr(found)
    assert found._repr_html_()


def test_bad_features_and_sources_are_errors(world, tmp_path):
    host, store, _, rsae = world
    with pytest.raises(ConfigError, match="index is 96"):
        rt.feature(rsae, store, 96)
    with pytest.raises(ConfigError, match="source is a Tensor"):
        rt.feature(rsae, store.tensor(), 0)
    from rsae_triton.activations.from_tensor import store_tensor

    with pytest.raises(ConfigError, match="has no text"):
        rt.feature(rsae, store_tensor(torch.randn(32, store.d_in), tmp_path / "own"), 0)
    with pytest.raises(ShapeError, match="give the teacher of this SAE"):
        rt.feature(rsae, store, 0, host=host, teacher=rt.ReluSAE(8, 8))
    other = copy.deepcopy(rsae)
    other.metadata["hook_name"] = "blocks.1.hook_resid_pre"
    with pytest.raises(ConfigError, match="says that it reads"):
        rt.feature(other, store, 0, host=host)


def test_gates_are_drawn(world):
    *_, rsae = world
    axes = rsae.gate.plot([3, 5]).axes[0]
    assert [line.get_label() for line in axes.lines if line.get_linestyle() == "-"] == ["feature 3", "feature 5"]
    assert len(rsae.gate.plot().axes[0].lines) >= 2
    with pytest.raises(ConfigError, match="a feature is 96"):
        rsae.gate.plot([96])
