"""`rsae ...`: every command is a documented dataclass or function; errors a person can mend take one line."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from tyro.extras import SubcommandApp

from .activations.command import Extract, run_extract
from .bench.commands import Bench, run_bench
from .demo import Demo, run
from .doctor import Doctor
from .doctor import doctor as run_doctor
from .errors import RsaeError, Stopped
from .evaluate.commands import Eval, run_eval
from .evaluate.match_command import Match, run_match
from .evaluate.probe_command import Probe, run_probe
from .plan import Plan, run_plan
from .remez import commands as gates
from .reproduce import Reproduce
from .reproduce import reproduce as run_reproduce
from .sweep import Sweep
from .sweep import sweep as run_sweep
from .teach import Teach
from .teach import teach as run_teach
from .train_command import Export, Train, Upgrade, export, run_train, run_upgrade


def bench(config: Annotated[Bench, tyro.conf.arg(name="")]) -> None:
    run_bench(config)


def demo(config: Annotated[Demo, tyro.conf.arg(name="")]) -> None:
    run(config)


def evaluate(config: Annotated[Eval, tyro.conf.arg(name="")]) -> None:
    run_eval(config)


def match(config: Annotated[Match, tyro.conf.arg(name="")]) -> None:
    run_match(config)


def probe(config: Annotated[Probe, tyro.conf.arg(name="")]) -> None:
    run_probe(config)


def teach(config: Annotated[Teach, tyro.conf.arg(name="")]) -> None:
    print(run_teach(config))


def sweep(config: Annotated[Sweep, tyro.conf.arg(name="")]) -> None:
    print(run_sweep(config))


def reproduce(config: Annotated[Reproduce, tyro.conf.arg(name="")]) -> None:
    print(run_reproduce(config))


def doctor(config: Annotated[Doctor, tyro.conf.arg(name="")]) -> int:
    return run_doctor(config)


def extract(config: Annotated[Extract, tyro.conf.arg(name="")]) -> None:
    run_extract(config)


def plan(config: Annotated[Plan, tyro.conf.arg(name="")]) -> None:
    run_plan(config)


def upgrade(config: Annotated[Upgrade, tyro.conf.arg(name="")]) -> None:
    print(run_upgrade(config))


def train(config: Annotated[Train, tyro.conf.arg(name="")]) -> None:
    print(run_train(config))


def export_sae(config: Annotated[Export, tyro.conf.arg(name="")]) -> None:
    print(export(config.run, config.out))


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; 0 when it worked, 2 after an error that its one line explains."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    app, gate_app = SubcommandApp(), SubcommandApp()
    app.command(name="bench")(bench)
    app.command(name="demo")(demo)
    app.command(name="eval")(evaluate)
    app.command(name="match")(match)
    app.command(name="probe")(probe)
    app.command(name="teach")(teach)
    app.command(name="sweep")(sweep)
    app.command(name="reproduce")(reproduce)
    app.command(name="doctor")(doctor)
    app.command(name="extract")(extract)
    app.command(name="plan")(plan)
    app.command(name="upgrade")(upgrade)
    app.command(name="train")(train)
    app.command(name="export")(export_sae)
    gate_app.command(name="fit")(gates.fit)
    gate_app.command(name="show")(gates.show)
    gate_app.command(name="rebuild")(gates.rebuild)
    app.command(gate_app, name="gates", help="Fit rational gates, with proof.")
    try:
        status = app.cli(args=[one for one in arguments if one != "--debug"], prog="rsae")
    except Stopped as stopped:
        Console(stderr=True, soft_wrap=True).print(escape(str(stopped)), highlight=False)
        return 0
    except BrokenPipeError:
        # Whoever read our output (head, a pager) has seen enough; a flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (RsaeError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        if debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, RsaeError):
            message += " (the machine, not the input: room on the disk, leave to write, or memory; --debug says where)"
        Console(stderr=True, soft_wrap=True).print(f"[red]rsae:[/red] {escape(message)}", highlight=False)
        return 2
    except KeyboardInterrupt:
        print("rsae: interrupted; what was finished is cached, run the same command to go on", file=sys.stderr)
        return 130
    return status if isinstance(status, int) else 0
