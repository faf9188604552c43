"""The studio: sets of rows, and how to train on them, beside a running server."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from veneer.errors import hide_path
from veneer.models.capacity import capacity_of
from veneer.models.frozen_base import FrozenBase
from veneer.serve.studio.bodies import MethodChoices, PlanBody, RowChoices
from veneer.serve.studio.drafts import Draft, Drafts
from veneer.serve.studio.plans import Plans, run_settings
from veneer.serve.studio.rows import (
    count_records,
    data_settings,
    describe_check,
    describe_columns,
    examine,
    first_choices,
)

T = TypeVar("T")
FOLDER = "the studio's folder"
"""Name of the folder in errors."""


class Studio:
    """What the Teach tab shows and does. Methods read files: call them by `run`.

    folder: of drafts. base: the server's base, on which adapters train
    """

    def __init__(self, folder: Path, base: FrozenBase) -> None:
        self.drafts, self.plans = Drafts(folder), Plans()
        self.base_source = base.source
        self.capacity = capacity_of(base)
        # Tokenizers change while they encode, so this one is a copy that nothing else uses.
        self._tokenizer = copy.deepcopy(base.tokenizer)
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="veneer-studio")

    async def run(self, function: Callable[[], T]) -> T:
        """Runs a function beside the event loop, one at a time. No error names the folder."""

        def hidden() -> T:
            with hide_path(self.drafts.folder, FOLDER):
                return function()

        return await asyncio.get_running_loop().run_in_executor(self._threads, hidden)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def cards(self) -> list[dict[str, Any]]:
        """Lists the drafts, the newest first."""
        return [self.card(draft) for draft in self.drafts.all()]

    def card(self, draft: Draft) -> dict[str, Any]:
        names = ("id", "name", "bytes", "created", "rows", "method", "job", "model")
        return {name: getattr(draft, name) for name in names}

    def add(self, name: str, content: bytes) -> dict[str, Any]:
        """Stores rows. Refusal or DataError: they are no rows, or too many."""
        draft = self.drafts.add(name, content)
        file = self.drafts.row_file(draft)
        try:
            choices = first_choices(file, count_records(file))
        except BaseException:
            self.drafts.remove(draft.id)
            raise
        return self.card(self.drafts.change(draft.id, rows=choices.model_dump()))

    def show(self, draft_id: str) -> dict[str, Any]:
        """Returns a draft with its columns and first rows."""
        draft = self.drafts.get(draft_id)
        choices = RowChoices.read(draft.rows)
        file = self.drafts.row_file(draft)
        return {
            **self.card(draft),
            "choices": choices.model_dump(),
            "preview": describe_columns(file, choices),
        }

    def preview(self, draft_id: str, choices: RowChoices) -> dict[str, Any]:
        """Keeps the choices of a draft, and returns its columns and first rows."""
        self.drafts.change(draft_id, rows=choices.model_dump())
        return self.show(draft_id)

    async def plan(self, draft_id: str, body: PlanBody) -> dict[str, Any]:
        """Keeps the choices of a draft, and returns the plan of its run."""
        choices = MethodChoices(kind=body.kind, method=body.method, settings=body.settings)

        def prepare() -> tuple[Draft, dict[str, Any]]:
            draft = self.drafts.change(draft_id, method=choices.model_dump())
            return draft, self.run_settings(draft)

        draft, settings = await self.run(prepare)
        file = self.drafts.row_file(draft)
        with hide_path(file.path, file.name), hide_path(self.drafts.folder, FOLDER):
            return await self.plans.plan(
                file.path.parent, settings, kind=body.kind, compare=body.compare
            )

    def run_settings(self, draft: Draft) -> dict[str, Any]:
        """Returns the settings of a draft's run. ConfigError: one of them is wrong."""
        rows = RowChoices.read(draft.rows)
        return run_settings(
            self.base_source,
            data_settings(self.drafts.row_file(draft), rows),
            rows.length,
            MethodChoices.read(draft.method),
        )

    def check(self, draft_id: str) -> dict[str, Any]:
        """Returns the report of `veneer data check` on a draft."""
        draft = self.drafts.get(draft_id)
        file = self.drafts.row_file(draft)
        with hide_path(file.path, file.name):
            data_set = examine(
                file, RowChoices.read(draft.rows), tokenizer=self._tokenizer, capacity=self.capacity
            )
            return describe_check(file, data_set, self._tokenizer)
