"""What is benchmarked: the sizes, gates and dtypes of each case, and inputs that look like a language model's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rsae_triton import FusedRationalSAE, RationalGate
from rsae_triton.ops.cost import Step
from rsae_triton.remez import fit_gate

ACTIVITY = 0.03
"""The activity threshold of a direct gate, in units of its scale; the (3, 2) gate's largest error is 0.022."""
ACTIVE = 0.004
"""The share of a token's features that the biases leave active: 74 of 18432."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One line of the results.

    Attributes:
        work: "encode" (inference), "backward" (encoder forward and backward), "step" (loss, backward, Adam),
            "sparse" (inference to rows and back) or "coefficients" (the gate's backward pass alone).
        groups: coefficient sets; 0 means one per feature. form: of the gate. dtype: "fp32" or "bf16".
        tf32: whether float32 products may use TF32. compiled: whether torch.compile takes part (it costs seconds).
        powers: whether eager PyTorch by powers takes part; with many coefficients it is by far the slowest.
        sweep: the size that a scaling case varies, or "".
    """

    work: str
    n_tokens: int
    d_in: int
    d_sae: int
    degree: tuple[int, int] = (3, 2)
    groups: int = 1
    form: str = "direct"
    dtype: str = "fp32"
    tf32: bool = False
    compiled: bool = True
    powers: bool = True
    sweep: str = ""

    def __str__(self) -> str:
        sets = {0: "per feature", 1: "shared"}.get(self.groups, f"{self.groups} groups")
        dtype = f"{self.dtype}{' tf32' if self.tf32 else ''}"
        size = f"{self.n_tokens}x{self.d_in}x{self.d_sae}"
        return f"{self.work} {size} {self.degree} {sets} {self.form} {dtype}{f' over {self.sweep}' * bool(self.sweep)}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def cost_step(self) -> Step:
        return Step(
            self.n_tokens, self.d_in, self.d_sae, *self.degree, self.groups == 1, self.form, self.torch_dtype.itemsize
        )


SHARED, FEATURE = {"degree": (3, 2), "groups": 1}, {"degree": (9, 8), "groups": 0}


def cpu_cases() -> Iterator[Case]:
    """Those that answer the targets first, then one of every kind: a budget of time cuts the end (--bench-resume goes
    on there). torch.compile costs 10 to 60 s a case where nothing is in its cache."""
    large = Case("step", 2048, 576, 18432, compiled=False, powers=False)
    small = replace(large, d_sae=4608, powers=True)
    yield replace(large, compiled=True, powers=True, **SHARED)
    yield replace(large, compiled=True, **FEATURE)
    yield replace(small, compiled=True, **SHARED)
    yield replace(large, work="sparse")
    yield replace(small, work="coefficients", **FEATURE)
    yield replace(small, work="encode", compiled=True, **SHARED)
    yield replace(small, work="backward", **SHARED)
    yield replace(small, degree=(5, 4))
    yield replace(small, form="gated", degree=(2, 2))
    base = Case("step", 512, 256, 2048, compiled=False)
    yield from sweeps(base, (64, 1024), (256, 4096), (16, 256), ((1, 0), (3, 2), (5, 4), (9, 8)))
    small = replace(small, powers=False)
    for work in ("step", "encode", "backward"):
        yield replace(small, work=work, **FEATURE)
    yield replace(small, form="gated", **FEATURE)
    yield replace(small, degree=(5, 4), groups=0)
    yield replace(small, degree=(3, 2), groups=0)
    yield replace(small, degree=(9, 8))
    yield replace(small, form="gated", degree=(5, 4))
    yield replace(large, form="gated", degree=(2, 2))
    yield replace(large, degree=(5, 4))
    yield replace(large, form="gated", **FEATURE)


def gpu_cases() -> Iterator[Case]:
    """In the order of what matters: a budget of time cuts the end. torch.compile costs half a minute a case."""
    gpt2, gemma = Case("step", 4096, 768, 24576, dtype="bf16"), Case("step", 4096, 2304, 65536, dtype="bf16")
    large = Case("step", 8192, 4096, 131072, dtype="bf16")
    for size in (gpt2, gemma, large):
        for gate in (SHARED, FEATURE):
            yield replace(size, **gate)
    for size in (replace(gpt2, compiled=False), replace(gemma, compiled=False)):
        for work in ("encode", "sparse", "backward", "coefficients"):
            yield replace(size, work=work, **FEATURE)
    base = Case("step", 4096, 768, 16384, dtype="bf16", compiled=False)
    yield from sweeps(base, (512, 16384), (4096, 65536), (64, 4096))
    for tf32 in (True, False):
        yield replace(gpt2, dtype="fp32", tf32=tf32, compiled=False)
    yield replace(gpt2, degree=(5, 4), groups=0)
    yield replace(gpt2, form="gated", degree=(2, 2))
    yield replace(gpt2, form="gated", **FEATURE)


def tiny_cases() -> Iterator[Case]:
    """Every kind of work at sizes that Triton's interpreter can do: a test of this program, not of speed."""
    for work in ("step", "encode", "backward", "sparse"):
        yield Case(work, 48, 16, 64, compiled=work == "encode", **FEATURE)
    yield Case("coefficients", 16, 16, 32, groups=0)
    yield Case("step", 32, 16, 64, form="gated", degree=(2, 2), dtype="bf16", compiled=False)
    yield from sweeps(Case("step", 16, 16, 64, compiled=False), (16, 64), (32, 128), (2, 4))


def sweeps(
    base: Case,
    tokens: tuple[int, int],
    features: tuple[int, int],
    groups: tuple[int, int],
    degrees: tuple[tuple[int, int], ...] = ((1, 0), (3, 2), (5, 4), (9, 8), (12, 12)),
) -> Iterator[Case]:
    """How a step grows with each size alone: from the first number to the second in steps of two (groups: both)."""
    for name, (least, most) in (("d_sae", features), ("n_tokens", tokens)):
        size = least
        while size <= most:
            yield replace(base, sweep=name, **{name: size})
            size *= 2
    for degree in degrees:
        yield replace(base, sweep="degree", degree=degree)
    for count in (1, *groups, 0):
        yield replace(base, sweep="groups", degree=(5, 4), groups=count)


def make_sae(case: Case, device: torch.device | str, backend: str) -> tuple[FusedRationalSAE, Tensor]:
    """The case's SAE and its input x [n_tokens, d_in], the same for every backend: fixed seeds.

    x is a sparse sum of the decoder's directions plus noise, with mean norm sqrt(d_in); the encoder looks along the
    decoder's directions, with biases (and thresholds, in the gated form) that leave ACTIVE of the features active.
    """
    n, d_in, d_sae = case.n_tokens, case.d_in, case.d_sae
    generator = torch.Generator(device=device).manual_seed(0)

    def draw(kind: str, *shape: int) -> Tensor:
        empty = torch.empty(shape, device=device)
        return empty.normal_(generator=generator) if kind == "normal" else empty.exponential_(generator=generator)

    directions = torch.nn.functional.normalize(draw("normal", d_sae, d_in), dim=1)
    k = min(24, d_sae)
    chosen = torch.randint(d_sae, (n, k), device=device, generator=generator)
    x = torch.nn.functional.embedding_bag(chosen, directions, per_sample_weights=draw("exp", n, k), mode="sum")
    x += 0.3 * x.norm(dim=1, keepdim=True) * draw("normal", n, d_in) / d_in**0.5
    x *= d_in**0.5 / x.norm(dim=1).mean()
    h = x[:256] @ directions[: min(4096, d_sae)].t()
    level, scale = (float(torch.quantile(h.flatten()[: 2**23], share)) for share in (1 - ACTIVE, 1 - 1e-5))
    gate = _gate(case, level, scale)
    generator_cpu = torch.Generator().manual_seed(0)
    sae = FusedRationalSAE(
        d_in, d_sae, gate=gate, backend=backend, dtype=torch.float32, generator=generator_cpu, initialise=False
    ).to(device)
    with torch.no_grad():
        sae.W_dec.copy_(directions)
        sae.W_enc.copy_(directions.t())
        sae.b_enc.fill_(0.0 if case.form == "gated" else -level)
        sae.b_dec.copy_(0.1 * draw("normal", d_in))
    return sae.to(case.torch_dtype), x.to(case.torch_dtype)


def _gate(case: Case, level: float, scale: float) -> RationalGate:
    groups = case.groups or case.d_sae
    if case.form == "gated":
        if case.degree == (2, 2):
            from rsae_triton.sae.gate import smooth_step

            a, b = smooth_step()
            return RationalGate(
                case.d_sae, (2, 2), a, b, groups=groups, form="gated", amplitude="identity", backward="rational",
                input_scale=level, threshold=level,
            )  # fmt: skip
        fit = fit_gate("step", case.degree, margin=0.1)
        return RationalGate.from_fit(
            fit, case.d_sae, groups=groups, form="gated", amplitude="identity", backward="rational",
            thresholds=torch.full((case.d_sae,), level), input_scale=level,
        )  # fmt: skip
    scale = max(scale - level, 1e-3)
    options: dict[str, Any] = {
        "input_scale": scale, "output_scale": scale, "activity_threshold": ACTIVITY * scale,
    }  # fmt: skip
    if case.degree[1] == 0 or case.degree == (12, 12):
        # No table has these; what is timed is arithmetic, so a fit of (9, 8) padded with small coefficients serves.
        p, q = case.degree
        a = [0.5, 0.5, *[1e-3 / (k + 1) for k in range(p - 1)]]
        b = [1e-3 / (k + 1) for k in range(q)]
        return RationalGate(case.d_sae, case.degree, a, b, groups=groups, **options)
    return RationalGate.from_fit(fit_gate("relu", case.degree), case.d_sae, groups=groups, **options)
