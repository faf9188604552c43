"""Runs `veneer` commands for the page, in processes of their own.

The server's process computes answers, and this work would change how it computes meanwhile. The
errors are those of the command line.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from veneer.child import end_with_parent, environment_for, module_command
from veneer.errors import InputError, QuotaError, VeneerError
from veneer.jobs.launch import trainer_environment
from veneer.serve.refusals import Refusal, refusal_of

log = logging.getLogger("veneer.serve")
MOST_WAITING = 20
"""Pieces of work that may wait."""
MOST_FAILURES = 64
"""Failed pieces of work that are remembered."""
DOES_NOT_FIT = 3
"""Exit code of a command whose answer is that something does not fit."""


class CommandLine:
    """Runs one command at a time. seconds: limit of a command. share: threads and niceness of a
    command, None for the server's own"""

    def __init__(self, seconds: float, share: tuple[int, int] | None = None) -> None:
        self._seconds, self._share = seconds, share
        self._process: asyncio.subprocess.Process | None = None

    def stop(self) -> None:
        """Kills the running command."""
        if self._process is not None:
            with suppress(ProcessLookupError):  # it has just ended
                self._process.kill()

    async def run(
        self, arguments: Sequence[str], *, most_bytes: int | None = None
    ) -> dict[str, Any]:
        """Returns what a command with --json prints. InputError: what it refuses.

        most_bytes: of a file that the command writes, None without a limit
        """
        process = await asyncio.create_subprocess_exec(
            *module_command("veneer"),
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            **self._process_settings(most_bytes),
        )
        self._process = process
        name = arguments[0]
        try:
            async with asyncio.timeout(self._seconds):
                answer, messages = await process.communicate()
        except TimeoutError:
            raise InputError(
                f"veneer {name} took more than {self._seconds:g} s and was stopped"
            ) from None
        finally:
            self._process = None
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode == -signal.SIGKILL:
            raise InputError(f"veneer {name} was stopped")
        if process.returncode not in (0, DOES_NOT_FIT) or not answer:
            message = messages.decode("utf-8", "replace").strip()
            if process.returncode == DOES_NOT_FIT and most_bytes is not None:
                message += (
                    f"\nThe limit for jobs and files leaves {most_bytes:,} bytes for this file."
                )
            raise InputError(message or f"veneer {name} failed")
        result: dict[str, Any] = json.loads(answer)
        return result

    def _process_settings(self, most_bytes: int | None) -> dict[str, Any]:
        if self._share is None:
            return {"env": environment_for(os.environ)}
        import resource  # Windows has none, and no jobs

        threads, niceness = self._share

        def begin() -> None:  # runs in the new process
            end_with_parent()
            os.nice(niceness)
            if most_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

        return {"env": trainer_environment(os.environ, threads), "preexec_fn": begin}


@dataclass
class Work:
    """A piece of work: when it was queued and started, and its task."""

    queued: float = field(default_factory=time.monotonic)
    started: float | None = None
    task: asyncio.Task[None] | None = None


Key = tuple[str, ...]
"""The draft's id, and what is done for it."""


class WorkQueue:
    """Does long work for drafts, one piece at a time. Used on the event loop only.

    The work's results are files of the draft, so nothing here survives the server.
    """

    def __init__(self, seconds: float, share: tuple[int, int]) -> None:
        self._commands = CommandLine(seconds, share)
        self._turn = asyncio.Lock()
        self._open: dict[Key, Work] = {}
        self._failures: dict[Key, str] = {}

    def start(self, key: Key, work: Callable[[CommandLine], Awaitable[None]]) -> None:
        """Queues some work, unless it is queued already. QuotaError: too much waits."""
        if key in self._open:
            return
        if len(self._open) > MOST_WAITING:
            raise QuotaError(f"{MOST_WAITING} exports and evaluations wait", [], "Try again later.")
        self._failures.pop(key, None)
        opened = self._open[key] = Work()
        opened.task = asyncio.create_task(self._do(key, work))

        def forget(task: asyncio.Task[None]) -> None:
            if self._open.get(key) is opened:  # it was ended before its first step
                del self._open[key]

        opened.task.add_done_callback(forget)

    async def _do(self, key: Key, work: Callable[[CommandLine], Awaitable[None]]) -> None:
        try:
            async with self._turn:
                self._open[key].started = time.monotonic()
                await work(self._commands)
        except Exception as fault:
            if not isinstance(fault, Refusal | VeneerError):
                log.exception("a bug: %s", type(fault).__name__)
            while len(self._failures) >= MOST_FAILURES:
                del self._failures[next(iter(self._failures))]
            self._failures[key] = refusal_of(fault).message
        finally:
            del self._open[key]

    def state(self, key: Key) -> dict[str, Any]:
        """Returns `state` (idle, waiting, running, failed), seconds and the error."""
        work, error = self._open.get(key), self._failures.get(key)
        if work is None:
            return {"state": "idle" if error is None else "failed", "seconds": 0, "error": error}
        start = work.queued if work.started is None else work.started
        return {
            "state": "waiting" if work.started is None else "running",
            "seconds": round(time.monotonic() - start, 1),
            "error": None,
        }

    async def stop(self, draft_id: str, kind: str | None = None) -> None:
        """Ends a draft's work, or its work of one kind, and waits for the end."""
        works = [
            work
            for key, work in self._open.items()
            if key[0] == draft_id and kind in (None, key[1])
        ]
        for work in works:
            if work.task is not None:
                work.task.cancel()
        for work in works:
            if work.task is not None:
                with suppress(asyncio.CancelledError):
                    await work.task
        for key in [key for key in self._failures if key[0] == draft_id]:
            del self._failures[key]

    async def close(self) -> None:
        """Ends all work, and waits for the end."""
        tasks = [work.task for work in self._open.values() if work.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
