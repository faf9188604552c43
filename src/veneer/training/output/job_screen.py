"""The screen of a job that trains beside others: plain lines that begin with the job's name."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from veneer.training.output.console import log_console
from veneer.training.output.screen import Facts, PlainScreen, QuietScreen
from veneer.wording import shown


class JobScreen(PlainScreen):
    """Prints the lines of one job, each after the job's name; no sample answers."""

    def __init__(self, console: Console, name: str, width: int, *, is_first: bool) -> None:
        super().__init__(console)
        self._name, self._is_first = shown(name).ljust(width), is_first

    def start(self, info: Facts) -> None:
        """Shows the start record; how steps are computed is shown for the first job alone."""
        super().start(info if self._is_first else {**info, "paths": []})

    def evaluation(self, record: Facts) -> None:
        super().evaluation({**record, "sample": None})

    def _print(self, line: str) -> None:
        self.console.print(Text(f"{self._name}  {line.strip()}"), soft_wrap=True)


def make_job_screens(
    names: list[str], *, json: bool = False, quiet: bool = False
) -> list[JobScreen] | list[QuietScreen]:
    """Returns a screen for each job; on stderr if stdout is data."""
    if quiet:
        return [QuietScreen() for _ in names]
    console, width = log_console(stderr=json), max(map(len, names))
    return [
        JobScreen(console, name, width, is_first=number == 0) for number, name in enumerate(names)
    ]
