"""Which run of how many a comparison is at, and the time left by what its runs took so far."""

from __future__ import annotations

import time
from collections.abc import Callable

from veneer.wording import clock


class Pace:
    """total: runs, as far as they are known. now: a clock, in seconds."""

    def __init__(self, total: int, now: Callable[[], float] = time.monotonic) -> None:
        self._total, self._now, self._began = total, now, now()
        self._last = self._began
        self._over = self._made = 0

    def finished(self, *, made: bool) -> None:
        """One more is over; made: it was not found finished."""
        self._over += 1
        self._made += made
        self._total = max(self._total, self._over)
        self._last = self._now()

    def one_more(self) -> None:
        """A search goes on."""
        self._total += 1

    def said(self, text: str) -> str:
        """The line of what runs now, or was just over."""
        at = f"run {min(self._over + 1, self._total)} of {self._total}"
        if not self._made or self._over == self._total:
            return f"{at} · {text}"
        each = (self._last - self._began) / self._made
        left = each * (self._total - self._over) - min(self._now() - self._last, each)
        return f"{at} · about {clock(left)} left · {text}"
