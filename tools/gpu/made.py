"""The SAEs and inputs of the GPU check: sizes, gates, and a support as small as a trained SAE's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rsae_triton import FusedRationalSAE, RationalGate, fit_gate
from rsae_triton.ops.cost import Step
from rsae_triton.training.recipes import GATE_PARAMETERS

L0 = 64.0
SUPPORT = 2.1
"""Entries of the support for every active code, as in the demo's trained SAEs (75 at an l0 of 35)."""
WEIGHT = 0.05
GATES = (((3, 2), 1), ((9, 8), 0))
"""Degree and coefficient sets (0: one per feature)."""
SHAPES = ((4096, 768, 24576), (8192, 2304, 65536), (16384, 4096, 131072))
TINY = ((16, 8, 40),)


@dataclass(frozen=True)
class Case:
    """A whole training step of the default recipe: gated, hard, frozen coefficients, float32 weights, bf16 products."""

    n_tokens: int
    d_in: int
    d_sae: int
    degree: tuple[int, int] = (3, 2)
    groups: int = 1

    def __str__(self) -> str:
        sets = "shared" if self.groups == 1 else "per feature"
        return f"{self.n_tokens}x{self.d_in}x{self.d_sae} {self.degree} {sets}"

    def fields(self) -> dict[str, Any]:
        """The case in the form of `rsae_triton.report.speed`."""
        return {
            "work": "step", "n_tokens": self.n_tokens, "d_in": self.d_in, "d_sae": self.d_sae,
            "degree": list(self.degree), "groups": self.groups, "form": "gated", "dtype": "bf16", "tf32": False,
            "sweep": "",
        }  # fmt: skip

    def step(self, rounds: int = 1) -> Step:
        active = min(L0, self.d_sae / 16) / self.d_sae
        return Step(
            self.n_tokens, self.d_in, self.d_sae, *self.degree, self.groups == 1, "gated", 2, active, SUPPORT * active,
            rounds,
        )  # fmt: skip


def make(case: Case, device: torch.device, *, form: str = "gated", seed: int = 0) -> tuple[FusedRationalSAE, Tensor]:
    """An SAE with float32 weights and its input x [n_tokens, d_in]: sparse sums of decoder directions plus noise. The
    thresholds leave L0 features active (fewer where there are few), the gates' widths SUPPORT times as many entries."""
    generator = torch.Generator(device=device).manual_seed(seed)
    n, d_in, d_sae = case.n_tokens, case.d_in, case.d_sae
    directions = torch.empty(d_sae, d_in, device=device).normal_(generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    k = min(24, d_sae)
    chosen = torch.randint(d_sae, (n, k), device=device, generator=generator)
    sizes = torch.empty(n, k, device=device).exponential_(generator=generator)
    x = torch.nn.functional.embedding_bag(chosen, directions, per_sample_weights=sizes, mode="sum")
    x += 0.3 * x.norm(dim=1, keepdim=True) * torch.empty_like(x).normal_(generator=generator) / d_in**0.5
    x *= d_in**0.5 / x.norm(dim=1).mean()
    h = (x[:256] @ directions[: min(4096, d_sae)].t()).flatten()[: 2**23]
    active = min(L0, d_sae / 16) / d_sae
    level, low = (float(torch.quantile(h, 1 - share)) for share in (active, SUPPORT * active))
    options: dict[str, Any] = {"groups": case.groups or d_sae, "input_scale": max(level - low, 1e-3)}
    if case.degree == (12, 12):
        # No table has it, and fitting needs scipy: the (9, 8) gate with more coefficients, all of them zero.
        fit = fit_gate("step", (9, 8), margin=0.1)
        more = {"form": "gated", "backward": "rational", "threshold": level, "centre": fit.centre}
        gate = RationalGate(
            d_sae, case.degree, [*fit.a, 0.0, 0.0, 0.0], [*fit.b, 0.0, 0.0, 0.0, 0.0], **options, **more
        )
    elif form == "gated":
        fit = fit_gate("step", case.degree, margin=0.1)
        options |= {"form": "gated", "backward": "rational", "thresholds": torch.full((d_sae,), level)}
        gate = RationalGate.from_fit(fit, d_sae, **options)
    else:
        options |= {"output_scale": options["input_scale"], "activity_threshold": 0.1 * options["input_scale"]}
        gate = RationalGate.from_fit(fit_gate("relu", case.degree), d_sae, **options)
    sae = FusedRationalSAE(d_in, d_sae, gate=gate, dtype=torch.float32, initialise=False).to(device)
    with torch.no_grad():
        sae.W_dec.copy_(directions)
        sae.W_enc.data = directions.clone().t()  # feature by feature in memory
        sae.b_enc.fill_(0.0 if form == "gated" else -level)
        sae.b_dec.zero_()
    return sae, x


def with_rounds(sae: FusedRationalSAE, x: Tensor, rounds: int = 2) -> FusedRationalSAE:
    """The same SAE with as many rounds, set on some of x."""
    sae.backend = "triton" if x.is_cuda else "eager"  # the interpreter would take minutes
    made = sae.with_rounds(rounds, x[:1024], n_tokens=min(len(x), 1024))
    for one in made.parameters():
        one.requires_grad_(True)
    return freeze(made)


def freeze(sae: FusedRationalSAE) -> FusedRationalSAE:
    """Freezes the gate's coefficients, as the default recipe does."""
    for name in GATE_PARAMETERS:
        getattr(sae.gate, name).requires_grad_(False)
    return sae
