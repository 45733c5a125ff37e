"""The options of `rsae demo`, and the checks that refuse bad ones before anything is computed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rsae_triton.activations import check_corpus
from rsae_triton.common.checks import check_seed
from rsae_triton.common.errors import ConfigError
from rsae_triton.common.files import check_figure, check_folder
from rsae_triton.training.settings import KEPT_BY
from rsae_triton.upgrading.stage_one import parse_degree

_NOT_RESULTS = ("out", "device", "overwrite", "figure")


@dataclass(frozen=True)
class Demo:
    """Upgrade an SAE of a language model into a Rational SAE, beside a fair control, and write a report.

    Examples:
        rsae demo
        rsae demo --teacher topk --out out/topk
        rsae demo --model gpt2 --text my_texts/ --d-sae 24576
        rsae demo --teacher path/to/sae
        rsae demo --teacher transcoder
    """

    model: str | None = None
    """Host model: smollm2 (embedded), a .gguf file, a model folder, or a hub id such as gpt2; the one that a saved
    teacher names when not given, else smollm2."""
    text: tuple[str, ...] = ("demo",)
    """Text to read activations from: demo, files, folders, or a hub dataset."""
    hook: str | None = None
    """Where to read, in TransformerLens' names; where a saved teacher says it reads when not given, else the middle of
    the model."""
    teacher: str = "relu"
    """relu, jumprelu, topk or batchtopk to train an SAE here; transcoder (JumpReLU), relu_transcoder or topk_transcoder
    to train one of an MLP; or a saved SAE or transcoder: a folder, a file or a hub id."""
    recipe: Literal["auto", "hard", "hard-trained", "paper"] = "auto"
    """Stage 2: hard trains the code that is shipped, paper is mse + l1 on the dense code."""
    trainable: Literal["all", "encoder", "gate"] = "all"
    """What stage 2 and the control train: all; encoder: the decoder stays, and with it every label; gate: every
    weight stays."""
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
    """Seed of the split of the text, the teacher's initial weights and the order of batches."""
    device: str | None = None
    """cpu or cuda. Default: CUDA where there is one."""
    overwrite: bool = False
    """Replace what a demo with other settings left in --out."""
    quick: bool = False
    """A smaller run for tests: few tokens, features and steps; its numbers mean little."""
    figure: Path | None = None
    """Also save the README's picture here."""

    def sized(self) -> Demo:
        """Returns the options with --quick's sizes, except for sizes that were given."""
        if not self.quick:
            return self
        small = {"d_sae": 512, "tokens": 12_000, "teacher_steps": 120, "steps": 40, "sequences": 4}
        standard = Demo()
        own = {name: value for name, value in small.items() if getattr(self, name) == getattr(standard, name)}
        return Demo(**{**asdict(self), **own})


def check(demo: Demo) -> None:
    """Checks the options before anything is downloaded or computed (ConfigError)."""
    for name in ("d_sae", "tokens", "teacher_steps", "steps", "batch_size"):
        if getattr(demo, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(demo, name)}; give a positive number")
    check_seed(demo.seed)
    if demo.trainable not in KEPT_BY:
        raise ConfigError(f"--trainable is {demo.trainable!r}; choose {', '.join(KEPT_BY)}")
    if demo.degree != "auto":
        parse_degree(demo.degree)
    check_corpus(demo.text)
    check_folder(demo.out)
    check_settings(demo)
    if demo.figure is not None:
        check_figure("--figure", demo.figure)
    if demo.sequences < 2:
        raise ConfigError(f"--sequences is {demo.sequences}; an interval takes at least 2, better 48")
    if demo.tokens < demo.batch_size:
        raise ConfigError(f"--tokens {demo.tokens} is less than one batch of {demo.batch_size}; give more")


def check_settings(demo: Demo) -> None:
    """Raises ConfigError if --out holds a demo with other settings; results of the same settings may be replaced."""
    try:
        before = json.loads((demo.out / "metrics.json").read_text(encoding="utf-8"))["meta"]["configuration"]
        now = {name: str(value) for name, value in asdict(demo).items() if name not in _NOT_RESULTS}
        other = {name: before[name] for name, value in now.items() if name in before and before[name] != value}
    except (OSError, ValueError, LookupError, TypeError):  # there is no such file, or it is not ours
        return
    if other and not demo.overwrite:
        what = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in other.items())
        raise ConfigError(
            f"{demo.out} holds a demo with other settings ({what}); give another --out, or --overwrite to replace it"
        )
