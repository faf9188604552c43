"""Screens of the runs of `veneer tune`: silent while settings are searched, then one line for each
evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from veneer.training.output.screen import Facts, QuietScreen
from veneer.training.state.interrupt import Interrupt
from veneer.wording import clock, number

LINE_SECONDS = 15.0
"""Time between lines of steps."""


class JobProgress:
    """Counts the steps of all jobs, and shows them now and then. say: shows a line"""

    def __init__(self, jobs: int, say: Callable[[str], None], interrupt: Interrupt) -> None:
        self.screens = [JobScreen(self) for _ in range(jobs)]
        self._say, self._interrupt, self._shown = say, interrupt, time.monotonic()
        self._has_begun = False

    def prepare(self) -> None:
        """Raises KeyboardInterrupt if a person asked to stop before the first step: there is
        nothing to keep."""
        if self._interrupt.asked and not self._has_begun:
            raise KeyboardInterrupt

    def show_step(self) -> None:
        self._has_begun = True
        if time.monotonic() - self._shown < LINE_SECONDS:
            return
        self._shown = time.monotonic()
        training = [screen for screen in self.screens if not screen.is_over]
        if len(training) > 1:
            self._say(f"{len(training)} settings train together")
        elif training:
            self._say(f"step {training[0].step_number} of {training[0].steps}{_left(training)}")

    def show_evaluation(self, record: Facts) -> None:
        if len([screen for screen in self.screens if not screen.is_over]) == 1 and record["step"]:
            best = " · best so far" if record["best"] else ""
            self._shown = time.monotonic()
            self._say(f"step {record['step']} · held-out loss {number(record['loss'])}{best}")


def _left(training: Sequence[JobScreen]) -> str:
    screen = training[0]
    return f" · {clock(screen.seconds_left)} left" if screen.seconds else ""


class JobScreen(QuietScreen):
    """Reports the steps of one job."""

    def __init__(self, progress: JobProgress) -> None:
        self._progress = progress
        self.step_number = self.steps = 0
        self.seconds = 0.0
        self.is_over = False

    @property
    def seconds_left(self) -> float:
        return self.seconds * (self.steps - self.step_number)

    def start(self, info: Facts) -> None:
        self._progress.prepare()
        self.steps = int(info["steps"])

    def step(self, record: Facts) -> None:
        self.step_number, self.seconds = int(record["step"]), float(record["seconds"])
        self._progress.show_step()

    def evaluation(self, record: Facts) -> None:
        self._progress.prepare()
        self._progress.show_evaluation(record)

    def message(self, text: str) -> None:
        self._progress.prepare()

    def end(self, summary: Facts) -> None:
        self.is_over = True
