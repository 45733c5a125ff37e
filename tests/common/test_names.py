"""Models by the names that libraries give them, and places on the hub by everything that people paste."""

import pytest

from rsae_triton.common.errors import ConfigError, FormatError
from rsae_triton.common.hub import address
from rsae_triton.common.names import EMBEDDED_ID, hub_model, model_metadata


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2-small", "gpt2"),
        ("gpt2", "gpt2"),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped"),
        ("gemma-2-2b", "google/gemma-2-2b"),
        ("gemma-v3-270m-pt", "google/gemma-3-270m"),
        ("gemma-v3-270m-it", "google/gemma-3-270m-it"),
        ("gemma-v3-4b-pt", "google/gemma-3-4b-pt"),
        ("google/gemma-3-4b-pt", "google/gemma-3-4b-pt"),
        ("qwen3-14b", "Qwen/Qwen3-14B"),
        ("mistral-7b", "mistralai/Mistral-7B-v0.1"),
        ("/cache/hub/models--EleutherAI--pythia-70m/snapshots/0ab1/", "EleutherAI/pythia-70m"),
        ("/cache/hub/models--gpt2/snapshots/0ab1", "gpt2"),
        ("a-model-of-mine", "a-model-of-mine"),
    ],
)
def test_models_are_found_by_their_other_names(name, expected):
    assert hub_model(name) == expected


def test_our_table_agrees_with_transformer_lens():
    """Checks every short name that SAELens' registry uses for its models."""
    official = pytest.importorskip("transformer_lens.loading_from_pretrained").get_official_model_name
    names = ("gpt2-small", "pythia-70m-deduped", "gemma-2-2b", "gemma-2-9b", "gemma-2-27b", "gemma-2-9b-it", "gemma-2b",
             "gemma-2b-it", "mistral-7b", "qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-14b")  # fmt: skip
    assert {name: hub_model(name) for name in names} == {name: official(name) for name in names}


def test_the_embedded_model_is_called_what_it_is():
    said = model_metadata("smollm2")
    assert said["model_name"] == EMBEDDED_ID
    assert said["host"] == "smollm2"
    assert "4-bit" in said["host_note"]
    assert model_metadata("gpt2-small") == {"model_name": "gpt2"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/repo/layer_1/", ("owner/repo", "layer_1", None)),
        ("owner/repo@v1/layer_1", ("owner/repo", "layer_1", "v1")),
        ("owner/repo@v1", ("owner/repo", "", "v1")),
        ("hf://owner/repo/layer_1/a.pt", ("owner/repo", "layer_1/a.pt", None)),
        ("hf://owner/repo@abc/a.pt", ("owner/repo", "a.pt", "abc")),
        ("hf://owner/repo/a.safetensors?revision=abc", ("owner/repo", "a.safetensors", "abc")),
        ("hf:/owner/repo/a.pt", ("owner/repo", "a.pt", None)),  # what Path makes of it
        ("https://huggingface.co/owner/repo", ("owner/repo", "", None)),
        ("https://huggingface.co/owner/repo/tree/main/layer_1/", ("owner/repo", "layer_1", "main")),
        ("https:/huggingface.co/owner/repo/blob/abc/a.pt", ("owner/repo", "a.pt", "abc")),
        ("https://huggingface.co/owner/repo/resolve/main/a%20b.pt?download=true", ("owner/repo", "a b.pt", "main")),
        ("a/b/gpt2_blocks.0.hook_mlp_out_24576:v1", ("a/b", "gpt2_blocks.0.hook_mlp_out_24576:v1", None)),
        ("gpt2", None),
        ("../owner/repo", None),
        ("owner/../repo", None),
    ],
)  # fmt: skip
def test_addresses_of_the_hub(text, expected):
    found = address(text)
    assert (None if found is None else tuple(found)) == expected


def test_addresses_other_than_a_hub_model_are_refused():
    with pytest.raises(FormatError, match="Hugging Face hub"):
        address("https://example.com/owner/repo")
    with pytest.raises(FormatError, match="no address of a model"):
        address("hf://datasets/owner/name")
    with pytest.raises(ConfigError, match="v1"):
        address("owner/repo@v1", "v2")
    assert address("owner/repo@v1", "v1").revision == "v1"
