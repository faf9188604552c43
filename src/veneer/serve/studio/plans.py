"""Plans a run on uploaded rows: `veneer plan` in a process of its own.

The server's process computes answers, and a plan would change how it computes meanwhile. The plan's
errors are those of the command line.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from veneer.child import environment_for, module_command
from veneer.errors import InputError
from veneer.files.atomic import write_text
from veneer.serve.studio.bodies import MethodChoices, TaskKind
from veneer.training.config import RunConfig

PLAN_SECONDS = 300.0
DOES_NOT_FIT = 3
MOST_PLANS = 64
"""Plans that are kept in memory."""
PLANNED = "planned"


def run_settings(
    shared: Mapping[str, Any], rows: Mapping[str, Any], length: int, choices: MethodChoices
) -> dict[str, Any]:
    """Returns the settings of a run, without `out`. ConfigError: one of them is wrong.

    shared: of every run of the server, such as its base. rows: the `data` settings
    """
    settings: dict[str, Any] = {**shared, "data": dict(rows), "length": length}
    settings["method"] = {"name": choices.method}
    for path, value in choices.settings.items():
        part, dot, name = path.partition(".")
        if dot:
            settings.setdefault(part, {})[name] = value
        else:
            settings[path] = value
    RunConfig.of({**settings, "out": PLANNED})
    return settings


class Plans:
    """Plans runs, one at a time, and remembers the answers of this process. A new request ends the
    plan that is being made."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._answers: dict[tuple[str, ...], dict[str, Any]] = {}

    def stop(self) -> None:
        """Ends the plan that is being made."""
        if self._process is not None:
            with suppress(ProcessLookupError):  # it has just ended
                self._process.kill()

    async def plan(
        self, folder: Path, settings: Mapping[str, Any], *, kind: TaskKind, compare: bool
    ) -> dict[str, Any]:
        """Returns what `veneer plan --json` prints. InputError: what it refuses.

        folder: for the run file. compare: plans every method
        """
        text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
        flags = ["--kind", kind, "--json", *["--compare"] * compare]
        key = (str(folder), text, *flags)
        if key not in self._answers:
            self.stop()
        async with self._turn:
            if key not in self._answers:
                file = folder / "plan.yaml"
                await asyncio.to_thread(lambda: write_text(file, text, replace=True))
                answer = await self._run([str(file), *flags])
                while len(self._answers) >= MOST_PLANS:
                    del self._answers[next(iter(self._answers))]
                self._answers[key] = answer
        return self._answers[key]

    async def _run(self, arguments: list[str]) -> dict[str, Any]:
        process = await asyncio.create_subprocess_exec(
            *module_command("veneer"),
            "plan",
            *arguments,
            env=environment_for(os.environ),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        self._process = process
        try:
            async with asyncio.timeout(PLAN_SECONDS):
                answer, messages = await process.communicate()
        except TimeoutError:
            raise InputError(f"the plan takes more than {PLAN_SECONDS:g} s") from None
        finally:
            self._process = None
            if process.returncode is None:
                process.kill()
        if process.returncode == -signal.SIGKILL:
            raise InputError("the plan was stopped")
        if process.returncode not in (0, DOES_NOT_FIT) or not answer:
            raise InputError(messages.decode("utf-8", "replace").strip() or "the plan failed")
        plan: dict[str, Any] = json.loads(answer)
        return plan
