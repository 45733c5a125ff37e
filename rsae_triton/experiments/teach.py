"""`rsae teach`: a teacher SAE trained on a language model's activations, kept in the cache."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from torch import Tensor

from rsae_triton.activations import (
    ActivationStore,
    PairedSplits,
    PairedStore,
    Splits,
    cache_dir,
    check_corpus,
    extract_pair_splits,
    extract_splits,
    load_corpus,
    load_host,
)
from rsae_triton.common.checks import check_number, check_seed
from rsae_triton.common.errors import ConfigError, FormatError, SourceError
from rsae_triton.common.files import check_folder, read_finished, write_text
from rsae_triton.common.names import model_metadata
from rsae_triton.evaluation import reconstruction
from rsae_triton.ops.runtime import matmul_precision
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.transcoder import JumpReluTranscoder, ReluTranscoder, TopKTranscoder, Transcoder
from rsae_triton.sae.units import scales_of
from rsae_triton.teachers import BatchTopKSAE, JumpReluSAE, ReluSAE, TopKSAE, load_teacher
from rsae_triton.training.loop import TrainLog, train
from rsae_triton.training.recipes import RECIPES, Recipe, own_objective, recipe_for

FAMILIES: dict[str, type[SparseAutoencoder]] = {
    "relu": ReluSAE,
    "jumprelu": JumpReluSAE,
    "topk": TopKSAE,
    "batchtopk": BatchTopKSAE,
    "transcoder": JumpReluTranscoder,
    "relu_transcoder": ReluTranscoder,
    "topk_transcoder": TopKTranscoder,
}
LR = 1e-3
L0 = 32.0
"""The l0 that teachers are held at by default."""
AUX_K = 256
"""Number of dead features that learn from the residual of the live ones (arXiv:2406.04093), where l0 is held."""
WARMUP = 0.4
"""Share of the steps over which the sparsity weight rises; full weight from the start kills features."""
SAMPLE = 8192
"""Tokens that the activations' norm is taken from."""


@dataclass(frozen=True)
class TeacherPlan:
    """Everything that decides a teacher's weights, besides the activations.

    Attributes:
        family: one of FAMILIES; a "transcoder" is a JumpReLU one. d_sae: features. k: active features per token (topk,
            batchtopk).
        weight: of the sparsity term, in units of the activations' norm (relu, jumprelu); the recipe's when None.
        penalty: "l0" or "tanh" (jumprelu). steps, batch_size, seed: of the training.
        l0: hold the mean number of active features at this value (relu, jumprelu) by adjusting the weight, and revive
            features that die. None keeps the weight fixed.
    """

    family: str
    d_sae: int
    k: int = 32
    weight: float | None = None
    penalty: Literal["l0", "tanh"] = "l0"
    steps: int = 1000
    batch_size: int = 512
    seed: int = 0
    l0: float | None = None

    def __post_init__(self) -> None:
        if self.l0 is not None:
            check_number("l0", self.l0, above=0, most=self.d_sae)
        if self.family not in FAMILIES:
            raise ConfigError(f"teacher is {self.family!r}; choose one of {', '.join(FAMILIES)}")
        if self.penalty != "l0" and self.nonlinearity != "jumprelu":
            raise ConfigError(f"penalty={self.penalty!r} is for jumprelu; a {self.family} teacher has its own")

    @property
    def transcodes(self) -> bool:
        return self.family.endswith("transcoder")

    @property
    def nonlinearity(self) -> str:
        """relu, jumprelu, topk or batchtopk."""
        return (self.family.removesuffix("transcoder").rstrip("_") or "jumprelu") if self.transcodes else self.family

    def recipe(self) -> Recipe:
        """The family's objective at this plan's weight; the control uses the same one."""
        recipe = RECIPES["jumprelu-tanh" if self.penalty == "tanh" else self.nonlinearity]
        if recipe.sparsity == "none":
            return recipe
        recipe = recipe if self.weight is None else replace(recipe, weight=self.weight)
        return recipe if self.l0 is None else replace(recipe, target_l0=self.l0, aux_k=min(AUX_K, self.d_sae))

    def identity(self) -> dict[str, Any]:
        """The settings that decide the weights. Settings that older plans did not have are left out where unused."""
        return {name: value for name, value in asdict(self).items() if name != "l0" or value is not None}

    def untrained(self, d_in: int, d_out: int | None = None) -> SparseAutoencoder:
        options: dict[str, Any] = {"k": self.k} if self.nonlinearity in ("topk", "batchtopk") else {}
        options |= {"d_out": d_out} if self.transcodes else {}
        generator = torch.Generator().manual_seed(self.seed)
        return FAMILIES[self.family](d_in, self.d_sae, generator=generator, **options)


def make_teacher(
    plan: TeacherPlan, splits: Splits | PairedSplits, x: Tensor, label: str = ""
) -> tuple[SparseAutoencoder, TrainLog]:
    """Trains `plan` on x (the training split, in the store's units), or loads what an earlier run trained."""
    identity = {"data": splits.train.manifest["key"], **plan.identity(), "version": 2 if plan.l0 is None else 3}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_dir() / "teachers" / f"{plan.family}-{key}"
    log_path = folder / "log.json"
    log = read_finished(log_path, *(one.name for one in fields(TrainLog)))
    if log is not None:  # written last, so the folder is complete
        teacher = FAMILIES[plan.family].from_pretrained(folder, x.device)
        _said(teacher, splits.train)
        return teacher, TrainLog(**{one.name: log[one.name] for one in fields(TrainLog)})
    label = label or f"  {plan.family} teacher"
    teacher, trained = train_teacher(plan, x, splits.train.mean, label=label)
    # saved before the units are noted: in the cache, weights stay in the units they were trained in
    teacher.save_pretrained(folder)
    write_text(log_path, json.dumps(trained.as_dict()))
    _said(teacher, splits.train)
    return teacher, trained


def train_teacher(
    plan: TeacherPlan, x: Tensor, mean: Tensor, *, label: str | None = None, progress: bool = True
) -> tuple[SparseAutoencoder, TrainLog]:
    """Trains `plan` on x [n_tokens, d_in], or for a transcoder [n_tokens, d_in + d_out]; b_dec starts at `mean`, [d_in]
    or [d_out].

    Where l0 is held, metadata["objective"] notes the sparsity weight at which it settled, so that a control goes on
    with it.
    """
    recipe = plan.recipe()
    teacher = plan.untrained(x.shape[1] - len(mean) * plan.transcodes, len(mean)).to(x.device)
    with torch.no_grad():
        teacher.b_dec.copy_(mean)
    log = train(
        teacher,
        x,
        steps=plan.steps,
        batch_size=plan.batch_size,
        lr=LR,
        recipe=recipe,
        sparsity_warmup=int(WARMUP * plan.steps),
        seed=plan.seed,
        label=label,
        progress=progress,
    )
    objective = {name: value for name, value in plan.identity().items() if name != "d_sae"}
    if recipe.target_l0 is not None:
        norm = float(teacher.sides(x[:SAMPLE])[1].float().norm(dim=1).mean())
        last = [weight for weight in log.weight[-max(1, len(log.weight) // 4) :] if weight > 0]
        if last:
            objective["weight"] = math.exp(fmean(map(math.log, last))) / (norm if recipe.sparsity == "l1" else norm**2)
    teacher.metadata["objective"] = objective
    return teacher, log


def _said(teacher: SparseAutoencoder, store: ActivationStore | PairedStore) -> None:
    """Notes the units in which a teacher was trained (a transcoder has two)."""
    scales = scales_of(store)
    assert scales is not None
    teacher.units = scales[0]
    if isinstance(teacher, Transcoder):
        teacher.units_out = scales[1]


@dataclass(frozen=True)
class Teach:
    """Train a teacher SAE on a language model and save it; the saved SAE takes raw activations.

    Examples:
        rsae teach relu --out out/teacher
        rsae teach topk --k 64 --d-sae 4608 --steps 2000 --out out/topk64
    """

    family: tyro.conf.Positional[Literal["relu", "jumprelu", "topk", "batchtopk"]]
    """Nonlinearity of the teacher."""
    out: Path
    """Folder to save it to."""
    model: str = "smollm2"
    """Host model: smollm2, a .gguf file, a model folder, or a hub id."""
    text: tuple[str, ...] = ("demo",)
    """Text to read activations from: demo, files, folders, or a hub dataset."""
    hook: str | None = None
    """Where to read, in TransformerLens' names; the middle of the model when not given."""
    d_sae: int = 2304
    """Features."""
    k: int = 32
    """Active features per token (topk, batchtopk)."""
    l0: float = L0
    """Mean number of active features to hold (relu, jumprelu), whatever the model."""
    weight: float | None = None
    """A fixed weight of the sparsity term instead, in units of the activations' norm (relu, jumprelu)."""
    penalty: Literal["l0", "tanh"] = "l0"
    """Penalty of a jumprelu teacher."""
    tokens: int = 200_000
    """Training tokens to extract."""
    steps: int = 1000
    """Training steps."""
    batch_size: int = 512
    """Tokens per step."""
    seed: int = 0
    """Seed of the teacher's initial weights and the order of batches."""
    device: str | None = None
    """cpu or cuda. Default: CUDA where there is one."""

    def plan(self) -> TeacherPlan:
        held = self.l0 if self.weight is None and self.family in ("relu", "jumprelu") else None
        return TeacherPlan(
            self.family, self.d_sae, self.k, self.weight, self.penalty, self.steps, self.batch_size, self.seed, held
        )


@matmul_precision("medium")
def teach(config: Teach) -> Path:
    """Runs `rsae teach` and returns the path of the saved teacher."""
    for name in ("tokens", "steps", "batch_size", "d_sae", "k"):
        if getattr(config, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(config, name)}; give a positive number")
    if config.family in ("topk", "batchtopk") and config.k > config.d_sae:
        raise ConfigError(f"--k is {config.k}; there are --d-sae {config.d_sae} features")
    if config.weight is not None:
        check_number("--weight", config.weight, least=0)
    check_seed(config.seed)
    plan = config.plan()
    check_corpus(config.text)
    check_folder(config.out)
    host = load_host(config.model, device=config.device, hook_name=config.hook)
    splits = splits_for(host, load_corpus(list(config.text)), config.tokens)
    teacher, _ = make_teacher(plan, splits, splits.train.tensor().to(host.device))
    score = reconstruction(teacher, splits.validation.tensor().to(host.device))
    Console().print(f"mse {score.mse:.2f}  fvu {score.fvu:.3f}  l0 {score.l0:.1f}  alive {score.alive_fraction:.3f}")
    teacher.metadata.update(model_metadata(host.name), hook_name=splits.train.manifest["hook_name"])
    return teacher.save_pretrained(config.out)


def saved_teacher(option: str, source: str) -> SparseAutoencoder:
    """Loads the teacher that a command was given instead of a family's name.

    Args:
        option: the command line's name for it, for the error message.

    Raises:
        FormatError, SourceError: see `load_teacher`; the message also names the families.
    """
    try:
        return load_teacher(source)
    except (FormatError, SourceError) as error:
        raise type(error)(f"{option} {source} is none of {', '.join(FAMILIES)}, and: {error}") from error


def splits_for(host: Any, documents: list[Any], tokens: int, seed: int = 0, **reads: Any) -> Splits:
    """Returns the three splits, in the sizes that all commands share (one cache); reads: arguments of `extract`."""
    held = max(1000, min(10_000, tokens // 10))
    return extract_splits(host, documents, n_train=tokens, n_validation=held, n_test=held, seed=seed, **reads)


def pair_splits_for(
    host: Any, documents: list[Any], places: tuple[str, str], tokens: int, seed: int = 0, **reads: Any
) -> PairedSplits:
    """Like `splits_for`, for the two places of a transcoder."""
    held = max(1000, min(10_000, tokens // 10))
    reads |= {"n_train": tokens, "n_validation": held, "n_test": held, "seed": seed}
    return extract_pair_splits(host, documents, *places, **reads)


def objective_of(sae: SparseAutoencoder) -> Recipe:
    """The recipe to train a teacher on with: that of its own training if known, else its family's."""
    known = own_objective(sae)
    if not known:
        return recipe_for(sae)
    names = TeacherPlan.__dataclass_fields__
    return TeacherPlan(d_sae=sae.d_sae, **{name: known[name] for name in names if name in known}).recipe()
