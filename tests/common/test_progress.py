"""Progress where there is no terminal: a line now and then, not silence until the end."""

import io

import pytest
from rich.console import Console

from rsae_triton.common import progress as module
from rsae_triton.common.progress import LoggedProgress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def lines(clock, *, terminal: bool, disable: bool = False) -> list[str]:
    """What is shown while 100 steps of a second each are done, before the bar is closed."""
    out = io.StringIO()
    bar = LoggedProgress(console=Console(file=out, force_terminal=terminal), disable=disable, auto_refresh=False)
    with bar:
        task = bar.add_task("steps", total=100)
        for _ in range(50):
            clock[0] += 1
            bar.advance(task)
            clock[0] += 1
            bar.update(task, advance=1)
        return [line for line in out.getvalue().splitlines() if "steps" in line]


def test_a_log_gets_a_line_every_half_minute(clock):
    shown = lines(clock, terminal=False)
    assert [line.split("%")[0].split()[-1] for line in shown] == ["31", "61", "91"]


def test_a_terminal_and_a_silent_run_get_none(clock):
    assert len(lines(clock, terminal=True)) == 1  # the bar itself, which is redrawn in its place
    assert not lines(clock, terminal=False, disable=True)
