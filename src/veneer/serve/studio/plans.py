"""Plans a run on uploaded rows, by `veneer plan`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from veneer.adapters.config import METHODS
from veneer.data.teacher_text import ABOUT_DOCUMENT
from veneer.files.atomic import write_text
from veneer.serve.studio.bodies import MethodChoices, TaskKind
from veneer.serve.studio.commands import CommandLine
from veneer.training.config import SHORT_FORMS, RunConfig

PLAN_SECONDS = 300.0
MOST_PLANS = 64
"""Plans that are kept in memory."""
PLANNED = "planned"


def run_settings(
    shared: Mapping[str, Any],
    rows: Mapping[str, Any],
    length: int,
    choices: MethodChoices,
    objective_name: str,
    document: Path | None = None,
) -> dict[str, Any]:
    """Returns the settings of a run, without `out`. ConfigError: one of them is wrong.

    shared: of every run of the server, such as its base. rows: the `data` settings.
    objective_name: of the run. document: read by the teacher of objective distil, as by veneer
    distil --document
    """
    settings: dict[str, Any] = {**deepcopy(dict(shared)), "data": dict(rows), "length": length}
    settings["method"] = {"name": choices.method}
    for path, value in choices.settings.items():
        part, dot, name = path.partition(".")
        if dot:
            settings.setdefault(part, {})[name] = value
        else:
            settings[path] = value
    objective = settings.setdefault("objective", {})
    objective.setdefault("name", objective_name)
    if document is not None and objective["name"] == "distil":
        method, _ = SHORT_FORMS.get(choices.method, (choices.method, None))
        settings["objective"] = {"system": ABOUT_DOCUMENT, **objective, "document": str(document)}
        settings["method"] = {**METHODS[method].of_document, **settings["method"]}
    RunConfig.of({**settings, "out": PLANNED})
    return settings


def with_names(value: Any, names: Mapping[str, str]) -> Any:
    """Replaces paths by names in all texts of JSON data."""
    if isinstance(value, str):
        for path, name in names.items():
            value = value.replace(path, name)
        return value
    if isinstance(value, dict):
        return {key: with_names(item, names) for key, item in value.items()}
    return [with_names(item, names) for item in value] if isinstance(value, list) else value


class Plans:
    """Plans runs, one at a time, and remembers the answers of this process. A new request ends the
    plan that is being made of the same draft; a draft is named by its folder."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._commands = CommandLine(PLAN_SECONDS)
        self._planned: Path | None = None
        self._answers: dict[tuple[str, ...], dict[str, Any]] = {}

    def stop(self, folder: Path) -> None:
        """Ends the plan of a draft that is being made."""
        if folder == self._planned:
            self._commands.stop()

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
            self.stop(folder)
        async with self._turn:
            if key not in self._answers:
                file = folder / "plan.yaml"
                await asyncio.to_thread(lambda: write_text(file, text, replace=True))
                self._planned = folder
                answer = await self._commands.run(["plan", str(file), *flags])
                while len(self._answers) >= MOST_PLANS:
                    del self._answers[next(iter(self._answers))]
                self._answers[key] = answer
        return self._answers[key]
