"""Threads that read adapters: a few at once, and more while some hang on a disk.

A thread lives while there are jobs. A thread that hangs is left alone, and no other takes its job.
"""

import threading
from collections import deque
from collections.abc import Callable


class Loaders:
    """Runs jobs on threads. at_once: jobs at the same time, not counting those that take longer
    than `slow_seconds` by the clock.
    """

    def __init__(self, *, at_once: int, slow_seconds: float, clock: Callable[[], float]) -> None:
        self._at_once, self._slow_seconds, self._clock = at_once, slow_seconds, clock
        self._lock = threading.Lock()
        self._waiting: deque[Callable[[], None]] = deque()
        self._started: dict[threading.Thread, float] = {}

    def put(self, job: Callable[[], None]) -> None:
        """Queues a job, which must not raise."""
        with self._lock:
            self._waiting.append(job)
            self._start()

    def look(self) -> None:
        """Starts another thread if one hangs and a job waits."""
        if self._waiting:
            with self._lock:
                self._start()

    @property
    def idle(self) -> bool:
        with self._lock:
            return not self._waiting and not self._started

    def _start(self) -> None:
        now = self._clock()
        active = sum(now - started < self._slow_seconds for started in self._started.values())
        for _ in range(min(self._at_once - active, len(self._waiting))):
            thread = threading.Thread(target=self._work, name="veneer-loader", daemon=True)
            self._started[thread] = now
            thread.start()

    def _work(self) -> None:
        thread = threading.current_thread()
        while True:
            with self._lock:
                if not self._waiting:
                    del self._started[thread]
                    return
                job = self._waiting.popleft()
                self._started[thread] = self._clock()
            job()
            del job  # frees what it references
