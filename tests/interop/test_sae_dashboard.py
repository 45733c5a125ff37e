"""SAEDashboard on a Rational SAE with rounds; `make test-dashboard` installs it (its pins clash with ours)."""

import pytest
import torch

pytest.importorskip("sae_dashboard", reason="sae-dashboard is not installed: make test-dashboard")
from rational_cases import rsae
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE

import rsae_triton.integrations.saelens  # noqa: F401  (registers the architecture "rational")

PLACE, SHOWN = "blocks.1.hook_resid_post", [3, 7, 11]


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_dashboard_shows_our_activations(model, tmp_path, rounds):
    tokens = torch.randint(1, 50, (8, 16))
    with torch.no_grad():
        x = model.run_with_cache(tokens)[1][PLACE]
        ours = rsae("gated").with_rounds(rounds, x.flatten(0, 1))
        z = (ours.encode(x) * ours.W_dec.norm(dim=1)).flatten(0, 1)[:, SHOWN]  # decoder rows get norm 1
    ours.save_pretrained(tmp_path)
    config = SaeVisConfig(hook_point=PLACE, features=SHOWN, minibatch_size_tokens=4)
    data = SaeVisRunner(config).run(encoder=SAE.load_from_disk(tmp_path), model=model, tokens=tokens)
    assert list(data.feature_data_dict) == SHOWN
    assert (z != 0).any()
    torch.testing.assert_close(torch.tensor(data.feature_stats.max), z.max(0).values, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(torch.tensor(data.feature_stats.frac_nonzero), (z != 0).float().mean(0))
