"""Progress bars that also work without a terminal: in a log they print a line every half minute."""

from __future__ import annotations

import time
from typing import Any

from rich.progress import Progress, ProgressColumn, Task, TaskID
from rich.text import Text

EVERY = 30.0
"""Seconds between lines."""


class LoggedProgress(Progress):
    """A rich `Progress` that regularly prints its line without a terminal, where rich is silent until the end."""

    _printed: float | None = None

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._line()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._line()

    def _line(self) -> None:
        if self.disable or self.console.is_terminal:
            return
        now = time.monotonic()
        if self._printed is None:
            self._printed = now
        elif now - self._printed >= EVERY:
            self._printed = now
            self.console.print(self.get_renderable())


class TokensPerSecond(ProgressColumn):
    """The speed of a task whose steps are tokens."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.0f} tokens/s")
