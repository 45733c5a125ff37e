"""Activations: reading them from a language model into stores on disk, and replacing them in the model."""

from rsae_triton.activations.boot import load_host
from rsae_triton.activations.corpus import check_corpus, load_corpus
from rsae_triton.activations.documents import Document, corpus_sha256, split
from rsae_triton.activations.downloads import cache_dir, fetch
from rsae_triton.activations.extract import Splits, extract, extract_hooks, extract_splits, split_three_ways
from rsae_triton.activations.from_tensor import store_tensor
from rsae_triton.activations.host import HostModel, SpliceLoss
from rsae_triton.activations.pairs import PairedSplits, PairedStore, extract_pair_splits, extract_pairs
from rsae_triton.activations.store import ActivationStore, Sequences

__all__ = [
    "ActivationStore",
    "Document",
    "HostModel",
    "PairedSplits",
    "PairedStore",
    "Sequences",
    "SpliceLoss",
    "Splits",
    "cache_dir",
    "check_corpus",
    "corpus_sha256",
    "extract",
    "extract_hooks",
    "extract_pair_splits",
    "extract_pairs",
    "extract_splits",
    "fetch",
    "load_corpus",
    "load_host",
    "split",
    "split_three_ways",
    "store_tensor",
]
