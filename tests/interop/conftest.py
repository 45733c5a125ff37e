"""Tests that run other people's libraries: `make test-interop`. Each skips where its library is not installed."""

import pytest
import torch
from rational_cases import D_IN


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def model():
    """A tiny random HookedSAETransformer."""
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig

    torch.manual_seed(0)
    config = HookedTransformerConfig(
        n_layers=3, d_model=D_IN, n_ctx=32, d_head=8, n_heads=2, d_vocab=50, act_fn="gelu", seed=0, device="cpu"
    )
    model = HookedSAETransformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


@pytest.fixture
def text():
    """Makes a data set of n rows of 16 tokens."""
    import datasets

    def make(n=64):
        rows = torch.randint(1, 50, (n, 16), generator=torch.Generator().manual_seed(0)).tolist()
        return datasets.Dataset.from_list([{"tokens": row} for row in rows])

    return make


@pytest.fixture
def store(model, text):
    """Makes SAELens' source of activations for one of its SAEs."""
    from sae_lens import ActivationsStore

    def make(sae):
        return ActivationsStore.from_sae(
            model, sae, dataset=text(), context_size=16, store_batch_size_prompts=8, n_batches_in_buffer=4,
            train_batch_size_tokens=64, streaming=False, device="cpu",
        )  # fmt: skip

    return make
