"""The output of a training run: the log it returns, metrics.jsonl, a progress bar, TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rsae_triton.common.errors import ConfigError, StorageError
from rsae_triton.common.files import write_text

METRICS = "metrics.jsonl"


@dataclass
class TrainLog:
    """The record of a run: lists with one entry per logged step, and what the run cost."""

    recipe: str
    steps: int
    batch_size: int
    seed: int
    step: list[int] = field(default_factory=list)
    mse: list[float] = field(default_factory=list)
    l0: list[float] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    dead: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def add(self, row: dict[str, Any]) -> None:
        names = ("step", "mse", "l0", "weight", "dead")
        for name, value in zip(names, [row[name] for name in names], strict=True):  # all values of a row, or none
            getattr(self, name).append(value)


class Metrics:
    """Writes one row of numbers per logged step.

    Args:
        log: rows are added to it. out: folder of metrics.jsonl, or None. track: see `TrainSettings`. settings: what the
            trackers show about the run.
    """

    def __init__(self, log: TrainLog, out: Path | None, track: tuple[str, ...], settings: dict[str, Any]) -> None:
        self.log = log
        try:
            self._file = None if out is None else open(out / METRICS, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise StorageError(
                f"{error.filename} cannot be written ({error.strerror}); choose another folder"
            ) from error
        self._sinks = [_SINKS[name](out, settings) for name in track if out is not None]

    def row(self, row: dict[str, Any]) -> None:
        self.log.add(row)
        if self._file is not None:
            try:
                self._file.write(json.dumps(row) + "\n")
                self._file.flush()
            except OSError as error:
                raise StorageError(
                    f"{self._file.name} cannot be written ({error.strerror}); make room, and go on from the last "
                    "checkpoint with --resume (in Python: resume=True)"
                ) from error
        for write, _ in self._sinks:
            write(row)

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # every row has been flushed, or the failure was reported then
                self._file.close()
        for _, close in self._sinks:
            close()


def take_up(out: Path, step: int, log: TrainLog) -> None:
    """Cuts off metrics.jsonl at `step`, where a resumed run begins, and adds the rows before to the log."""
    path = out / METRICS
    rows = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror}); mend that, and resume again") from error
    for line in lines:
        try:
            row = json.loads(line)
            if row["step"] >= step:
                break
            log.add(row)
        except (ValueError, TypeError, LookupError, RecursionError):
            continue  # a line that a kill cut short, or that is not a row
        rows.append(row)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


Sink = tuple[Callable[[dict[str, Any]], Any], Callable[[], Any]]


def _tensorboard(out: Path, settings: dict[str, Any]) -> Sink:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("track tensorboard needs that package; install it with: pip install tensorboard") from error
    writer: Any = SummaryWriter(str(out / "tensorboard"))
    writer.add_text("settings", json.dumps(settings, indent=1, default=str))

    def write(row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name, value, row["step"])

    return write, writer.close


def _wandb(out: Path, settings: dict[str, Any]) -> Sink:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("track wandb needs that package; install it with: pip install wandb") from error
    # One id per folder, so that a resumed run continues the same curve.
    mark = out / "wandb.id"
    if not mark.is_file():
        write_text(mark, secrets.token_hex(4))
    run: Any = wandb.init(
        project=settings.get("project") or "rsae-triton",
        dir=str(out),
        name=out.name,
        id=mark.read_text().strip(),
        resume="allow",
        config=json.loads(_plain(settings)),
    )
    return lambda row: run.log(row, step=row["step"]), run.finish


def _plain(settings: dict[str, Any]) -> str:
    return json.dumps(settings, default=str)


_SINKS: dict[str, Callable[[Path, dict[str, Any]], Sink]] = {"tensorboard": _tensorboard, "wandb": _wandb}


@contextmanager
def progress_bar(label: str, steps: int, done: int, batch_size: int, show: bool) -> Iterator[Callable[[Any], None]]:
    """A progress bar with tokens/s, ETA, mse, l0 and, where features are dead, the fraction that is alive.

    Yields a function of a step's row.
    """
    if not show:
        yield lambda _: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    from rsae_triton.common.progress import LoggedProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=max(1, min(6, 22 - len(label)))),  # so that the line fits into 80 columns
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(compact=True),
    )
    started = time.perf_counter()
    with ExitStack() as stack:
        bar = stack.enter_context(LoggedProgress(*columns, disable=not show))
        task = bar.add_task(label, total=steps, completed=done, state="")

        def advance(row: dict[str, Any]) -> None:
            rate = (bar.tasks[0].completed + 1 - done) * batch_size / max(time.perf_counter() - started, 1e-9)
            speed = f"{rate:.0f}" if rate < 1000 else f"{rate / 1000:.3g}k"
            state = f"{speed} tok/s mse {row['mse']:.1f} l0 {row['l0']:.1f}"
            if row["alive"] < 0.995:
                state += f" alive {row['alive']:.0%}"
            bar.update(task, advance=1, state=state)

        yield advance
