"""`rsae extract`: stores activations of a language model on disk, of several places or of a transcoder's two."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rsae_triton.activations.boot import load_host
from rsae_triton.activations.corpus import check_corpus, load_corpus
from rsae_triton.activations.extract import extract_hooks, split_three_ways
from rsae_triton.activations.pairs import extract_pairs
from rsae_triton.common.checks import check_integer, check_number, check_seed
from rsae_triton.common.errors import ConfigError
from rsae_triton.common.files import check_folder


@dataclass(frozen=True)
class Extract:
    """Read a language model's activations into stores, one per place, and print their folders.

    A killed run goes on at the next shard; what is there already is not read again.

    Examples:
        rsae extract --hook blocks.8.hook_resid_pre blocks.16.hook_resid_pre --tokens 1000000
        rsae extract --model gpt2 --text owner/dataset:config:train --root /data/activations
        rsae extract --hook blocks.16.mlp.hook_in --hook-out blocks.16.hook_mlp_out    # for a transcoder
    """

    model: str = "smollm2"
    """Host model: smollm2 (embedded default), a .gguf file, a model folder, or a hub id such as gpt2."""
    hook: tuple[str, ...] = ()
    """Where to read, in TransformerLens' names; the middle of the model when none is given."""
    hook_out: str | None = None
    """For a transcoder: where it writes; `--hook` is then the one place where it reads. Both stores hold the same
    tokens, for `rsae upgrade` and `rsae train` with --activations and --targets."""
    text: tuple[str, ...] = ("demo",)
    """Text to read: demo, files, folders, or hub datasets (streamed)."""
    tokens: int = 200_000
    """Tokens to keep, of each place."""
    context: int = 128
    """Tokens the model sees at once, BOS included."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Dtype of the stored rows."""
    center_writing_weights: bool = False
    """Center the residual stream (TransformerLens' default), for SAEs of GPT-2 that say they expect it."""
    keep_bos: bool = False
    """Keep BOS positions, whose norms are a hundred times the others' in many models."""
    prepend_bos: bool = True
    """Begin every context with BOS; SAEs of SAELens say prepend_bos where theirs did not."""
    seqpos_slice: tuple[int, ...] = ()
    """Keep these positions of a context alone: start, stop and perhaps step, as SAELens' setting."""
    exclude_special_tokens: bool = False
    """Drop activations at the tokenizer's special tokens, as SAELens' setting; BOS is dropped anyway."""
    drop_outliers: float | None = 4.0
    """Drop positions with more than this times the median norm; None keeps them."""
    whole_text: bool = False
    """Read all of the text; otherwise a tenth is held out, the part that rsae eval scores on."""
    max_documents: int = 100_000
    """Rows of a hub dataset to read at most."""
    seed: int = 0
    """Seed of the split and of the order of the text."""
    root: Path | None = None
    """Folder for the stores; in the cache when not given."""
    device: str | None = None
    """cpu or cuda; CUDA where there is one when not given."""


def run_extract(config: Extract) -> list[Path]:
    """Runs `rsae extract`: prints the folders of the stores and returns them."""
    for name, least in (("max_documents", 1), ("tokens", 1), ("context", 2)):
        check_integer(f"--{name.replace('_', '-')}", getattr(config, name), least)
    if config.drop_outliers is not None:
        check_number("--drop-outliers", config.drop_outliers, above=1)
    check_seed(config.seed)
    if config.root is not None:
        check_folder(config.root)
    if config.hook_out is not None and len(config.hook) != 1:
        raise ConfigError(f"--hook-out needs one --hook, where the transcoder reads; got {len(config.hook)}")
    check_corpus(config.text)
    host = load_host(config.model, device=config.device, center_writing_weights=config.center_writing_weights)
    documents = load_corpus(list(config.text), max_documents=config.max_documents)
    if not config.whole_text:
        documents = split_three_ways(documents, seed=config.seed)[0]
    options: dict[str, Any] = {
        "context": config.context,
        "dtype": config.dtype,
        "seed": config.seed,
        "drop_outliers": config.drop_outliers,
        "keep_bos": config.keep_bos,
        "prepend_bos": config.prepend_bos,
        "seqpos_slice": config.seqpos_slice or None,
        "exclude_special_tokens": config.exclude_special_tokens,
        "root": config.root,
    }
    if config.hook_out is None:
        stores = extract_hooks(host, documents, config.hook or [None], config.tokens, **options)
    else:
        pairs = extract_pairs(host, documents, config.hook[0], config.hook_out, config.tokens, **options)
        stores = [pairs.inputs, pairs.targets]
    for store in stores:
        print(store.folder)
    return [store.folder for store in stores]
