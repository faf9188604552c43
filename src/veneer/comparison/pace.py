"""Counts a comparison's runs, and estimates the time left from the finished ones."""

import time
from collections.abc import Callable

from veneer.wording import clock


class Pace:
    """Counts runs. total: runs known so far. now: a clock, in seconds."""

    def __init__(self, total: int, now: Callable[[], float] = time.monotonic) -> None:
        self._total, self._now, self._began = total, now, now()
        self._last = self._began
        self._over = self._made = 0

    def finished(self, *, made: bool) -> None:
        """Counts a finished run. made: it ran now, and was not found finished."""
        self._over += 1
        self._made += made
        self._total = max(self._total, self._over)
        self._last = self._now()

    def one_more(self) -> None:
        """Counts a further run of a search."""
        self._total += 1

    def line(self, text: str) -> str:
        """Returns a line with the position and the time left before `text`."""
        position = f"run {min(self._over + 1, self._total)} of {self._total}"
        if not self._made or self._over == self._total:
            return f"{position} · {text}"
        seconds_per_run = (self._last - self._began) / self._made
        seconds_left = seconds_per_run * (self._total - self._over) - min(
            self._now() - self._last, seconds_per_run
        )
        return f"{position} · about {clock(seconds_left)} left · {text}"
