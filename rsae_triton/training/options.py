"""The fields of `TrainSettings` as keyword arguments of `train`, for editors and type checkers."""

from __future__ import annotations

from os import PathLike
from typing import Literal, TypedDict

from rsae_triton.training.recipes import Recipe


class TrainOptions(TypedDict, total=False):
    """All fields of `TrainSettings`, which documents them; a test keeps the two in step."""

    steps: int
    recipe: str | Recipe
    target_l0: float | Literal["auto"] | None
    batch_size: int
    accumulate: int
    optimizer: Literal["adam", "adamw"]
    weight_decay: float
    lr: float
    warmup: int | None
    decay: float
    sparsity_warmup: int
    clip: float
    decoder_norm: Literal["keep", "unit", "free"]
    trainable: Literal["all", "encoder", "gate"]
    rounds: Literal["through", "after"]
    precision: Literal["float32", "bf16"]
    memory: Literal["auto", "saved", "chunked", "streamed", "sparse"]
    exact: bool
    seed: int
    deterministic: bool
    objective: Literal["mse", "mse+kl"]
    kl_weight: float
    kl_sequences: int
    kl_from: float
    dead_after: int
    log_every: int
    out: str | PathLike[str] | None
    checkpoint_every: int | None
    checkpoint_minutes: float
    keep: int
    resume: bool
    track: tuple[Literal["tensorboard", "wandb"], ...]
    project: str | None
