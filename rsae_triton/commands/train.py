"""`rsae upgrade`, `rsae train` and `rsae export`: both stages on a store of activations, for runs of any length."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from rsae_triton.activations import ActivationStore, HostModel, PairedStore, load_host
from rsae_triton.common.checkpoint import read_info
from rsae_triton.common.checks import check_integer, parse_device
from rsae_triton.common.errors import ConfigError, FormatError, NumericsError
from rsae_triton.common.files import check_folder
from rsae_triton.evaluation.held_out import load_sae
from rsae_triton.ops.runtime import matmul_precision
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.pretrained import parse_dtype
from rsae_triton.sae.rational import FusedRationalSAE
from rsae_triton.training.checkpoints import Checkpoints
from rsae_triton.training.loop import train
from rsae_triton.training.rounds import check_searched, finish_training
from rsae_triton.training.settings import TrainSettings
from rsae_triton.upgrading.stage_one import parse_coefficients, parse_degree, parse_rounds
from rsae_triton.upgrading.stage_one import upgrade as stage_1


@dataclass(frozen=True, kw_only=True)
class Upgrade:
    """Stage 1: turn a saved SAE into a Rational SAE that computes the same code.

    Examples:
        rsae upgrade out/teacher --activations STORE --out out/rational
    """

    teacher: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="TEACHER")]]
    """The teacher: a folder, a file or a hub id, in any format that load_teacher reads."""
    activations: Path
    """Folder of an activation store (`rsae extract`)."""
    targets: Path | None = None
    """For a transcoder: the store of what it should write, made together with the other (`rsae extract --hook-out`)."""
    out: Path
    """Folder for the Rational SAE."""
    degree: str = "auto"
    """Degree of the rational, as p,q."""
    form: Literal["auto", "gated", "direct"] = "auto"
    """Form of the gate. gated (auto): a smooth step, with zeros below thresholds. direct: the paper's."""
    coefficients: str = "shared"
    """shared, per_feature, or a number of groups by strength."""
    thresholds: Literal["feature", "token"] = "feature"
    """Thresholds of a TopK teacher. feature: fixed ones, no sort. token: exact, by a sort."""
    width: str = "auto"
    """Width of the gated form's ramp, in units of 2 % of the activations' mean norm, or auto."""
    rounds: str = "auto"
    """How many rounds the encoder makes, untrained: each further round encodes what the code has not yet explained.
    auto (2), 1 for the teacher's own encoder, or more."""
    validation: Path | None = None
    """Store of text that the teacher was not trained on, on which l0 is set (rounds); `--activations` when not
    given."""
    model: str | None = None
    """Let this language model choose the rounds by its loss: plain, weighed by what it listens to, or none. auto is the
    model that the activations were read from."""
    device: str | None = None
    """Device of that model: cpu or cuda; CUDA where there is one when not given."""


@dataclass(frozen=True, kw_only=True)
class Train(TrainSettings):
    """Train a saved SAE on a store of activations; killed runs go on with --resume.

    Examples:
        rsae train out/rational --activations STORE --out out/run --steps 22000
        rsae train out/rational --activations STORE --out out/run --steps 22000 --resume
        torchrun --nproc-per-node 8 -m rsae_triton train out/rational --activations STORE --out out/run \\
            --steps 22000 --features-over 8
    """

    sae: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SAE")]]
    """Folder of the SAE to train (a saved SAE, which takes raw activations)."""
    activations: Path
    """Folder of an activation store (`rsae extract`)."""
    targets: Path | None = None
    """For a transcoder: the store of what it should write, made together with the other (`rsae extract --hook-out`)."""
    out: Path = tyro.MISSING  # without MISSING the field would inherit the default None
    """Folder for sae/, metrics.jsonl and checkpoints/."""
    recipe: str = "auto"
    """What is minimised: auto for what fits the SAE, or by name: hard, hard-trained, paper (Rational SAEs); relu,
    jumprelu, jumprelu-tanh, topk, batchtopk."""
    validation: Path | None = None
    """Store of text that is not trained on, on which l0 is set at the end (rounds: else on `--activations`)."""
    split_shards: bool = False
    """Each process that sees other tokens reads its own shards only (on disks of their own). Without, all read rows of
    the same batches, and the numbers are those of one process."""
    features_over: int = 1
    """Processes that share the features of one SAE (under torchrun); the others split the tokens."""
    model: str | None = None
    """Language model of --objective mse+kl. Default: the one that the activations were read from."""
    device: str | None = None
    """cpu or cuda; CUDA where there is one when not given."""

    def settings(self) -> TrainSettings:
        return TrainSettings(**{field.name: getattr(self, field.name) for field in fields(TrainSettings)})


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the SAE of a run's latest checkpoint (or of one checkpoint) as a plain folder, in the model's units.

    Examples:
        rsae export out/run --out out/so_far
    """

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Folder of the run, or of one of its checkpoints."""
    out: Path
    """Folder for the SAE."""


def open_store(config: Upgrade | Train, shards: tuple[int, int] | None = None) -> ActivationStore | PairedStore:
    """Opens the store of `--activations`, for a transcoder together with that of `--targets`.

    Raises:
        ConfigError: their rows are not of the same tokens, or --validation beside --targets.
    """
    store = ActivationStore(config.activations, shards=shards)
    if config.targets is None:
        return store
    if config.validation is not None:
        raise ConfigError(
            "--validation is for rounds, and a transcoder has none; leave it out where --targets is given"
        )
    return PairedStore(store, ActivationStore(config.targets, shards=shards))


def host_of(store: ActivationStore | PairedStore, model: str | None, device: str | None) -> HostModel:
    """Loads the model of this name, or the one that the store was read from; raises ConfigError if that is unknown."""
    source = model or store.manifest.get("model")
    if not source:
        raise ConfigError("the store of activations does not name the model it was read from; give --model")
    return load_host(source, device=device, hook_name=store.manifest.get("hook_name"))


def run_upgrade(config: Upgrade) -> Path:
    """Runs `rsae upgrade` and returns the folder of the Rational SAE."""
    parse_degree(config.degree)
    parse_coefficients(config.coefficients)
    parse_rounds(config.rounds)
    check_folder(config.out)
    if config.device is not None and config.model is None:
        raise ConfigError("--device is that of the language model that chooses the rounds; give --model auto too")
    store, teacher, host = open_store(config), load_sae(config.teacher), None
    if config.model is not None:
        host = host_of(store, None if config.model == "auto" else config.model, config.device)
    rsae = stage_1(
        teacher,
        store,
        host=host,
        degree=config.degree,
        form=config.form,
        coefficients=parse_coefficients(config.coefficients),
        thresholds=config.thresholds,
        width=config.width,
        rounds=config.rounds,
        validation=None if config.validation is None else ActivationStore(config.validation),
    )
    stage1 = rsae.metadata["stage1"]
    print(f"{stage1['summary']}; rsae train holds l0 at {stage1['train_l0']:.2f}")
    return rsae.save_pretrained(config.out)


@matmul_precision("high")
def run_train(config: Train) -> Path:
    """Runs `rsae train`, alone or as one of torchrun's processes. Returns the folder of the SAE."""
    from rsae_triton.training.distributed import launched, mesh_of

    settings = config.settings()
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    parse_device(device)
    check_integer("--features-over", config.features_over, 1)
    if not launched() and config.features_over > 1:
        raise ConfigError(
            f"--features-over {config.features_over} needs as many processes; start with: torchrun --nproc-per-node "
            f"{config.features_over} -m rsae_triton train ..."
        )
    with mesh_of(config.features_over, device) as mesh:
        share = mesh.data if mesh is not None and config.split_shards else None
        store = open_store(config, share)
        sae = load_sae(config.sae)
        aside = None
        if isinstance(sae, FusedRationalSAE) and config.rounds == "after":
            # Checkpoints hold what is being trained, and so does each process of a mesh.
            check_searched(sae)
            aside, sae.refinement = sae.refinement, None
        own = sae if mesh is None else mesh.shard(sae)
        own.to(device if mesh is None else mesh.device)
        host = None
        if settings.objective != "mse":
            host = host_of(store, config.model, device)
        log = train(own, store, settings, mesh=mesh, host=host)
        if mesh is not None and mesh.rank:
            return config.out / "sae"
    if log.mse:
        print(f"mse {log.mse[-1]:.2f}  l0 {log.l0[-1]:.1f}  dead {log.dead[-1]}  {log.seconds:.0f} s")
    folder = export(config.out, config.out / "sae")
    sae = load_sae(folder)
    if isinstance(sae, FusedRationalSAE) and (aside is not None or config.validation is not None):
        # As `train` does in memory; here the SAE is what the last checkpoint holds, and whole.
        held_out = store if config.validation is None else ActivationStore(config.validation)
        finish_training(sae, aside, held_out, settings.target_l0)
        if aside is not None:
            print(sae.metadata["rounds"]["summary"])
        sae.save_pretrained(folder)
    return folder


def export(run: Path, out: Path) -> Path:
    """Writes the SAE of a checkpoint, or of a run's latest one, as a plain folder; it takes raw activations.

    Raises:
        FormatError: there is no checkpoint that can be read.
    """
    from rsae_triton.sae.sharded import read_sae

    found = (run, read_sae(run)) if run.name.startswith("step-") else next(_readable(run), None)
    if found is None:
        raise FormatError(f"{run} holds no checkpoint; name the --out of a run, or one of its checkpoints")
    path, sae = found
    if sae.units is not None:
        sae.to_units_(1.0)
    return sae.to(parse_dtype(str(read_info(path)["config"].get("dtype")))).save_pretrained(out)


def _readable(run: Path) -> Iterator[tuple[Path, SparseAutoencoder]]:
    """Yields a run's checkpoints and the SAEs in them, newest first; a damaged one is skipped with a warning."""
    from rsae_triton.sae.sharded import read_sae

    for path, _ in Checkpoints(run).newest_first():
        try:
            yield path, read_sae(path)
        except (FormatError, NumericsError) as error:
            warnings.warn(f"{error}; going back to the checkpoint before", stacklevel=2)
