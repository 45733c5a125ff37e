"""`rsae ...`: every command is a documented dataclass or function. An error that the user can fix takes one line."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable
from textwrap import dedent
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from tyro.extras import SubcommandApp

from rsae_triton import __version__
from rsae_triton.commands import gates
from rsae_triton.commands.absorption import Absorption, run_absorption
from rsae_triton.commands.bench import Bench, run_bench
from rsae_triton.commands.doctor import Doctor
from rsae_triton.commands.doctor import doctor as run_doctor
from rsae_triton.commands.evaluate import Eval, run_eval
from rsae_triton.commands.extract import Extract, run_extract
from rsae_triton.commands.features import Features, run_features
from rsae_triton.commands.formats import Formats, run_formats
from rsae_triton.commands.match import Match, run_match
from rsae_triton.commands.plan import Plan, run_plan
from rsae_triton.commands.probe import Probe, run_probe
from rsae_triton.commands.train import Export, Train, Upgrade, export, run_train, run_upgrade
from rsae_triton.common.errors import RsaeError, Stopped
from rsae_triton.common.terminal import plain, steady_output
from rsae_triton.experiments.demo import run
from rsae_triton.experiments.demo_options import Demo
from rsae_triton.experiments.known import Known
from rsae_triton.experiments.known import known as run_known
from rsae_triton.experiments.reproduce import Reproduce
from rsae_triton.experiments.reproduce import reproduce as run_reproduce
from rsae_triton.experiments.sweep import Sweep
from rsae_triton.experiments.sweep import sweep as run_sweep
from rsae_triton.experiments.teach import Teach
from rsae_triton.experiments.teach import teach as run_teach

ABOUT = (
    "Upgrades sparse autoencoders (SAEs) of language models into Rational SAEs, and measures what that gains. "
    "Begin with `rsae demo`, or with `rsae doctor`. An error takes one line; --debug shows where it came from. "
    "--version says which version this is."
)
_EXAMPLES = re.compile(r"^ *Examples:\n(.*?)(?:\n\s*\n|\s*\Z)", re.MULTILINE | re.DOTALL)


def bench(config: Annotated[Bench, tyro.conf.arg(name="")]) -> None:
    run_bench(config)


def demo(config: Annotated[Demo, tyro.conf.arg(name="")]) -> None:
    run(config)


def evaluate(config: Annotated[Eval, tyro.conf.arg(name="")]) -> None:
    run_eval(config)


def match(config: Annotated[Match, tyro.conf.arg(name="")]) -> None:
    run_match(config)


def features(config: Annotated[Features, tyro.conf.arg(name="")]) -> None:
    print(run_features(config))


def probe(config: Annotated[Probe, tyro.conf.arg(name="")]) -> None:
    run_probe(config)


def absorption(config: Annotated[Absorption, tyro.conf.arg(name="")]) -> None:
    run_absorption(config)


def teach(config: Annotated[Teach, tyro.conf.arg(name="")]) -> None:
    print(run_teach(config))


def known(config: Annotated[Known, tyro.conf.arg(name="")]) -> None:
    print(run_known(config))


def sweep(config: Annotated[Sweep, tyro.conf.arg(name="")]) -> None:
    print(run_sweep(config))


def reproduce(config: Annotated[Reproduce, tyro.conf.arg(name="")]) -> None:
    print(run_reproduce(config))


def doctor(config: Annotated[Doctor, tyro.conf.arg(name="")]) -> int:
    return run_doctor(config)


def extract(config: Annotated[Extract, tyro.conf.arg(name="")]) -> None:
    run_extract(config)


def formats(config: Annotated[Formats, tyro.conf.arg(name="")]) -> None:
    run_formats(config)


def plan(config: Annotated[Plan, tyro.conf.arg(name="")]) -> None:
    run_plan(config)


def upgrade(config: Annotated[Upgrade, tyro.conf.arg(name="")]) -> None:
    print(run_upgrade(config))


def train(config: Annotated[Train, tyro.conf.arg(name="")]) -> None:
    print(run_train(config))


def export_sae(config: Annotated[Export, tyro.conf.arg(name="")]) -> None:
    print(export(config.run, config.out))


# In the order of the help. The docstrings of the configurations say what a command does, and give examples.
COMMANDS: dict[str, tuple[Callable[..., Any], type]] = {
    "demo": (demo, Demo),
    "extract": (extract, Extract),
    "teach": (teach, Teach),
    "upgrade": (upgrade, Upgrade),
    "train": (train, Train),
    "export": (export_sae, Export),
    "eval": (evaluate, Eval),
    "match": (match, Match),
    "features": (features, Features),
    "probe": (probe, Probe),
    "absorption": (absorption, Absorption),
    "sweep": (sweep, Sweep),
    "known": (known, Known),
    "reproduce": (reproduce, Reproduce),
    "plan": (plan, Plan),
    "formats": (formats, Formats),
    "bench": (bench, Bench),
    "doctor": (doctor, Doctor),
}


def examples(arguments: list[str]) -> str:
    """Returns the examples of the command whose help `arguments` ask for; without a command, the first example of
    each."""
    texts = {name: config.__doc__ or "" for name, (_, config) in COMMANDS.items()} | {"gates": gates.fit.__doc__ or ""}
    found = {name: dedent(match[1]).splitlines() for name, text in texts.items() if (match := _EXAMPLES.search(text))}
    asked = next((one for one in arguments if one in texts), None)
    lines = found.get(asked, []) if asked else [of[0] for of in found.values()]
    return "\n".join(["examples:", *(f"  {line}" for line in lines)]) if lines else ""


# Names that other tools use, and the names they have here.
_ELSEWHERE = {
    "--layer": "--hook blocks.LAYER.hook_resid_post (what that layer gives out)",
    "--hook-name": "--hook",
    "--hook-point": "--hook",
    "--model-name": "--model",
    "--width": "--d-sae",
    "--dict-size": "--d-sae",
    "--n-tokens": "--tokens",
    "--output": "--out",
}


def misspelt(arguments: list[str]) -> str | None:
    """Returns a hint for an unknown command or option that looks like a known one; None if there is none."""
    known = [*COMMANDS, "gates"]
    command = arguments[0] if arguments else ""
    if command and not command.startswith("-") and command not in known:
        near = difflib.get_close_matches(command, known, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
        return f"no command {command!r}; {hint}"
    if command not in COMMANDS:
        return None
    names = {"--" + name.replace("_", "-") for name in vars(COMMANDS[command][1])["__dataclass_fields__"]}
    for word in arguments[1:]:
        option = word.split("=")[0].replace("_", "-")
        if option in _ELSEWHERE and option not in names:
            return f"rsae {command} has no {option}; use {_ELSEWHERE[option]}"
    return None


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. Returns 0 if it worked, 2 after an error that is explained in one line."""
    with steady_output():
        return _main(sys.argv[1:] if arguments is None else arguments)


def _main(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        print(f"rsae-triton {__version__}")
        return 0
    if problem := misspelt(arguments):
        Console(stderr=True, soft_wrap=True).print(f"[red]rsae:[/red] {plain(problem)}", highlight=False)
        return 2
    debug = "--debug" in arguments
    app, gate_app = SubcommandApp(), SubcommandApp()
    for name, (command, config) in COMMANDS.items():
        app.command(name=name, help=(config.__doc__ or "").split("\n\n")[0])(command)
    gate_app.command(name="fit")(gates.fit)
    gate_app.command(name="show")(gates.show)
    gate_app.command(name="rebuild")(gates.rebuild)
    app.command(gate_app, name="gates", help="Fit rational gates, with proof.")
    try:
        status = app.cli(args=[one for one in arguments if one != "--debug"], prog="rsae", description=ABOUT)
    except Stopped as stopped:
        Console(stderr=True, soft_wrap=True).print(plain(stopped), highlight=False)
        return 0
    except SystemExit as end:  # tyro exits after the help; it does not show the examples in docstrings
        if not end.code and {"-h", "--help"} & set(arguments):
            print(examples(arguments))
        raise
    except (RsaeError, OSError, MemoryError, RuntimeError) as error:
        # On a CPU, torch reports a lack of memory as a plain RuntimeError; any other RuntimeError is a bug of ours.
        bug = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError | RsaeError)
        if debug or (bug and "can't allocate memory" not in str(error)):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, RsaeError):
            message += " (a problem of the machine: disk space, write permission or memory; --debug shows where)"
        Console(stderr=True, soft_wrap=True).print(f"[red]rsae:[/red] {plain(message)}", highlight=False)
        return 2
    except KeyboardInterrupt:
        said = "interrupted; what was finished is kept, run the same command (train: with --resume) to go on"
        print(f"rsae: {said}", file=sys.stderr)
        return 130
    return status if isinstance(status, int) else 0
