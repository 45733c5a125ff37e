"""A tiny random language model on disk, so that every path runs offline in a second."""

from __future__ import annotations

import pytest
import torch

from rsae_triton.activations import Document

_SENTENCE = "the king and queen of denmark sat upon a stone while seven ravens sang for bread in rain or snow"
WORDS = _SENTENCE.split()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("RSAE_CACHE", str(folder))
    return folder


def words(n: int, seed: int) -> str:
    picks = torch.randint(len(WORDS), (n,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in picks.tolist())


@pytest.fixture(scope="session")
def documents():
    """24 documents of two sources, 6 works each, two neighbouring pieces a work."""
    return [
        Document(words(120, 100 * s + 2 * w + p), source, f"work {w}", {"author": f"a{w % 2}"}, f"{source}/work {w}")
        for s, source in enumerate(("prose", "verse"))
        for w in range(6)
        for p in range(2)
    ]


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def _save(model, folder):
    # Random weights of the usual size make every residual alike; larger ones make replacing it matter.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=3 + len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return _save(LlamaForCausalLM(config), tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=3 + len(WORDS), n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return _save(GPT2LMHeadModel(config), tmp_path_factory.mktemp("tiny-gpt2"))


@pytest.fixture(scope="session")
def host(llama):
    """The tiny Llama in float32 through transformers alone; shared, so tests must leave it as it is."""
    from rsae_triton.activations import load_host

    return load_host(str(llama), library="transformers", dtype="float32", device="cpu")
