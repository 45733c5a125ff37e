"""Tiny random language models as Hugging Face modules, and one behind TransformerLens' bridge."""

import copy

import torch

D_MODEL, N_LAYERS, VOCABULARY = 32, 4, 60


def _louder(model):
    """Random weights of the usual size make every residual alike; larger ones make replacing it matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    return model.eval().requires_grad_(False)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        intermediate_size=64,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attn_implementation="eager",
    )
    return _louder(LlamaForCausalLM(config))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=D_MODEL, n_layer=N_LAYERS, n_head=4, n_positions=64, **tokens)
    return _louder(GPT2LMHeadModel(config))


def tokenizer(folder):
    """A tokenizer saved in `folder`: TransformerLens reads it a second time, from where it came."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, **{f"w{index}": index for index in range(1, VOCABULARY)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<s>",
        bos_token="<s>",
        eos_token="<s>",
        pad_token="<s>",
    )
    made.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def saved(model, folder):
    """A folder that every library loads `model` from, with its tokenizer."""
    model.save_pretrained(folder)
    tokenizer(folder)
    return folder


def text(folder, n_files=12, n_words=800):
    """A folder of files of random words that the tokenizer knows."""
    generator = torch.Generator().manual_seed(0)
    for index in range(n_files):
        words = torch.randint(1, VOCABULARY, (n_words,), generator=generator).tolist()
        (folder / f"{index}.txt").write_text(" ".join(f"w{word}" for word in words))
    return folder


def bridge(model, folder, cls=None):
    """A TransformerBridge (or a subclass) over a copy of `model`, which it rewires; `folder` takes its tokenizer."""
    if cls is None:
        from transformer_lens.model_bridge import TransformerBridge as cls  # noqa: N813
    return cls.boot_transformers("tiny", hf_model=copy.deepcopy(model), tokenizer=tokenizer(folder), device="cpu")
