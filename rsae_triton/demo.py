"""`rsae demo`: teacher, upgrade, control, evaluation and report on a real language model, in one run."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress

from .activations import HostModel, Splits, cache_dir, corpus_sha256, extract_splits, load_corpus, load_host
from .base import SparseAutoencoder, write_atomically
from .errors import ConfigError, FormatError, ShapeError
from .evaluate import compare
from .evaluate.compare import splice_of
from .report import summary_table, write_report
from .teachers import JumpReluSAE, ReluSAE, TopKSAE, load_teacher
from .train import TrainLog, train
from .upgrade import upgrade

FAMILIES: dict[str, type[SparseAutoencoder]] = {"relu": ReluSAE, "jumprelu": JumpReluSAE, "topk": TopKSAE}
MARGIN_L0 = 1.04
SHARED = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass(frozen=True)
class Demo:
    """Upgrade an SAE of a language model into a Rational SAE, beside a fair control, and write a report.

    Examples:
        rsae demo
        rsae demo --teacher topk --out out/topk
        rsae demo --model gpt2 --text my_texts/ --d-sae 24576
        rsae demo --teacher path/to/sae --hook blocks.8.hook_resid_pre
    """

    model: str = "smollm2"
    """Host model: smollm2 (embedded default), a .gguf file, a model folder, or a hub id such as gpt2."""
    text: tuple[str, ...] = ("demo",)
    """Text to read activations from: demo, files, folders, or a hub dataset."""
    hook: str | None = None
    """Where to read, in TransformerLens' names; the middle of the model when not given."""
    teacher: str = "relu"
    """relu, jumprelu or topk to train one here, or the folder of a saved SAE (in the model's own units)."""
    recipe: Literal["auto", "hard", "paper"] = "auto"
    """Stage 2: hard trains the code that is shipped, paper is mse + l1 on the dense code."""
    degree: str = "auto"
    """Degree of the rational, as p,q."""
    out: Path = Path("out/demo")
    """Folder for report.html, metrics.json and the SAEs."""
    d_sae: int = 2304
    """Features of a teacher trained here."""
    tokens: int = 200_000
    """Training tokens to extract (the embedded text holds about 3 million)."""
    teacher_steps: int = 1000
    """Steps of a teacher trained here."""
    steps: int = 400
    """Steps of stage 2, and of the control."""
    batch_size: int = 512
    """Tokens per step."""
    sequences: int = 48
    """Held-out sequences of 128 tokens to splice into for delta_ce."""
    seed: int = 0
    """Of the split, the teacher's start and the order of batches."""
    device: str | None = None
    """cpu or cuda; CUDA where there is one when not given."""
    quick: bool = False
    """A smaller run for tests: few tokens, features and steps; its numbers mean little."""
    figure: Path | None = None
    """Also save the README's picture here."""

    def sized(self) -> Demo:
        """The sizes --quick stands for; what was set by hand stays."""
        if not self.quick:
            return self
        small = {"d_sae": 512, "tokens": 12_000, "teacher_steps": 120, "steps": 40, "sequences": 4}
        standard = Demo()
        own = {name: value for name, value in small.items() if getattr(self, name) == getattr(standard, name)}
        return Demo(**{**asdict(self), **own})


class Stages:
    """Names each stage on the console as it begins, and keeps how long it took."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.console.print(f"[bold]{name}[/bold]")
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
        self.console.print(f"  [dim]{self.seconds[name]:.1f} s[/dim]")


def run(demo: Demo) -> Path:
    """Runs the whole pipeline and returns the path of the report.

    Raises:
        RsaeError: anything a person can mend; the cache stays usable.
    """
    demo = demo.sized()
    check(demo)
    torch.manual_seed(demo.seed)
    # bf16 matrix units where the CPU has them: half the time per step, the same error to 3 digits.
    torch.set_float32_matmul_precision("medium")
    console = Console()
    stages = Stages(console)
    loaded = None if demo.teacher in FAMILIES else load_teacher(demo.teacher)

    with stages.stage(f"Host model {demo.model}"):
        host = load_host(demo.model, device=demo.device, hook_name=demo.hook)
        check_width(loaded, host, demo.teacher)
    with stages.stage("Text and activations"):
        documents = load_corpus(list(demo.text))
        splits = activations(demo, host, documents)
    x, test = splits.train.tensor().to(host.device), splits.test.tensor().to(host.device)
    with stages.stage(f"Teacher {demo.teacher}"):
        teacher, teacher_log = make_teacher(demo, loaded, splits, x)
    with stages.stage("Stage 1: upgrade"):
        init = upgrade(teacher, x, degree=demo.degree, form="direct" if demo.recipe == "paper" else "auto")
        console.print(f"  {init.metadata['stage1']['summary']}")
    # A little above the teacher's, for both: a code can be thresholded down to an l0, never up to it.
    target_l0 = MARGIN_L0 * init.metadata["stage1"]["teacher_l0"]
    rsae, control = copy.deepcopy(init), copy.deepcopy(teacher)
    options: dict[str, Any] = {"steps": demo.steps, "batch_size": demo.batch_size, "seed": demo.seed + 1}
    with stages.stage("Stage 2: Rational SAE"):
        rsae_log = train(rsae, x, recipe=demo.recipe, target_l0=target_l0, label="  Rational SAE", **options)
    with stages.stage("Control: the teacher, same steps, same batches"):
        control_log = train(control, x, target_l0=target_l0, label="  control", **options)
    saes: dict[str, SparseAutoencoder] = {"teacher": teacher, "init": init, "rsae": rsae, "control": control}
    with stages.stage("Evaluation on held-out text"):
        metrics = score(demo, host, splits, saes, test)
    with stages.stage("Report"):
        bit_equal = all(torch.equal(getattr(init, name), getattr(teacher, name)) for name in SHARED)
        metrics["stage1"] = {**init.metadata["stage1"], "weights_bit_equal": bit_equal}
        metrics["meta"] = facts(demo, host, splits, corpus_sha256(documents), stages)
        logs = {"teacher": teacher_log, "rsae": rsae_log, "control": control_log}
        save(demo.out, saes, splits.train.scale, metrics)
        report = write_report(
            demo.out / "report.html",
            title=f"Rational SAE of {host.name}, {splits.train.manifest['hook_name']}",
            facts={name: str(value) for name, value in metrics["meta"].items() if not isinstance(value, dict)},
            metrics=metrics,
            logs=logs,
            saes=saes,
            x=test,
            store=splits.test,
            tokenizer=host.tokenizer,
            seed=demo.seed,
        )
        if demo.figure is not None:
            from .report.plots import readme_figure

            demo.figure.parent.mkdir(parents=True, exist_ok=True)
            readme_figure(metrics, logs, saes, test).savefig(demo.figure, dpi=150)
    console.print(summary_table(metrics))
    console.print(f"{report} ({sum(stages.seconds.values()):.0f} s)")
    return report


def check(demo: Demo) -> None:
    """Refuses what is wrong before anything is downloaded or computed."""
    for name in ("d_sae", "tokens", "teacher_steps", "steps", "batch_size"):
        if getattr(demo, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(demo, name)}; give a positive number")
    if demo.sequences < 2:
        raise ConfigError(f"--sequences is {demo.sequences}; an interval takes at least 2, better 48")
    if demo.tokens < demo.batch_size:
        raise ConfigError(f"--tokens {demo.tokens} is less than one batch of {demo.batch_size}; give more")
    if demo.teacher not in FAMILIES and not Path(demo.teacher).exists():
        raise FormatError(
            f"--teacher {demo.teacher} is neither one of {', '.join(FAMILIES)} nor an existing folder; check the path"
        )


def check_width(teacher: SparseAutoencoder | None, host: HostModel, source: str) -> None:
    if teacher is not None and teacher.d_in != host.hook_width():
        raise ShapeError(
            f"the teacher {source} has d_in={teacher.d_in}, but {host.name} has {host.hook_width()} at "
            f"{host.default_hook}; give the model and --hook that the teacher was trained on"
        )


def activations(demo: Demo, host: HostModel, documents: list[Any]) -> Splits:
    held = max(1000, min(10_000, demo.tokens // 10))
    return extract_splits(host, documents, n_train=demo.tokens, n_validation=held, n_test=held, seed=demo.seed)


def make_teacher(
    demo: Demo, loaded: SparseAutoencoder | None, splits: Splits, x: torch.Tensor
) -> tuple[SparseAutoencoder, TrainLog | None]:
    """The loaded teacher in the store's units, or one trained here, or the same trained in an earlier run."""
    if loaded is not None:
        return loaded.to(x.device).fold_activation_scale_(1 / splits.train.scale), None
    identity = {
        "data": splits.train.manifest["key"],
        **{name: getattr(demo, name) for name in ("teacher", "d_sae", "teacher_steps", "batch_size", "seed")},
        "version": 1,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_dir() / "teachers" / f"{demo.teacher}-{key}"
    log_path = folder / "log.json"
    if log_path.is_file():  # written last: what it lies in is complete
        return load_teacher(folder).to(x.device), TrainLog(**json.loads(log_path.read_text()))
    generator = torch.Generator().manual_seed(demo.seed)
    teacher = FAMILIES[demo.teacher](x.shape[1], demo.d_sae, generator=generator).to(x.device)
    with torch.no_grad():
        teacher.b_dec.copy_(splits.train.mean)
    log = train(
        teacher,
        x,
        steps=demo.teacher_steps,
        batch_size=demo.batch_size,
        lr=1e-3,
        sparsity_warmup=int(0.4 * demo.teacher_steps),
        seed=demo.seed,
        label=f"  {demo.teacher} teacher",
    )
    teacher.save_pretrained(folder)
    write_atomically(log_path, lambda path: path.write_text(json.dumps(log.as_dict())))
    return teacher, log


def score(
    demo: Demo, host: HostModel, splits: Splits, saes: dict[str, SparseAutoencoder], test: torch.Tensor
) -> dict[str, Any]:
    sequences = splits.test.sequences
    count = min(demo.sequences, len(sequences.tokens))
    with Progress() as bar:
        task = bar.add_task("  splicing", total=count)
        return compare(
            saes,
            test,
            contexts=splits.test.contexts,
            host=host,
            tokens=sequences.tokens[:count],
            counted=sequences.counted[:count],
            splice=splice_of(splits.train),
            mean=splits.train.mean,
            progress=lambda n: bar.advance(task, n),
        )


def facts(demo: Demo, host: HostModel, splits: Splits, corpus: str, stages: Stages) -> dict[str, Any]:
    """Where the numbers come from: command, data, machine, versions."""
    manifest = splits.train.manifest
    return {
        "command": "rsae " + shlex.join(sys.argv[1:]),
        "model": host.name,
        "library": host.library,
        "hook": manifest["hook_name"],
        "teacher": demo.teacher,
        "d_in": splits.train.d_in,
        "text": ", ".join(demo.text),
        "corpus_sha256": corpus,
        "train_tokens": splits.train.n_tokens,
        "test_tokens": splits.test.n_tokens,
        "seed": demo.seed,
        "quick": demo.quick,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {host.device}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "seconds_by_stage": {name: round(value, 1) for name, value in stages.seconds.items()},
        "configuration": {name: str(value) for name, value in asdict(demo).items()},
    }


def save(out: Path, saes: dict[str, SparseAutoencoder], scale: float, metrics: dict[str, Any]) -> None:
    """Writes rsae/, teacher/ and control/ in the model's own units, and metrics.json."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("rsae", "teacher", "control"):
        own = copy.deepcopy(saes[name]).fold_activation_scale_(scale)
        meta = metrics["meta"]
        own.metadata.update(
            model_name=meta["model"], hook_name=meta["hook"], activation_scale=scale, split_seed=meta["seed"]
        )
        own.save_pretrained(out / name, metrics=metrics)
    text = json.dumps(metrics, indent=2)
    write_atomically(out / "metrics.json", lambda path: path.write_text(text + "\n"))
