"""Ctrl-C, SIGTERM and SIGHUP: the first signal asks the loop to stop after the current step.

A second Ctrl-C stops at once, because a person pressed it. The others may come twice by themselves
(a shell that ends passes SIGHUP on, `timeout` signals its group, too), so they only ask. Ignored
signals stay ignored: `nohup`.
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

ASKING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class Interrupt:
    """Sets `asked` on the first signal within the block, and at its end that of a block around it.

    Does nothing outside the main thread.
    asked: whether a signal came before the block
    """

    def __init__(self, *, asked: bool = False) -> None:
        self.asked = asked
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in ASKING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
            around = getattr(handler, "__self__", None)
            if isinstance(around, Interrupt):
                around.asked |= self.asked
