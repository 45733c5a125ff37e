"""A whole training step of other libraries' SAEs, as their own trainers make it: forward, backward, clipping, Adam, and
what each does to its decoder. What is not installed does not take part (`make peers`)."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rsae_triton import FusedRationalSAE

LIBRARIES = ("SAELens", "sparsify", "dictionary_learning")
LR = 1e-9


def versions() -> dict[str, str]:
    found = {}
    for name in ("sae-lens", "eai-sparsify", "dictionary-learning"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def steps(like: FusedRationalSAE, x: Tensor, theta: float, k: int) -> dict[str, Callable[[], None]]:
    """By name, one step on x of an SAE with the weights of `like`."""
    made: dict[str, Callable[[], None]] = {}
    for build in (saelens, sparsify, dictionary_learning):
        try:
            made |= build(like, x, theta, k)
        except ImportError as error:
            print(f"{build.__name__} does not take part: {error}", flush=True)
    return made


def saelens(like: FusedRationalSAE, x: Tensor, theta: float, k: int) -> dict[str, Callable[[], None]]:
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    common: dict[str, Any] = {
        "d_in": like.d_in, "d_sae": like.d_sae, "dtype": "float32", "device": "cpu", "normalize_activations": "none",
        "apply_b_dec_to_input": True,
    }  # fmt: skip
    dead = torch.zeros(like.d_sae, dtype=torch.bool)

    def step(peer: Any, coefficients: dict[str, float]) -> Callable[[], None]:
        copied(peer, like)
        optimizer = torch.optim.Adam(peer.parameters(), lr=LR)  # as its trainer makes it

        def run() -> None:
            out = peer.training_forward_pass(TrainStepInput(x, coefficients, dead, 0, False))
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return run

    jump = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**common, jumprelu_init_threshold=theta))
    return {
        "SAELens JumpReLU": step(jump, {"l0": 1e-3}),
        "SAELens TopK": step(TopKTrainingSAE(TopKTrainingSAEConfig(**common, k=k)), {}),
        "SAELens BatchTopK": step(BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**common, k=k)), {}),
    }


def sparsify(like: FusedRationalSAE, x: Tensor, theta: float, k: int) -> dict[str, Callable[[], None]]:
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its decoder is a Triton kernel wherever Triton is installed
    from sparsify import SparseCoder, SparseCoderConfig

    peer = SparseCoder(like.d_in, SparseCoderConfig(num_latents=like.d_sae, k=k), x.device, x.dtype)
    with torch.no_grad():
        peer.encoder.weight.copy_(like.W_enc.t())
        peer.W_dec.copy_(like.W_dec)
        peer.b_dec.copy_(like.b_dec)
    optimizer = torch.optim.Adam(peer.parameters(), lr=LR)

    def run() -> None:
        peer.set_decoder_norm_to_unit_norm()
        out = peer(x)
        out.fvu.backward()
        peer.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return {"sparsify TopK": run}


def dictionary_learning(like: FusedRationalSAE, x: Tensor, theta: float, k: int) -> dict[str, Callable[[], None]]:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    def step(trainer: Any) -> Callable[[], None]:
        made = trainer(
            steps=10**9, activation_dim=like.d_in, dict_size=like.d_sae, k=k, layer=0, lm_name="none", lr=LR,
            warmup_steps=0, device="cpu",
        )  # fmt: skip
        with torch.no_grad():
            made.ae.encoder.weight.copy_(like.W_enc.t())
            made.ae.decoder.weight.copy_(like.W_dec.t())
            made.ae.b_dec.copy_(like.b_dec)
        return lambda: made.update(1, x)

    return {"dictionary_learning TopK": step(TopKTrainer), "dictionary_learning BatchTopK": step(BatchTopKTrainer)}


def copied(peer: Any, like: FusedRationalSAE) -> None:
    with torch.no_grad():
        for name in ("W_enc", "W_dec", "b_dec"):
            getattr(peer, name).copy_(getattr(like, name))
