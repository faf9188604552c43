"""stdout and stderr where writing can fail: a reader that has left (`veneer ... | head -1`), a
closed terminal, a full disk.

A command's result is written through `Result`, which remembers that it was not: cli/main.py turns
that into an exit code. What is said while work goes on is written through `Talk`, which fails
nobody: no run ends for its log.
"""

import io
import os
from contextlib import suppress
from typing import TextIO


class _Through(io.TextIOBase):
    """Another stream, with what becomes of its failures left to `_failed`."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]  # an attribute there, which cannot be given
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


class Result(_Through):
    """Raises what the stream raises, and keeps the first of it."""

    fault: OSError | ValueError | None = None

    def _failed(self, fault: OSError | ValueError) -> None:
        self.fault = self.fault or fault
        raise fault


class Talk(_Through):
    """Writes until that fails once; from then on everything is dropped."""

    def _failed(self, fault: OSError | ValueError) -> None:
        silence(self.stream)


def silence(stream: TextIO) -> None:
    """Sends what `stream` still holds, and all that follows, nowhere: it cannot be written where it
    should go."""
    if isinstance(stream, Result):
        stream.fault = None
        stream = stream.stream
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()
