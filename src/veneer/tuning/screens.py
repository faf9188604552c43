"""Screens of the runs of `veneer tune`: silent while settings are searched, then one line for each
evaluation."""

import time
from collections.abc import Callable

from veneer.training.output.screen import Facts, QuietScreen
from veneer.training.state.interrupt import Interrupt
from veneer.wording import clock, number

LINE_SECONDS = 30.0
"""Time between lines of steps."""


class JobProgress:
    """Shows the progress of all jobs in a few lines. say: shows a line; running: counts the jobs
    that train"""

    def __init__(
        self,
        jobs: int,
        *,
        say: Callable[[str], None],
        interrupt: Interrupt,
        running: Callable[[], int],
    ) -> None:
        self.screens = [JobScreen(self) for _ in range(jobs)]
        self._say, self._interrupt, self._running = say, interrupt, running
        self._start = self._shown = time.monotonic()
        self._has_begun = False

    def prepare(self) -> None:
        """Raises KeyboardInterrupt if a person asked to stop before the first step: there is
        nothing to keep."""
        if self._interrupt.asked and not self._has_begun:
            raise KeyboardInterrupt

    def show_step(self, screen: "JobScreen", record: Facts) -> None:
        self._has_begun = True
        if time.monotonic() - self._shown < LINE_SECONDS:
            return
        self._shown, step = time.monotonic(), int(record["step"])
        if self._running() > 1:
            passed = clock(self._shown - self._start)
            self._say(f"{self._running()} settings train together · {passed}")
            return
        left = clock(float(record["seconds"]) * (screen.steps - step))
        self._say(f"step {step} of {screen.steps} · about {left} left")

    def show_evaluation(self, record: Facts) -> None:
        if self._running() == 1 and record["step"]:
            best = " · best so far" if record["best"] else ""
            self._shown = time.monotonic()
            self._say(f"step {record['step']} · held-out loss {number(record['loss'])}{best}")


class JobScreen(QuietScreen):
    """Reports the steps of one job."""

    def __init__(self, progress: JobProgress) -> None:
        self._progress = progress
        self.steps = 0

    def start(self, info: Facts) -> None:
        self._progress.prepare()
        self.steps = int(info["steps"])

    def step(self, record: Facts) -> None:
        self._progress.show_step(self, record)

    def evaluation(self, record: Facts) -> None:
        self._progress.prepare()
        self._progress.show_evaluation(record)

    def message(self, text: str) -> None:
        self._progress.prepare()
