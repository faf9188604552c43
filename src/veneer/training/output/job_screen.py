"""Screens of jobs that train together, at most as wide as the console.

A few jobs print lines of their own, each after the job's name. Many jobs share a line of progress;
each prints one line when it has ended or failed. No sample answers are shown.
"""

import re
import time
from collections.abc import Sequence
from itertools import chain, repeat

from rich.console import Console
from rich.text import Text

from veneer.training.output.console import log_console
from veneer.training.output.screen import (
    PLAIN_SECONDS,
    Facts,
    PlainScreen,
    QuietScreen,
    Screen,
    StepFigures,
    loss_text,
    start_lines,
)
from veneer.wording import clock, cut, folded, number, percent, shown, wrapped

FEW_JOBS = 6
"""Most jobs that print lines of their own."""
MOST_NAME = 32
"""Most characters of a job's name."""


class JobScreen(PlainScreen):
    """Prints the lines of one job of a few, each after the job's name.

    said: what the jobs' screens have said; a sentence of another job is not said again.
    """

    def __init__(self, console: Console, name: str, width: int, said: set[str]) -> None:
        super().__init__(console)
        self._name, self._said = cut(shown(name), MOST_NAME).ljust(width), said

    def start(self, info: Facts) -> None:
        """Shows the start record, without facts that an earlier job has shown."""
        self._progress = StepFigures(info)
        title, *facts = start_lines(info)
        for line in [title, *(line for line in facts if line not in self._said)]:
            self._print(line)
        self._said.update(facts)

    def message(self, text: str) -> None:
        """Shows a message, once if several jobs have it with other numbers."""
        if (pattern := _without_numbers(text)) not in self._said:
            self._said.add(pattern)
            super().message(text)

    def evaluation(self, record: Facts) -> None:
        super().evaluation({**record, "sample": None})

    def _step_line(self, progress: StepFigures) -> str:
        """Leaves out speed and memory, which are those of all jobs."""
        return f"step {progress.done}/{progress.total} · {progress.losses()}{progress.preference}"

    def _print(self, line: str) -> None:
        room = self.console.width - len(self._name) - 2
        parts = [
            part
            for facts in folded(line.strip(), room).split("\n")
            for part in wrapped(facts, room).split("\n")
        ]
        indent = " " * len(self._name)
        for name, part in zip(chain([self._name], repeat(indent)), parts, strict=False):
            self.console.print(Text(f"{name}  {part}"), soft_wrap=True)


class JointProgress:
    """Shows many jobs: a line of progress every few seconds, and a line for each job that ends."""

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self.console = console
        self.screens = [SharedScreen(self, cut(shown(name), MOST_NAME)) for name in names]
        self._width = max(len(screen.name) for screen in self.screens)
        self._last_line = time.monotonic()
        self._messages: set[str] = set()

    def start(self, info: Facts) -> None:
        """Shows the start record of the first job, for all."""
        if sum(screen.has_begun for screen in self.screens) == 1:
            for line in start_lines(info):
                self._print("  " + line.strip())

    def step(self) -> None:
        now = time.monotonic()
        if now - self._last_line >= PLAIN_SECONDS:
            self._last_line = now
            self._print(self._progress_line())

    def message(self, name: str, text: str) -> None:
        """Shows a message, once if several jobs have it with other numbers."""
        if (pattern := _without_numbers(text)) not in self._messages:
            self._messages.add(pattern)
            self._print(f"  {name}: {shown(text)}")

    def ended(self, screen: "SharedScreen", text: str) -> None:
        ended = sum(other.has_ended for other in self.screens)
        count = f"{ended} of {len(self.screens)}"
        self._print(f"  {screen.name.ljust(self._width)}  {text} · {count}")

    def _progress_line(self) -> str:
        """Returns: 37% of the steps · 12 of 50 jobs done, 1 failed · 410 tokens/s · 6:10 left"""
        begun = [screen for screen in self.screens if screen.has_begun]
        failed = sum(screen.has_failed for screen in self.screens)
        done = sum(screen.has_ended for screen in self.screens) - failed
        # Jobs that wait are taken to have as many steps as the others on average.
        share = sum(screen.share_done for screen in begun) / len(self.screens)
        facts = [
            f"{percent(share, 1)} of the steps",
            f"{done} of {len(self.screens)} jobs done" + (f", {failed} failed" if failed else ""),
        ]
        seconds = sum(screen.seconds for screen in begun)
        if seconds > 0 and share > 0:
            speed = sum(screen.tokens for screen in begun) / seconds
            facts += [f"{speed:,.0f} tokens/s", f"{clock(seconds * (1 - share) / share)} left"]
        return "  " + " · ".join(facts)

    def _print(self, line: str) -> None:
        for facts in folded(line, self.console.width).split("\n"):
            self.console.print(Text(wrapped(facts, self.console.width)), soft_wrap=True)


class SharedScreen(QuietScreen):
    """Reports one job to the progress of all.

    seconds: of its steps, its share of the joint time
    """

    def __init__(self, progress: JointProgress, name: str) -> None:
        self.name = name
        self.has_begun = self.has_ended = self.has_failed = False
        self.seconds, self.tokens = 0.0, 0
        self._progress = progress
        self._done, self._steps = 0, 1
        self._first_loss: float | None = None

    @property
    def share_done(self) -> float:
        return 1.0 if self.has_ended else self._done / self._steps

    def start(self, info: Facts) -> None:
        self.has_begun, self._steps = True, int(info["steps"])
        self._progress.start(info)

    def step(self, record: Facts) -> None:
        self._done = int(record["step"])
        self.seconds += float(record["seconds"])
        self.tokens += int(record["tokens"])
        self._progress.step()

    def message(self, text: str) -> None:
        self._progress.message(self.name, text)

    def end(self, summary: Facts) -> None:
        self.has_ended = True
        figures, reason = summary.get("held_out") or {}, summary["reason"]
        before, after = figures.get("before"), summary["validation_loss"]
        if after is None:
            text = loss_text(summary)
        else:
            text = "held-out loss " + (f"{number(before['value'])} → " if before else "")
            text += number(after)
        self._progress.ended(self, text + ("" if reason == "done" else f" ({reason})"))

    def failure(self, text: str) -> None:
        self.has_ended = self.has_failed = True
        self._progress.ended(self, f"failed: {shown(text)}")


def make_job_screens(
    names: Sequence[str], *, json: bool = False, quiet: bool = False
) -> Sequence[Screen]:
    """Returns a screen for each job; on stderr if stdout is data."""
    if quiet:
        return [QuietScreen() for _ in names]
    console = log_console(stderr=json)
    if len(names) > FEW_JOBS:
        return JointProgress(console, names).screens
    width = min(max(map(len, names)), MOST_NAME)
    said: set[str] = set()
    return [JobScreen(console, name, width, said) for name in names]


def _without_numbers(text: str) -> str:
    return re.sub(r"\d[\d.,]*", "0", text)
