"""Progress of work that takes more than a moment: one line on stderr that disappears, only on a
terminal.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from veneer.training.output.console import log_console
from veneer.wording import clock, shown

SILENT_SECONDS = 1.0
"""Shorter work is not shown. Work that will import torch is shown at once: no thread draws while a
library is loaded."""

ReportProgress = Callable[[str, int, int], None]
"""Reports (label, done, total); a total of 0 is unknown."""


class ProgressLine:
    """Renders the line of one piece of work. now: a clock, in seconds."""

    def __init__(self, label: str, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._began, self._label = now, now(), label
        self._silent = SILENT_SECONDS if "torch" in sys.modules else 0.0
        self._done = self._total = 0
        self._since = self._began  # start of this part, for its time left

    def update(self, label: str, done: int, total: int) -> None:
        if label != self._label or done < self._done:
            self._label, self._since = label, self._now()
        self._done, self._total = done, total

    def text(self) -> str:
        """Returns: evaluating 12/80 · 0:20 left"""
        count = f" {self._done:,}/{self._total:,}" if self._total else ""
        elapsed = self._now() - self._since
        seconds_left = (
            elapsed / self._done * (self._total - self._done)
            if self._done and self._total
            else None
        )
        time_text = (
            f"{clock(seconds_left)} left"
            if seconds_left is not None
            else clock(self._now() - self._began)
        )
        return shown(f"  {self._label}{count} · {time_text}")

    def __rich__(self) -> RenderableType:
        if self._now() - self._began < self._silent:
            return Text("")
        if not self._total:
            return Text(self.text(), no_wrap=True, overflow="ellipsis")
        grid = Table.grid(padding=(0, 1))
        grid.add_row(
            Text(self.text(), no_wrap=True, overflow="ellipsis"),
            ProgressBar(self._total, self._done, 20),
        )
        return grid


@contextmanager
def working(label: str, console: Console | None = None) -> Iterator[ReportProgress]:
    """Shows progress until the block ends; yields the function that reports it."""
    console = console or log_console(stderr=True)
    line = ProgressLine(label)
    if not console.is_terminal or console.is_dumb_terminal:
        yield line.update
        return
    with Live(
        line,
        console=console,
        transient=True,
        refresh_per_second=4,
        redirect_stdout=False,
        redirect_stderr=False,
    ):
        yield line.update
