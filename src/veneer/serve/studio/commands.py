"""Runs `veneer` commands for the page, in processes of their own.

The server's process computes answers, and this work would change how it computes meanwhile. The
errors are those of the command line.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from veneer.child import end_with_parent, environment_for, module_command
from veneer.errors import InputError, QuotaError
from veneer.jobs.launch import trainer_environment

DISK_SECONDS = 2.0
"""Seconds between two looks at the disk space that jobs and results take."""
DOES_NOT_FIT = 3
"""Exit code of a command whose answer is that something does not fit."""


class CommandLine:
    """Runs one command at a time.

    seconds     limit of a command
    share       threads and niceness of a command; None: the server's own
    check_room  raises QuotaError once the disk space is used up; None: no limit
    """

    def __init__(
        self,
        seconds: float,
        share: tuple[int, int] | None = None,
        check_room: Callable[[], Awaitable[Any]] | None = None,
    ) -> None:
        self._seconds, self._share, self._check_room = seconds, share, check_room
        self._process: asyncio.subprocess.Process | None = None

    def stop(self) -> None:
        """Kills the running command."""
        if self._process is not None:
            with suppress(ProcessLookupError):  # it has just ended
                self._process.kill()

    async def run(
        self, arguments: Sequence[str], *, most_bytes: int | None = None
    ) -> dict[str, Any]:
        """Returns what a command with --json prints. InputError: what it refuses. QuotaError: it
        was stopped, because the disk space is used up.

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
                answer, messages = await self._output(process)
        except TimeoutError:
            raise InputError(
                f"veneer {name} took more than {self._seconds:g} s and was stopped"
            ) from None
        except QuotaError as fault:
            headline = f"veneer {name} was stopped: {fault.headline}"
            raise QuotaError(headline, [], fault.next_step) from None
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

    async def _output(self, process: asyncio.subprocess.Process) -> tuple[bytes, bytes]:
        """Waits for a command's end; returns what it wrote. QuotaError: the disk space is used
        up."""
        output = asyncio.create_task(process.communicate())
        watch = asyncio.create_task(self._watch_room())
        try:
            await asyncio.wait((output, watch), return_when=asyncio.FIRST_COMPLETED)
            return output.result() if output.done() else watch.result()
        finally:
            output.cancel()
            watch.cancel()

    async def _watch_room(self) -> NoReturn:
        while True:
            await asyncio.sleep(DISK_SECONDS)
            if self._check_room is not None:
                await self._check_room()

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
