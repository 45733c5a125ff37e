"""`rsae demo`: teacher, upgrade, control, evaluation and report on a real language model, in one run."""

from __future__ import annotations

import copy
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rsae_triton.activations import (
    ActivationStore,
    HostModel,
    PairedSplits,
    PairedStore,
    Splits,
    corpus_sha256,
    load_corpus,
    load_host,
)
from rsae_triton.common.errors import ConfigError, ShapeError
from rsae_triton.common.files import check_room, make_folder, write_atomically, write_text
from rsae_triton.common.names import EMBEDDED, EMBEDDED_NOTE, model_metadata
from rsae_triton.common.progress import LoggedProgress
from rsae_triton.common.terminal import plain
from rsae_triton.evaluation import compare
from rsae_triton.evaluation.downstream import splice_of
from rsae_triton.experiments.contenders import contender, more_rounds
from rsae_triton.experiments.demo_options import Demo, check
from rsae_triton.experiments.teach import (
    FAMILIES,
    L0,
    TeacherPlan,
    objective_of,
    pair_splits_for,
    saved_teacher,
    splits_for,
)
from rsae_triton.experiments.teach import make_teacher as train_or_load
from rsae_triton.features import write_features
from rsae_triton.ops.runtime import matmul_precision
from rsae_triton.report import summary_table, write_report
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.making import making_of, warn_of_making
from rsae_triton.sae.transcoder import Transcoder
from rsae_triton.sae.units import scales_of, take_note
from rsae_triton.training.loop import TrainLog, train
from rsae_triton.training.settings import trains
from rsae_triton.upgrading.asking import ask
from rsae_triton.upgrading.stage_one import upgrade

_SAVED = 7  # teacher, rsae, control, rectangle, and three of them with a round more
SHARED = ("W_enc", "b_enc", "W_dec", "b_dec")


class Stages:
    """Prints each stage on the console when it begins, and records how long it took."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.console.print(f"[bold]{plain(name)}[/bold]")
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
        self.console.print(f"  [dim]{self.seconds[name]:.1f} s[/dim]")


# bf16 matrix units where the CPU has them: half the time per step, the same error to 3 digits.
@matmul_precision("medium")
def run(demo: Demo) -> Path:
    """Runs the whole pipeline and returns the path of the report.

    Raises:
        RsaeError: something that the user can fix; the cache stays usable.
    """
    demo = demo.sized()
    check(demo)
    torch.manual_seed(demo.seed)
    console = Console()
    stages = Stages(console)
    loaded = None if demo.teacher in FAMILIES else saved_teacher("--teacher", demo.teacher)
    model, hook = place(demo, loaded)

    with stages.stage(f"Host model {model}"):
        centred = loaded is not None and making_of(loaded.metadata).centred
        host = load_host(
            model, device=demo.device, hook_name=hook, center_writing_weights="where possible" if centred else False
        )
        if loaded is not None:
            warn_of_making(loaded.metadata, "--teacher")
        check_width(loaded, host, demo.teacher)
        # Before hours of work: encoder and decoder of each of the SAEs that are saved.
        d_sae = demo.d_sae if loaded is None else loaded.d_sae
        check_room(demo.out, _SAVED * 8 * host.hook_width() * d_sae, "what the demo saves")
    with stages.stage("Text and activations"):
        documents = load_corpus(list(demo.text))
        places = pair_of(demo, loaded, host)
        reads = {} if loaded is None else making_of(loaded.metadata).reading
        splits = (
            splits_for(host, documents, demo.tokens, demo.seed, **reads)
            if places is None
            else pair_splits_for(host, documents, places, demo.tokens, demo.seed, **reads)
        )
    x, test = splits.train.tensor().to(host.device), splits.test.tensor().to(host.device)
    # Text that nothing is trained on: on its training text a teacher's l0 is lower than elsewhere. (A transcoder has no
    # rounds.)
    unseen = splits.validation.tensor().to(host.device) if places is None else None
    with stages.stage(f"Teacher {demo.teacher}"):
        teacher, teacher_log = make_teacher(demo, loaded, splits, x)
    with stages.stage("Stage 1: upgrade"):
        form = "direct" if demo.recipe == "paper" else "auto"
        init = upgrade(teacher, x, degree=demo.degree, form=form, rounds=1, validation=unseen)
        console.print(f"  {init.metadata['stage1']['summary']}", markup=False)
    target_l0 = init.metadata["stage1"]["train_l0"]
    rsae, control = copy.deepcopy(init), copy.deepcopy(teacher)
    options: dict[str, Any] = {
        "steps": demo.steps,
        "batch_size": demo.batch_size,
        "seed": demo.seed + 1,
        "trainable": demo.trainable,
    }
    with stages.stage("Stage 2: Rational SAE"):
        rsae_log = train(rsae, x, recipe=demo.recipe, validation=unseen, label="  Rational SAE", **options)
    with stages.stage("Control: the teacher, same steps, same batches"):
        control_log = None
        if trains(control, demo.trainable):
            options |= {"recipe": objective_of(control), "label": "  control"}
            control_log = train(control, x, target_l0=target_l0, **options)
    saes: dict[str, SparseAutoencoder] = {"teacher": teacher, "init": init, "rsae": rsae, "control": control}
    logs = {"teacher": teacher_log, "rsae": rsae_log, "control": control_log}
    if form != "direct" and places is None:
        with stages.stage("Second control: JumpReLU's rectangle in place of the rational, same recipe"):
            second = contender("rectangle", teacher, init, x)
            saes["rectangle"] = second.sae
            options |= {"recipe": second.recipe, "label": "  rectangle"}
            logs["rectangle"] = train(second.sae, x, target_l0=target_l0, **options)
    if form != "direct" and unseen is not None:
        with stages.stage("One more round for the teacher, nothing trained"):
            asked = ask(host, splits.validation, teacher, lambda weights: more_rounds(teacher, 2, unseen, weights))
            saes["rounds"] = asked.sae
            console.print(f"  {saes['rounds'].metadata['rounds']['summary']}", markup=False)
        with stages.stage("One more round for the Rational SAE and the rectangle, after their training"):
            for name in ("rsae", "rectangle"):
                saes[f"{name}-rounds"] = more_rounds(saes[name], 2, unseen, asked.weights)
    with stages.stage("Evaluation on held-out text"):
        metrics = score(demo, host, splits, saes, test)
    with stages.stage("Report"):
        shared = [*SHARED, *["W_skip"] * (getattr(teacher, "W_skip", None) is not None)]
        bit_equal = all(torch.equal(getattr(init, name), getattr(teacher, name)) for name in shared)
        metrics["stage1"] = {**init.metadata["stage1"], "weights_bit_equal": bit_equal}
        metrics["meta"] = facts(demo, host, splits, corpus_sha256(documents), stages)
        save(demo.out, saes, splits.train, metrics)
        page = None
        if isinstance(splits.test, ActivationStore):
            page = write_features(
                demo.out / "features.html", rsae, splits.test, teacher=teacher, host=host,
                title=f"Features of the Rational SAE of {host.name}, {splits.train.manifest['hook_name']}",
            )  # fmt: skip
        report = write_report(
            demo.out / "report.html",
            title=f"Rational {'SAE' if places is None else 'transcoder'} of {host.name}, {metrics['meta']['hook']}",
            facts={name: str(value) for name, value in metrics["meta"].items() if not isinstance(value, dict)},
            metrics=metrics,
            logs=logs,
            saes=saes,
            x=test,
            store=splits.test,
            tokenizer=host.tokenizer,
            seed=demo.seed,
            features_page=None if page is None else page.name,
        )
        if demo.figure is not None:
            from rsae_triton.report.plots import readme_figure
            from rsae_triton.report.svg import svg_file

            drawn = readme_figure(metrics, logs, saes, test)
            make_folder(demo.figure.parent)
            if demo.figure.suffix == ".svg":
                write_text(demo.figure, svg_file(drawn, "demo"))
            else:
                write_atomically(demo.figure, lambda path: drawn.savefig(path, dpi=150))
    console.print(summary_table(metrics))
    console.print(f"{plain(report)} ({sum(stages.seconds.values()):.0f} s)", soft_wrap=True)
    return report


def place(demo: Demo, teacher: SparseAutoencoder | None) -> tuple[str, str | None]:
    """Model and hook: from the command line, else from the saved teacher, else the default model and None."""
    said = {} if teacher is None else teacher.metadata
    return demo.model or said.get("host") or said.get("model_name") or EMBEDDED, demo.hook or said.get("hook_name")


def check_width(teacher: SparseAutoencoder | None, host: HostModel, source: str) -> None:
    """Raises ShapeError if a saved teacher's d_in is not the width of the host's activations."""
    if teacher is not None and teacher.d_in != host.hook_width():
        raise ShapeError(
            f"the teacher {source} has d_in={teacher.d_in}, but {host.name} has {host.hook_width()} at "
            f"{host.default_hook}; give the model and --hook that the teacher was trained on"
        )


def pair_of(demo: Demo, teacher: SparseAutoencoder | None, host: HostModel) -> tuple[str, str] | None:
    """Where a transcoder reads and writes; None for an SAE.

    A saved transcoder names its two places. One that is trained here is of the MLP in the layer of the host's default
    hook.
    """
    if isinstance(teacher, Transcoder):
        outside = teacher.metadata.get("hook_name_out")
        if not outside:
            raise ConfigError(
                f"the transcoder {demo.teacher} does not say where it writes (hook_name_out in its metadata)"
            )
        return host.default_hook, str(outside)
    if teacher is not None or not demo.teacher.endswith("transcoder"):
        return None
    layer = host.default_hook.split(".")[1]
    if demo.hook is not None and ".mlp." not in host.default_hook:
        raise ConfigError(f"--hook {demo.hook} is not where an MLP reads; give one such as blocks.{layer}.mlp.hook_in")
    return f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out"


def make_teacher(
    demo: Demo, loaded: SparseAutoencoder | None, splits: Splits | PairedSplits, x: torch.Tensor
) -> tuple[SparseAutoencoder, TrainLog | None]:
    """Returns the loaded teacher in the store's units; or trains one, unless an earlier run has trained the same."""
    if loaded is not None:
        return loaded.to(x.device).to_units_(*(scales_of(splits.train) or ())), None
    sparse = ("relu", "jumprelu", "transcoder", "relu_transcoder")
    held = min(L0, demo.d_sae / 4) if demo.teacher in sparse else None
    plan = TeacherPlan(
        demo.teacher, demo.d_sae, steps=demo.teacher_steps, batch_size=demo.batch_size, seed=demo.seed, l0=held
    )
    return train_or_load(plan, splits, x)


def score(
    demo: Demo, host: HostModel, splits: Splits | PairedSplits, saes: dict[str, SparseAutoencoder], test: torch.Tensor
) -> dict[str, Any]:
    """Scores all SAEs on the test text, as `compare` does, and shows progress."""
    sequences = splits.test.sequences
    count = min(demo.sequences, len(sequences.tokens))
    with LoggedProgress() as bar:
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


def facts(demo: Demo, host: HostModel, splits: Splits | PairedSplits, corpus: str, stages: Stages) -> dict[str, Any]:
    """Facts about the run for the report: command, data, machine and versions."""
    manifest = splits.train.manifest
    return {
        "command": "rsae " + shlex.join(sys.argv[1:]),
        "model": host.name,
        **({"model_is": EMBEDDED_NOTE} if host.name == EMBEDDED else {}),
        "library": host.library,
        "hook": manifest["hook_name"],
        **({"hook_out": manifest["hook_name_out"]} if "hook_name_out" in manifest else {}),
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


def save(
    out: Path, saes: dict[str, SparseAutoencoder], store: ActivationStore | PairedStore, metrics: dict[str, Any]
) -> None:
    """Writes metrics.json and every SAE but `init`; saved SAEs take raw activations."""
    make_folder(out)
    for name in saes.keys() - {"init"}:
        own = copy.deepcopy(saes[name])
        meta = metrics["meta"]
        own.metadata.update(model_metadata(meta["model"]), hook_name=meta["hook"], split_seed=meta["seed"])
        take_note(own, store)
        own.save_pretrained(out / name, metrics=metrics)
    text = json.dumps(metrics, indent=2)
    write_text(out / "metrics.json", text + "\n")
