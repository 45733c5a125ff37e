"""The settings of a training run: one documented dataclass, for `train(...)` and for `rsae train`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rsae_triton.common.checks import check_flag, check_integer, check_number, check_seed
from rsae_triton.common.errors import ConfigError
from rsae_triton.common.files import as_path
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.training.recipes import Recipe

# Settings that may change when a run is resumed, because they affect no number.
FREE = ("out", "resume", "checkpoint_every", "checkpoint_minutes", "keep", "memory", "exact", "track", "project")

# The parameters that each choice of `trainable` keeps, bit for bit.
KEPT_BY: dict[str, tuple[str, ...]] = {
    "all": (),
    "encoder": ("W_dec", "b_dec"),
    "gate": ("W_enc", "b_enc", "W_dec", "b_dec"),
}

LR = 6e-4


def trains(sae: SparseAutoencoder, trainable: str) -> bool:
    """Whether `trainable` leaves any parameter of this SAE to train: a ReLU or TopK SAE has no gate of its own."""
    return any(name not in KEPT_BY[trainable] for name, _ in sae.named_parameters())


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of one training run.

    Raises:
        ConfigError: a value that cannot be used.
    """

    steps: int
    """Optimiser steps."""
    recipe: str | Recipe = "auto"
    """What is minimised: a name of `recipes.RECIPES`, or auto for the one that fits the SAE. A Rational SAE's
    sparsity weight starts near what stage 1 found a feature to be worth."""
    target_l0: float | Literal["auto"] | None = "auto"
    """Hold l0 here by steering the sparsity weight (recipes that have one): a number, none for a fixed weight, or auto
    for the teacher's where stage 1 noted it."""
    batch_size: int = 512
    """Tokens per optimiser step, over all processes."""
    accumulate: int = 1
    """Cut each batch into this many pieces and sum their gradients; the step is that of the whole batch."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """adamw decays the weights of the encoder and the decoder by `weight_decay`."""
    weight_decay: float = 0.01
    """Weight decay of adamw; adam has none."""
    lr: float = LR
    """Learning rate, warmed up linearly and brought to zero linearly at the end."""
    warmup: int | None = None
    """Steps of the warm-up; a twentieth of all when not given."""
    decay: float = 0.2
    """Last share of the steps, over which the learning rate falls to zero."""
    sparsity_warmup: int = 0
    """Steps over which the sparsity weight rises from zero, and a target l0 falls from that of the first batch to its
    value; at full weight from the start, or all at once, features die."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    decoder_norm: Literal["keep", "unit", "free"] = "keep"
    """Norm of the decoder's rows: as it was, one, or free (a free norm evades the l1 penalty)."""
    trainable: Literal["all", "encoder", "gate"] = "all"
    """Which parameters are trained. all. encoder: all but W_dec and b_dec, so that labels of features stay valid. gate:
    only thresholds and the rounds' parameters; every weight stays bit-equal."""
    rounds: Literal["through", "after"] = "after"
    """For an encoder with rounds. after: train with one round and add the others later, untrained, at the l0 they had
    been set for; through: train all of them (a little less error, but on some data features get worse)."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16: matrix products in bfloat16 (autocast); weights, gate, optimiser and sums stay float32."""
    memory: Literal["auto", "saved", "chunked", "streamed", "sparse"] = "auto"
    """How a step is computed. saved: in one piece. chunked: cut over tokens. streamed: cut over features. sparse: one
    dense product, the rest for active entries only. auto: sparse where that is faster, else the first that fits."""
    exact: bool = False
    """Find the active features of sparse steps in the products' own dtype. Otherwise a narrower product finds
    candidates, which are computed again: in bfloat16 on a CPU that has it in hardware, the same up to rounding; for a
    large SAE on a GPU in float8 or bfloat16, where active features that it misses are counted ("missed" in the log)."""
    seed: int = 0
    """Seed of the order of the batches; nothing else is random."""
    deterministic: bool = False
    """Use only deterministic algorithms; slower on a GPU."""
    objective: Literal["mse", "mse+kl"] = "mse"
    """mse, or mse and KL: the increase in the language model's loss when the reconstruction is spliced in, through the
    layers above (`train` then takes a host, and whole sequences beside the shuffled tokens)."""
    kl_weight: float = 1.0
    """Weight of the KL term: it is scaled to be worth this many times the mse."""
    kl_sequences: int = 4
    """Whole sequences per step on which the KL is computed."""
    kl_from: float = 0.0
    """Share of the steps before the KL is used; it takes most of a step's time."""
    dead_after: int = 10_000
    """Tokens without activity after which a feature counts as dead."""
    log_every: int = 10
    """Steps between entries of the log."""
    out: Path | None = None
    """Folder for metrics.jsonl and checkpoints/; nothing is written when not given."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; only by time when not given."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints, whichever comes first."""
    keep: int = 2
    """Checkpoints kept, the latest ones."""
    resume: bool = False
    """Go on from the latest checkpoint in `out`, or begin where there is none."""
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where metrics go besides metrics.jsonl."""
    project: str | None = None
    """Project on Weights & Biases; rsae-triton when not given."""

    def __post_init__(self) -> None:
        counts = ("steps", "warmup", "sparsity_warmup", "dead_after")
        for name in (*counts, "batch_size", "log_every", "accumulate", "keep", "checkpoint_every", "kl_sequences"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 0 if name in counts else 1)
        check_seed(self.seed)
        for name in ("deterministic", "resume", "exact"):
            check_flag(name, getattr(self, name))
        if self.out is not None:
            object.__setattr__(self, "out", as_path("out", self.out))
        for name in ("lr", "clip", "checkpoint_minutes"):
            check_number(name, getattr(self, name), above=0)
        check_number("weight_decay", self.weight_decay, least=0)
        check_number("decay", self.decay, least=0, most=1)
        check_number("kl_weight", self.kl_weight, above=0)
        check_number("kl_from", self.kl_from, least=0, most=1)
        for name, choices in (
            ("optimizer", ("adam", "adamw")),
            ("decoder_norm", ("keep", "unit", "free")),
            ("precision", ("float32", "bf16")),
            ("trainable", tuple(KEPT_BY)),
            ("objective", ("mse", "mse+kl")),
            ("rounds", ("through", "after")),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        if unknown := set(self.track) - {"tensorboard", "wandb"}:
            raise ConfigError(f"track names {', '.join(sorted(unknown))}; there are tensorboard and wandb")
        if self.decoder_norm == "unit" and self.trainable != "all":
            raise ConfigError(
                f"trainable={self.trainable!r} keeps the decoder, decoder_norm='unit' scales it; choose one of them"
            )
        if self.accumulate > self.batch_size:
            raise ConfigError(f"accumulate={self.accumulate} cuts a batch of {self.batch_size} into nothing")
        if self.out is None and (self.resume or self.track or self.checkpoint_every is not None):
            raise ConfigError("resume, track and checkpoint_every need a folder: set `out`")

    def learning_rate(self, step: int) -> float:
        """The factor on the learning rate: linear warm-up, constant, then linear decay to zero over the last `decay` of
        all steps."""
        warmup = self.steps // 20 if self.warmup is None else self.warmup
        up = (step + 1) / warmup if step < warmup else 1.0
        return min(up, (self.steps - step) / max(1.0, self.decay * self.steps))

    def sparsity_ramp(self, step: int) -> float:
        """The factor on the sparsity weight."""
        return min(1.0, step / self.sparsity_warmup) if self.sparsity_warmup else 1.0

    def fixed(self, recipe: Recipe) -> dict[str, Any]:
        """The settings that must not change when a run is resumed, as read back from JSON. recipe: the resolved
        recipe."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in FREE}
        return json.loads(json.dumps({**values, "recipe": asdict(recipe)}))
