"""Records of a run (metrics.jsonl), and the memory that the process holds.

One JSON object per line, flushed line by line; "kind" is start, step, evaluation or end. A number
that is not finite is written as null: JSON has no NaN. A listener that fails is dropped, and does
not end the run. Screens, loggers and the report read these records. Knows nothing of what a step
computes.
"""

import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from veneer.errors import CorruptFileError
from veneer.files.atomic import write_text
from veneer.files.nesting import TOO_DEEP, text_too_deep
from veneer.files.strict_json import json_text
from veneer.files.system_errors import explained
from veneer.training.output.loggers import Logger

Record = dict[str, Any]
STEPPED = ("step", "evaluation")
"""Kinds of records that must name their step."""
CHECKED_BYTES = 256
"""Bytes before a position that its checksum is over: most of a record."""


class Records:
    """Appends to metrics.jsonl and passes each record to the listeners (loggers).

    resumed_step   None starts a file; a number keeps the records of steps up to it and continues
    """

    def __init__(
        self,
        path: str | Path,
        *,
        resumed_step: int | None = None,
        listeners: Sequence[Logger] = (),
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.path, self._listeners, self._say = Path(path), list(listeners), say
        self.failed: list[str] = []
        """Errors of listeners, one line each."""
        if resumed_step is not None:
            _keep_until(self.path, resumed_step)
        with explained(self.path):
            self._file = self.path.open("w" if resumed_step is None else "a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record and flushes it, so the file is never behind the run.

        The start record gets the time, in seconds since 1970.
        """
        if record["kind"] == "start":
            record = {**record, "time": time.time()}
        with explained(self.path):
            self._file.write(_line(record))
            self._file.flush()
        for listener in tuple(self._listeners):
            try:
                listener(record)
            except Exception as fault:  # their errors: no connection, a full disk, a bug
                self._listeners.remove(listener)
                self._report_failure(listener, fault)

    def sync(self) -> None:
        """Waits until all records are on the disk."""
        with explained(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file and ends the run of every listener."""
        try:
            with explained(self.path):
                self._file.close()
        finally:
            for listener in self._listeners:
                try:
                    listener.close()
                except Exception as fault:
                    self._report_failure(listener, fault)

    def _report_failure(self, listener: Logger, fault: Exception) -> None:
        self.failed.append(f"{listener.name}: {type(fault).__name__}: {fault}"[:500])
        self._say(f"{self.failed[-1]}: nothing more is sent there")

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class NoRecords:
    """Replaces Records on processes that write none."""

    failed: tuple[str, ...] = ()

    def write(self, record: Mapping[str, Any]) -> None: ...

    def sync(self) -> None: ...

    def __enter__(self) -> "NoRecords":
        return self

    def __exit__(self, *exception: object) -> None: ...


def read_records(path: str | Path) -> list[Record]:
    """Reads the records in order, without a last line that lacks its newline: an unfinished write.

    Raises CorruptFileError with every other line that is not a JSON object with a kind, and a step
    if its kind needs one.
    """
    lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    return _parse_lines(lines[:-1], path)  # the text after the last newline is unfinished, or empty


def records_after(
    path: Path, start: int, *, most_bytes: int, shown: str
) -> tuple[list[Record], int, int]:
    """Returns records from byte `start` on, where they begin, and where the next ones will begin.

    They begin at 0 if no record begins at `start` any more: a resumed run has rewritten the file.
    shown: name of the file in errors. Raises what read_records raises.
    """
    with explained(shown, reading=True), path.open("rb") as file:
        return _read_records(file, start, most_bytes, shown)


def _read_records(
    file: BinaryIO, start: int, most_bytes: int, shown: str
) -> tuple[list[Record], int, int]:
    file.seek(max(start - 1, 0))
    start = start if start and file.read(1) == b"\n" else 0
    file.seek(start)
    text = file.read(most_bytes)
    complete = text[: text.rfind(b"\n") + 1]
    if not complete and len(text) == most_bytes:
        raise CorruptFileError(
            f"{shown} has a line of more than {most_bytes:,} bytes",
            [],
            "No run writes such a line.",
        )
    records = _parse_lines(complete.decode("utf-8", "replace").split("\n")[:-1], shown)
    return records, start, start + len(complete)


class RecordPart(NamedTuple):
    """Holds a part of a growing file of records. Positions are opaque numbers; 0 is the beginning.

    start: where the part begins: the reader's position, or 0 if the file was rewritten since.
    next: the position of what comes. more: whether the file already has more
    """

    records: list[Record]
    start: int
    next: int
    more: bool


def follow_records(path: Path, position: int, *, most_bytes: int, shown: str) -> RecordPart:
    """Reads the records after a position. Raises what read_records raises.

    A resumed run rewrites the file up to its checkpoint and then appends, and a record may begin at
    the same byte again. So a position is a byte with a checksum of the bytes before it.
    """
    byte, checksum = divmod(position, 2**16)
    with explained(shown, reading=True), path.open("rb") as file:
        if _checksum_before(file, byte) != checksum:
            position = byte = 0
        records, start, following = _read_records(file, byte, most_bytes, shown)
        more = os.fstat(file.fileno()).st_size - start > most_bytes
        next_position = following * 2**16 + _checksum_before(file, following)
    return RecordPart(records, position if start else 0, next_position, more)


def _checksum_before(file: BinaryIO, byte: int) -> int:
    """Returns a checksum of 16 bits of the last CHECKED_BYTES before a byte; 0 at the beginning."""
    file.seek(max(byte - CHECKED_BYTES, 0))
    return zlib.crc32(file.read(min(byte, CHECKED_BYTES))) & 0xFFFF


def _parse_lines(lines: Sequence[str], path: str | Path) -> list[Record]:
    records, faults = [], []
    for number, line in enumerate(lines, 1):
        try:
            if text_too_deep(line):
                raise ValueError(TOO_DEEP)
            record = json.loads(line)
        except ValueError as fault:
            faults.append(f"{path}:{number} {fault}")
            continue
        if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
            faults.append(f"{path}:{number} is not an object with a kind")
        elif type(record.get("step", None if record["kind"] in STEPPED else 0)) is not int:
            faults.append(
                f"{path}:{number} has a step that is not a whole number:"
                f" {str(record.get('step'))[:40]!r}"
            )
        else:
            records.append(record)
    if faults:
        raise CorruptFileError(
            "the run's records cannot be read", faults, "Delete these lines and try again."
        )
    return records


def _keep_until(path: Path, step: int) -> None:
    """Rewrites the file with the records of steps up to `step`. Raises CorruptFileError if it is
    missing.
    """
    if not path.is_file():
        raise CorruptFileError(
            f"{path} is missing, which holds the records of the steps up to {step}",
            next_step=f"Restore it. To go on without them, make an empty file there: touch {path}",
        )
    records = [r for r in read_records(path) if r.get("step", 0) <= step and r["kind"] != "end"]
    write_text(path, "".join(map(_line, records)), replace=True)


def _line(record: Mapping[str, Any]) -> str:
    return json_text(record, indent=None, sort_keys=False)


def process_memory_bytes() -> int:
    """Returns the memory (resident set) that this process holds now, 0 if the system does not
    say.
    """
    if sys.platform == "linux":
        return _status_bytes("VmRSS")
    if sys.platform == "darwin":
        answer = subprocess.run(
            ["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True
        )
        return int(answer.stdout) * 1024
    return 0


def peak_memory_bytes(device: str = "cpu") -> int:
    """Returns the most bytes held since the last reset: by CUDA's allocator, or by the process.

    On macOS the process's peak counts from its start, reset or not. 0 if the system does not say.
    """
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "linux":
        return _status_bytes("VmHWM")
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes here, KiB on Linux
    return 0


def reset_peak_memory(device: str = "cpu") -> None:
    """Restarts the peak of `peak_memory_bytes`, on a GPU and on Linux."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        try:
            # proc(5): 5 resets the peak resident set to the current one. Some containers forbid it:
            # the peak is then that of the whole process, never too low.
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0
