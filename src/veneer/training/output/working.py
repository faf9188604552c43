"""What goes on for longer than a moment, on stderr: how long, how far, and the time left. One line
that goes away; nothing where no terminal is.
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

from veneer.training.output.talk import talking_console
from veneer.wording import clock, shown

SILENT_SECONDS = 1.0
"""What is over by then is not shown: a line that flickers tells nothing. But what is to import
torch shows at once: while a library is loaded no thread draws."""

ReportProgress = Callable[[str, int, int], None]
"""(what, done, of how many); of 0: not known."""


class ProgressLine:
    """The line of one piece of work. now: a clock, in seconds."""

    def __init__(self, what: str, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._began, self._what = now, now(), what
        self._silent = SILENT_SECONDS if "torch" in sys.modules else 0.0
        self._done = self._total = 0
        self._since = self._began  # when this part began: the time left is its own

    def tell(self, what: str, done: int, total: int) -> None:
        if what != self._what or done < self._done:
            self._what, self._since = what, self._now()
        self._done, self._total = done, total

    def text(self) -> str:
        """evaluating 12/80 · 0:20 left"""
        count = f" {self._done:,}/{self._total:,}" if self._total else ""
        took = self._now() - self._since
        left = (
            took / self._done * (self._total - self._done) if self._done and self._total else None
        )
        beside = f"{clock(left)} left" if left is not None else clock(self._now() - self._began)
        return shown(f"  {self._what}{count} · {beside}")

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
def working(what: str, console: Console | None = None) -> Iterator[ReportProgress]:
    """Shows that it goes on until the block ends; what is yielded says how far it is."""
    console = console or talking_console(stderr=True)
    line = ProgressLine(what)
    if not console.is_terminal or console.is_dumb_terminal:
        yield line.tell
        return
    with Live(
        line,
        console=console,
        transient=True,
        refresh_per_second=4,
        redirect_stdout=False,
        redirect_stderr=False,
    ):
        yield line.tell
