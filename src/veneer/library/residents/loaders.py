"""Threads that read for others: a few at once, and further ones beside those that hang on a disk.

A thread is there while there is something to do. One that hangs is left alone, and its job is
nobody else's.
"""

import threading
from collections import deque
from collections.abc import Callable


class Loaders:
    """at_once: jobs in progress, those not counted that take longer than `slow_seconds` by the
    clock."""

    def __init__(self, *, at_once: int, slow_seconds: float, clock: Callable[[], float]) -> None:
        self._at_once, self._slow_seconds, self._clock = at_once, slow_seconds, clock
        self._lock = threading.Lock()
        self._waiting: deque[Callable[[], None]] = deque()
        self._begun: dict[threading.Thread, float] = {}

    def put(self, job: Callable[[], None]) -> None:
        """It is done some time; it must not raise."""
        with self._lock:
            self._waiting.append(job)
            self._start()

    def look(self) -> None:
        """Another thread where one hangs and something waits."""
        if self._waiting:
            with self._lock:
                self._start()

    @property
    def idle(self) -> bool:
        with self._lock:
            return not self._waiting and not self._begun

    def _start(self) -> None:
        now = self._clock()
        active = sum(now - begun < self._slow_seconds for begun in self._begun.values())
        for _ in range(min(self._at_once - active, len(self._waiting))):
            thread = threading.Thread(target=self._work, name="veneer-loader", daemon=True)
            self._begun[thread] = now
            thread.start()

    def _work(self) -> None:
        own = threading.current_thread()
        while True:
            with self._lock:
                if not self._waiting:
                    del self._begun[own]
                    return
                job = self._waiting.popleft()
                self._begun[own] = self._clock()
            job()
            del job  # and with it what it held
