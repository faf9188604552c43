"""A queue of long work for drafts: evaluations and exports, one at a time.

    drafts/<id>/work/<name>.json    WorkRecord
    drafts/<id>/work/<name>.lock    held while the work waits or runs

A record says `waiting` or `running` until its work has ended. If it says so and nobody holds the
lock, the server ended before the work did, and readers see interrupted work. The results are files
of the draft too (judging.py, exports.py).
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, JsonValue

from veneer.errors import QuotaError, VeneerError
from veneer.files.atomic import write_text
from veneer.files.lock import BusyError, locked
from veneer.files.partial import remove
from veneer.files.settings import StrictSettings
from veneer.files.strict_json import json_text
from veneer.jobs.stored import read_stored
from veneer.serve.refusals import Refusal, refusal_of, without_folders
from veneer.serve.studio.commands import CommandLine
from veneer.serve.studio.drafts import Drafts
from veneer.serve.studio.events import Look, Update

log = logging.getLogger("veneer.serve")
FOLDER = "work"
MOST_WAITING = 20
"""Pieces of work that may wait."""
MOST_RECORDS = 32
"""Records that a draft keeps."""
MOST_ERROR = 4000
"""Characters of an error that a record keeps."""
INTERRUPTED = "Interrupted, because the server ended. Start it again with the button."
OPEN = ("waiting", "running")
"""States of work that has not ended."""

RunFunction = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs a function that reads files beside the event loop."""
WorkFunction = Callable[[CommandLine], Awaitable[None]]
WorkKind = Literal["judge", "export"]


class WorkRecord(StrictSettings):
    """State of a piece of work. Times are seconds since 1970."""

    format_version: Literal[1] = 1
    state: Literal["waiting", "running", "done", "failed", "stopped"] = "waiting"
    request: dict[str, JsonValue] = Field(default_factory=dict)
    """Fields of the request that started it."""
    queued: float
    started: float | None = None
    error: str | None = None
    """Why it failed."""


@dataclass(frozen=True)
class WorkKey:
    """Identifies a piece of work. subject: key of the last model that an evaluation compares"""

    draft_id: str
    kind: WorkKind
    subject: str = ""

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.subject}" if self.subject else self.kind


@dataclass
class Work:
    """A piece of work that this server does. is_stopped: a person has stopped it"""

    record: WorkRecord
    task: asyncio.Task[None] | None = None
    is_stopped: bool = False


class WorkQueue:
    """Does work on the event loop. read: runs a function that reads files. `state` reads files."""

    def __init__(self, commands: CommandLine, drafts: Drafts, read: RunFunction) -> None:
        self._commands, self._drafts, self._read = commands, drafts, read
        self._turn = asyncio.Lock()
        self._open: dict[WorkKey, Work] = {}

    async def start(self, key: WorkKey, request: Mapping[str, Any], function: WorkFunction) -> None:
        """Queues some work, unless it is queued already, here or by another server. QuotaError:
        too much waits."""
        if (await self._read(lambda: self.state(key)))["open"] or key in self._open:
            return
        if len(self._open) > MOST_WAITING:
            raise QuotaError(f"{MOST_WAITING} exports and evaluations wait", [], "Try again later.")
        work = self._open[key] = Work(WorkRecord(request=dict(request), queued=time.time()))
        work.task = asyncio.create_task(self._do(key, work, function))
        work.task.add_done_callback(lambda task: self._open.pop(key, None))

    async def _do(self, key: WorkKey, work: Work, function: WorkFunction) -> None:
        """Does some work when its turn has come, unless its draft is gone or another server does
        it."""
        folder = self._drafts.place(key.draft_id) / FOLDER
        try:
            await self._read(lambda: _make_folder(folder))
            with locked(folder / f"{key.name}.lock", wait_seconds=0):
                await self._do_recorded(key, work, function)
        except (OSError, VeneerError) as fault:
            log.warning("no %s: %s", key.kind, without_folders(str(fault)))

    async def _do_recorded(self, key: WorkKey, work: Work, function: WorkFunction) -> None:
        try:
            await self._save(key, work)
            async with self._turn:
                await self._save(key, work, state="running", started=time.time())
                await function(self._commands)
            await self._save(key, work, state="done")
        except asyncio.CancelledError:
            if work.is_stopped:
                await self._save(key, work, state="stopped")
            raise
        except Exception as fault:
            if not isinstance(fault, Refusal | VeneerError):
                log.exception("a bug: %s", type(fault).__name__)
            message = refusal_of(fault).message[:MOST_ERROR]
            await self._save(key, work, state="failed", error=message)

    async def _save(self, key: WorkKey, work: Work, **changes: Any) -> None:
        work.record = work.record.model_copy(update=changes)
        text = json_text(work.record.model_dump(mode="json"))
        await self._read(lambda: write_text(self._file(key), text, replace=True))

    def state(self, key: WorkKey) -> dict[str, Any]:
        """Returns `state` (a record's, idle or interrupted), `open`, seconds, the error, and the
        request that started it."""
        work = self._open.get(key)
        record = self._stored(key) if work is None else work.record
        if record is None:
            return _described("idle")
        if work is None and record.state in OPEN and not self._is_locked(key):
            record = self._stored(key) or record  # another server may have ended it meanwhile
            if record.state in OPEN:
                return _described("interrupted", record, error=INTERRUPTED)
        return _described(record.state, record, error=record.error)

    def _file(self, key: WorkKey) -> Path:
        return self._drafts.place(key.draft_id) / FOLDER / f"{key.name}.json"

    def _stored(self, key: WorkKey) -> WorkRecord | None:
        """Reads a record; None if there is none, or it is damaged."""
        with suppress(VeneerError):
            return read_stored(WorkRecord, self._file(key), "piece of work")
        return None

    def _is_locked(self, key: WorkKey) -> bool:
        """Whether another server does this work."""
        try:
            with locked(self._file(key).with_suffix(".lock"), shared=True, wait_seconds=0):
                return False
        except BusyError:
            return True

    async def stop(self, draft_id: str, kind: WorkKind | None = None) -> None:
        """Ends a draft's work, or its work of one kind, and waits for the end."""
        works = [
            work
            for key, work in self._open.items()
            if key.draft_id == draft_id and kind in (None, key.kind)
        ]
        for work in works:
            work.is_stopped = True
        await _end(works)

    async def close(self) -> None:
        """Ends all work, and waits for the end. Its records say later that it was interrupted."""
        await _end([*self._open.values()])


def _described(
    state: str, record: WorkRecord | None = None, *, error: str | None = None
) -> dict[str, Any]:
    seconds = 0.0
    if record is not None and state in OPEN:
        seconds = time.time() - (record.queued if record.started is None else record.started)
    return {
        "state": state,
        "open": state in OPEN,
        "seconds": round(seconds, 1),
        "error": error,
        "request": {} if record is None else record.request,
    }


def work_look(state: Callable[[], Awaitable[dict[str, Any]]]) -> Look:
    """Returns a look at some work. An event has only what changed since the last one."""
    last: dict[str, Any] = {}

    async def look() -> Update:
        nonlocal last
        current = await state()
        changes = {name: value for name, value in current.items() if last.get(name, ...) != value}
        last = current
        return Update(changes, current["open"], is_news=bool(changes))

    return look


async def _end(works: list[Work]) -> None:
    tasks = [work.task for work in works if work.task is not None]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _make_folder(folder: Path) -> None:
    """Makes a draft's folder of records, and removes the oldest records beyond MOST_RECORDS."""
    folder.mkdir(exist_ok=True)  # not the draft's: it may be gone
    records = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime)
    for file in records[: max(len(records) - MOST_RECORDS + 1, 0)]:
        with suppress(FileNotFoundError):
            file.unlink()
        remove(file.with_suffix(".lock"))
