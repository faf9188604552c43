"""stdout and stderr that handle failing writes: a closed pipe (`veneer ... | head -1`), a closed
terminal, a full disk.

A command writes its result to a `ResultStream`, which keeps the first failure: cli/main.py turns it
into an exit code. Messages during work go to a `LogStream`, which drops them after a failure: a run
does not end because its log cannot be written.
"""

import io
import os
from contextlib import suppress
from typing import TextIO


class _StreamWrapper(io.TextIOBase):
    """Writes to another stream; subclasses handle failures in `_failed`."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]  # an attribute of the base class
        return self.stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self.stream.errors

    def isatty(self) -> bool:
        with suppress(OSError, ValueError):
            return self.stream.isatty()
        return False

    def fileno(self) -> int:
        return self.stream.fileno()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except (OSError, ValueError) as fault:  # ValueError: it was closed
            self._failed(fault)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as fault:
            self._failed(fault)

    def _failed(self, fault: OSError | ValueError) -> None:
        raise NotImplementedError


class ResultStream(_StreamWrapper):
    """Raises what the stream raises, and keeps the first fault."""

    fault: OSError | ValueError | None = None

    def _failed(self, fault: OSError | ValueError) -> None:
        self.fault = self.fault or fault
        raise fault


class LogStream(_StreamWrapper):
    """Writes until a write fails; drops everything from then on."""

    def _failed(self, fault: OSError | ValueError) -> None:
        silence(self.stream)


def silence(stream: TextIO) -> None:
    """Discards what `stream` still holds and all that follows."""
    if isinstance(stream, ResultStream):
        stream.fault = None
        stream = stream.stream
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        stream.flush()
