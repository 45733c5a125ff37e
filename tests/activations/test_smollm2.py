"""The embedded default on real text; fetches the pinned files (about 100 MB)."""

from __future__ import annotations

import pytest
import torch

from rsae_triton.activations import load_host
from rsae_triton.common.errors import SourceError

pytestmark = pytest.mark.network

TEXT = (
    "The president of the United States is elected every four years. He lives in the White House in Washington, "
    "and he may be elected twice."
)


@pytest.fixture(scope="module")
def smollm2():
    """From the user's own cache, so that the model is fetched and dequantised once per machine."""
    try:
        return load_host("smollm2", dtype="float32", device="cpu")
    except SourceError as error:
        pytest.skip(f"SmolLM2 cannot be fetched: {error}")


def test_smollm2_predicts_english_and_has_the_shape_it_should(smollm2):
    ids = smollm2.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([[smollm2.bos_token_id, *ids]])
    assert (smollm2.d_model, smollm2.n_layers, smollm2.default_hook) == (576, 30, "blocks.16.hook_resid_pre")
    assert smollm2.tokenizer.decode([smollm2.bos_token_id]) == "<|im_start|>"
    loss = smollm2.next_token_loss(tokens)[:, 1:].mean()
    assert 0.5 < loss < 4
    zeroed = smollm2.next_token_loss(tokens, None, lambda x: torch.cat([x[:, :1], 0 * x[:, 1:]], 1))[:, 1:].mean()
    assert zeroed > loss + 2
    norms = smollm2.residual(tokens).norm(dim=-1)[0]
    assert norms[0] > 50 * norms[1:].median()
    assert norms[1:].median() == pytest.approx(170, rel=0.2)
