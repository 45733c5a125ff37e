"""Chooses how a training step is computed, so that it fits into memory and is fast: whole, in pieces, or sparse."""

from __future__ import annotations

import os
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rsae_triton.common.errors import ConfigError
from rsae_triton.ops.cost import Step, cost, finding_bytes
from rsae_triton.ops.screening import Screen, screen_for
from rsae_triton.ops.support_triton import capacity_for
from rsae_triton.sae.architectures import TopKSAE
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.batch_topk import BatchTopKSAE
from rsae_triton.sae.rational import FusedRationalSAE

MODES = ("auto", "saved", "chunked", "streamed", "sparse")
# The usable share of free memory, since allocators round up and fragment.
SHARE = 0.8
# Fewer tokens or features at a time make matrix products inefficient.
LEAST_TOKENS, LEAST_FEATURES, MOST_FEATURES = 256, 512, 4096
# The share of [n_tokens, d_sae] at which a sparse step gives up and is computed densely.
MOST_SHARE = 0.25


@dataclass(frozen=True)
class MemoryPlan:
    """How a step is computed.

    Attributes:
        mode: "saved" (autograd keeps h and z of the whole batch), "chunked" or "streamed" (see `rational_autoencode`),
            or "entries" (the only mode for an encoder with rounds); for a single step also "sparse" (one dense product,
            all else on the support).
        chunk_tokens, chunk_features: arguments of `rational_autoencode`; None for all at once.
        need: predicted bytes that the step takes at most, besides x, weights, gradients and optimiser state (`cost`).
        free: bytes available before training for all that follows; None if unknown.
        weights: bytes of the SAE. optimiser: bytes that gradients and Adam's two moments will take.
        support: which steps are sparse: "never", "auto" (if the support is small, see `route.py`) or "always". A step
            whose support is too large uses `mode` in any case. exact: see `TrainSettings`. on_gpu: whether sparse steps
            are those of `support_triton`, which never synchronise and have room for a limited number of entries.
        language: bytes that a language model in the loop takes.
    """

    mode: str
    chunk_tokens: int | None
    chunk_features: int | None
    need: float
    free: float | None
    weights: float = 0.0
    optimiser: float = 0.0
    support: str = "never"
    exact: bool = False
    language: float = 0.0
    on_gpu: bool = False

    def most_entries(self, places: int) -> int:
        """The number of entries above which a sparse step gives up; on a GPU, the number it has room for."""
        return capacity_for(places) if self.on_gpu else max(int(MOST_SHARE * places), 1024)

    def __str__(self) -> str:
        pieces = [
            f"{size} {name} at a time"
            for name, size in (("tokens", self.chunk_tokens), ("features", self.chunk_features))
            if size is not None
        ]
        there = "" if self.free is None else f"; {_size(self.free)} free"
        mode = "on the active entries" if self.mode == "entries" else self.mode
        ways = {
            "never": ", ".join([mode, *pieces]),
            "auto": f"sparse where faster, else {', '.join([self.mode, *pieces])}",
            "always": f"sparse ({', '.join([self.mode, *pieces])} where the support is too large)",
        }
        text = (
            f"memory of a step ({ways[self.support]}): weights {_size(self.weights)}, gradients and optimiser "
            f"{_size(self.optimiser)}, activations {_size(self.need)}"
            + (f", the language model {_size(self.language)}" if self.language else "")
            + there
        )
        return textwrap.fill(text, 80, initial_indent="  ", subsequent_indent="    ")


def plan_memory(
    sae: SparseAutoencoder,
    batch_size: int,
    memory: str = "auto",
    *,
    aux_k: int = 0,
    free: float | None = None,
    no_support: str | None = "it was not asked",
    exact: bool = False,
    language: float = 0.0,
    on_gpu: bool = False,
) -> MemoryPlan:
    """Plans training steps of `batch_size` tokens.

    For dense steps, "auto" takes the first of these that fits into 0.8 of the memory that gradients and Adam's state
    leave free: saved, chunked (same FLOPs, and the same numbers up to rounding), streamed (a fifth more FLOPs). Only a
    Rational SAE can be chunked or streamed. With "auto", steps with a small support are sparse; with "sparse", all are.

    Args:
        aux_k: of the recipe; an auxiliary loss needs the whole code and therefore "saved".
        free: available bytes; the device is asked when None. language: the part of them for a language model in the
            loop.
        no_support: why steps cannot be sparse (`on_entries.reason_against`), or None if they can. exact: see
            `TrainSettings`. on_gpu: whether they use Triton (`on_entries.by_triton`).

    Raises:
        ConfigError: an unknown mode, or one that this SAE or recipe cannot be trained in.
    """
    if memory not in MODES:
        raise ConfigError(f"memory is {memory!r}; choose one of {', '.join(MODES)}")
    rational = isinstance(sae, FusedRationalSAE) and not sae.compares_features
    rational = rational and getattr(sae, "d_out", sae.d_in) == sae.d_in  # pieces need input and output of one width
    whole = not rational or aux_k > 0
    if whole and memory in ("chunked", "streamed"):
        what = "a recipe with an auxiliary loss" if rational else f"a {sae.architecture} SAE"
        raise ConfigError(
            f"memory={memory!r} is for Rational SAEs with thresholds per feature; {what} needs the whole code: "
            "use 'saved' or 'auto'"
        )
    refinement = sae.refinement if isinstance(sae, FusedRationalSAE) and not aux_k else None
    refined = refinement is not None
    if refined and memory not in ("auto", "sparse"):
        raise ConfigError(f"memory={memory!r} is for one round; an encoder with more works on entries: use 'auto'")
    if memory == "sparse" and no_support is not None and not refined:
        raise ConfigError(f"memory='sparse' cannot train {no_support}; use memory='auto'")
    support = "never"
    if no_support is None and memory in ("auto", "sparse") and not refined:
        fast = on_gpu or sae.W_dec.device.type == "cpu"
        support = "always" if memory == "sparse" else "auto" if fast else "never"
    memory = "auto" if memory == "sparse" else memory
    if free is None:
        free = free_memory(sae.W_dec.device)
    later = _later(sae)
    # On the eager backend, autograd keeps as much as plain PyTorch does.
    eager = isinstance(sae, FusedRationalSAE) and sae.backend == "eager"
    budget = None if free is None else SHARE * (free - later - language)
    step = _step(sae, batch_size)
    if refined:
        need = cost(step, "eager" if eager else "rounds").peak_bytes
        need += finding_bytes(step) if sae.W_dec.is_cuda and not eager else 0.0
        if refinement is not None and refinement.weights is not None:  # W_dec times the weights, and its gradient
            need += 8.0 * sae.W_dec.numel()
        plan = MemoryPlan("entries", None, None, need, None)
    else:
        plan = cut(step, budget, "saved" if whole else memory, eager=eager)
    weights = sum(one.numel() * one.element_size() for one in sae.state_dict().values())
    return replace(
        plan,
        free=free,
        weights=weights,
        optimiser=later,
        support=support,
        exact=exact,
        language=language,
        on_gpu=on_gpu,
    )


def screen_of(sae: SparseAutoencoder, plan: MemoryPlan, tokens: int, dtype: torch.dtype) -> Screen:
    """Returns the screen for the product of sparse steps of so many tokens, made in this dtype; it may be none
    (`Screen.dtype`)."""
    ranked = isinstance(sae, TopKSAE | BatchTopKSAE)  # which needs all of h
    if not plan.on_gpu or plan.exact or plan.support == "never" or ranked:
        return Screen(None)
    return screen_for(_step(sae, tokens), dtype, sae.W_dec.device)


def cut(step: Step, budget: float | None, memory: str = "auto", *, eager: bool = False) -> MemoryPlan:
    """Plans one step that takes at most `budget` bytes (None: any number), choosing as `plan_memory` does."""

    def plan(mode: str, tokens: int | None = None, features: int | None = None) -> MemoryPlan:
        strategy = mode if mode != "saved" else "eager" if eager else "split"
        need = cost(step, strategy, chunk_tokens=tokens or 0, chunk_features=features or 0).peak_bytes
        return MemoryPlan(mode, tokens, features, need, None)

    def fits(one: MemoryPlan) -> bool:
        return budget is None or one.need <= budget

    saved = plan("saved")
    if memory == "saved" or (memory == "auto" and fits(saved)):
        return saved
    chunked = [plan("chunked", tokens) for tokens in _halvings(step.n_tokens, LEAST_TOKENS)]
    if memory == "chunked":
        # The largest piece that fits, but not the whole.
        pieces = chunked[1:] or chunked
        return next((one for one in pieces if fits(one)), pieces[-1])
    if memory == "auto" and (found := next((one for one in chunked if fits(one)), None)):
        return found
    features = [size for size in _halvings(min(step.d_sae, MOST_FEATURES), LEAST_FEATURES) if size < step.d_sae]
    streamed = [plan("streamed", None, size) for size in features or [max(1, step.d_sae // 2)]]
    streamed += [
        plan("streamed", tokens, streamed[-1].chunk_features) for tokens in _halvings(step.n_tokens, LEAST_TOKENS)[1:]
    ]
    return next((one for one in streamed if fits(one)), streamed[-1])


def free_memory(device: torch.device) -> float | None:
    """Bytes that new tensors can take on a device; None if unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    found = [one for one in (_meminfo(), _cgroup()) if one is not None]
    return min(found) if found else None


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def _meminfo() -> float | None:
    """MemAvailable of Linux."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_AVPHYS_PAGES" in names else None
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup(root: str = "/sys/fs/cgroup") -> float | None:
    """The memory that a container's limit leaves, if there is one (cgroup version 2)."""
    try:
        limit, used = (Path(root, name).read_text().strip() for name in ("memory.max", "memory.current"))
        return None if limit == "max" else float(limit) - float(used)
    except (OSError, ValueError):
        return None


def _step(sae: SparseAutoencoder, batch_size: int) -> Step:
    itemsize = sae.W_dec.element_size()
    if not isinstance(sae, FusedRationalSAE):
        return Step(batch_size, sae.d_in, sae.d_sae, itemsize=itemsize)
    gate = sae.gate
    p, q = gate.degree
    # More than trained supports have; the true share is unknown before the first step.
    shares = (0.02, 0.05) if sae.rounds > 1 else (Step.active, Step.support)
    return Step(batch_size, sae.d_in, sae.d_sae, p, q, gate.groups == 1, gate.form, itemsize, *shares, sae.rounds)


def _later(sae: SparseAutoencoder) -> int:
    """Bytes that training adds later: gradients and Adam's two moments."""
    return sum(3 * one.numel() * one.element_size() for one in sae.parameters() if one.requires_grad)


def _halvings(size: int, least: int) -> list[int]:
    """size, size / 2, ... down to `least`, rounded up to multiples of 16 (rows of the kernels start aligned)."""
    sizes = [size]
    while sizes[-1] // 2 >= least:
        sizes.append(-(-sizes[-1] // 2 // 16) * 16)
    return sizes
