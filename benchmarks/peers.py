"""A training step of other libraries' SAEs at the same shape: SAELens' JumpReLU and TopK, EleutherAI's sparsify.

They compute another function, so that nothing can be compared with our reference; each is held to its own definition
instead. Needs `pip install rsae-triton[peers]`; what is not installed does not take part.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from typing import Any

import torch
from cases import Case
from measuring import Contender, WrongResultError, forget
from torch import Tensor

from rsae_triton import FusedRationalSAE

TOP_K = 32


def versions() -> dict[str, str]:
    found = {}
    for name in ("sae-lens", "eai-sparsify"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def steps(case: Case, sae: FusedRationalSAE, x: Tensor) -> list[Contender]:
    made: list[Contender] = []
    for build in (saelens, sparsify):
        try:
            made += build(case, sae, x)
        except ImportError:
            continue
    return made


def saelens(case: Case, sae: FusedRationalSAE, x: Tensor) -> list[Contender]:
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    names = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
    common: dict[str, Any] = {
        "d_in": case.d_in, "d_sae": case.d_sae, "dtype": names[x.dtype], "device": str(x.device),
        "normalize_activations": "none", "apply_b_dec_to_input": True,
    }  # fmt: skip
    level = -float(sae.b_enc[0].detach())

    def contender(name: str, peer: Any, coefficients: dict[str, float], exact: Callable[[Tensor], Tensor]) -> Contender:
        with torch.no_grad():
            peer.W_enc.copy_(sae.W_enc)
            peer.W_dec.copy_(sae.W_dec)
            peer.b_dec.copy_(sae.b_dec)
        optimiser = torch.optim.Adam(peer.parameters(), lr=0.0, fused=True)
        last: dict[str, Tensor] = {}

        def run() -> None:
            optimiser.zero_grad(set_to_none=True)
            out = peer.training_forward_pass(TrainStepInput(x, coefficients, None, 0, False))
            out.loss.backward()
            optimiser.step()
            last["mse"] = out.losses["mse_loss"].detach()

        def found() -> dict[str, Tensor]:
            with torch.no_grad():
                h = (x - peer.b_dec) @ peer.W_enc + peer.b_enc
                x_hat = exact(h) @ peer.W_dec + peer.b_dec
                return held(last["mse"], (x - x_hat).square().sum(-1).mean())

        return Contender(name, run, found, exact=False, forget=lambda: forget(peer))

    jump = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**common, jumprelu_init_threshold=level))
    top = TopKTrainingSAE(TopKTrainingSAEConfig(**common, k=TOP_K))
    return [
        contender("SAELens JumpReLU", jump, {"l0": 0.05}, lambda h: h * (h > jump.threshold.to(h.dtype))),
        contender("SAELens TopK", top, {}, lambda h: largest(h)),
    ]


def sparsify(case: Case, sae: FusedRationalSAE, x: Tensor) -> list[Contender]:
    if x.device.type == "cpu":
        # Its decoder is a Triton kernel wherever Triton is installed.
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoder, SparseCoderConfig

    peer = SparseCoder(case.d_in, SparseCoderConfig(num_latents=case.d_sae, k=TOP_K), x.device, x.dtype)
    with torch.no_grad():
        peer.encoder.weight.copy_(sae.W_enc.t())
        peer.W_dec.copy_(sae.W_dec)
        peer.b_dec.copy_(sae.b_dec)
    optimiser = torch.optim.Adam(peer.parameters(), lr=0.0, fused=True)
    last: dict[str, Tensor] = {}

    def run() -> None:
        optimiser.zero_grad(set_to_none=True)
        out = peer(x)
        out.fvu.backward()
        optimiser.step()
        last["fvu"] = out.fvu.detach()

    def found() -> dict[str, Tensor]:
        with torch.no_grad():
            h = (x - peer.b_dec) @ peer.encoder.weight.t() + peer.encoder.bias
            residual = x - (largest(h) @ peer.W_dec + peer.b_dec)
            return held(last["fvu"], residual.square().sum() / (x - x.mean(0)).square().sum())

    return [Contender("sparsify TopK", run, found, exact=False, forget=lambda: forget(peer))]


def largest(h: Tensor) -> Tensor:
    values, indices = h.topk(min(TOP_K, h.shape[1]), dim=-1)
    return torch.zeros_like(h).scatter(-1, indices, values.relu())


def held(found: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    off = abs(float(found) / float(wanted) - 1)
    if not off <= 0.02:
        raise WrongResultError(f"its loss is {float(found):.4g}, by its own definition {float(wanted):.4g}")
    return {"loss": found}
