"""The studio: sets of rows, and how to train on them, beside a running server."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from veneer.data.load import DataSet
from veneer.errors import UnknownNameError, VeneerError, hide_path
from veneer.jobs.record import TrainingJob
from veneer.library.library import Library
from veneer.models.capacity import capacity_of
from veneer.models.frozen_base import FrozenBase
from veneer.serve.engine.fine_tuning import FineTuning
from veneer.serve.refusals import Refusal
from veneer.serve.studio.bodies import MethodChoices, PlanBody, RowChoices
from veneer.serve.studio.drafts import Draft, Drafts
from veneer.serve.studio.keeping import (
    check_may_keep,
    held_out_questions,
    publish,
    result_file,
    trial_name,
    unpublish,
)
from veneer.serve.studio.plans import Plans, run_settings
from veneer.serve.studio.rows import (
    count_records,
    data_settings,
    describe_check,
    describe_columns,
    examine,
    examine_job,
    first_choices,
)
from veneer.serve.studio.training import job_card, job_progress, start_job

T = TypeVar("T")
FOLDER = "the studio's folder"
"""Name of the folder in errors."""


class Studio:
    """Answers the requests of the Teach tab. Methods read files: call them by `run`.

    fine_tuning: stores jobs and uploaded files. base: the server's, on which adapters train
    """

    def __init__(self, fine_tuning: FineTuning, base: FrozenBase, library: Library) -> None:
        self.jobs, self.library = fine_tuning.store, library
        self.drafts = Drafts(self.jobs.folder / "drafts", fine_tuning.uploads)
        self.plans = Plans()
        self.run_of_server, self.base_source = fine_tuning.run, base.source
        self.capacity = capacity_of(base)
        # Tokenizers change while they encode, so this one is a copy that nothing else uses.
        self._tokenizer = copy.deepcopy(base.tokenizer)
        self._checks = ThreadPoolExecutor(1, thread_name_prefix="veneer-checks")
        self._files = ThreadPoolExecutor(4, thread_name_prefix="veneer-studio")
        self._starts = threading.Lock()

    async def run(self, function: Callable[[], T]) -> T:
        """Runs a function that reads files beside the event loop. No error names the folder."""
        return await self._run(self._files, function)

    async def _run(self, threads: ThreadPoolExecutor, function: Callable[[], T]) -> T:
        def hidden() -> T:
            with hide_path(self.jobs.folder, FOLDER):
                return function()

        return await asyncio.get_running_loop().run_in_executor(threads, hidden)

    def close(self) -> None:
        for threads in (self._checks, self._files):
            threads.shutdown(wait=False, cancel_futures=True)

    def cards(self) -> list[dict[str, Any]]:
        """Lists the drafts, the newest first."""
        return [self.card(draft) for draft in self.drafts.all()]

    def card(self, draft: Draft) -> dict[str, Any]:
        names = ("id", "name", "bytes", "created", "rows", "method", "job", "model")
        training = self._training(draft)
        state = None if training is None else training["state"]
        return {**{name: getattr(draft, name) for name in names}, "state": state}

    def add(self, name: str, content: bytes, owner: str = "") -> dict[str, Any]:
        """Stores rows. Refusal or DataError: they are no rows, or too many."""
        draft = self.drafts.add(name, content, owner)
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
            "training": self._training(draft),
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
        with hide_path(self.jobs.folder, FOLDER), hide_path(file.path, file.name):
            return await self.plans.plan(
                self.drafts.place(draft), settings, kind=body.kind, compare=body.compare
            )

    def run_settings(self, draft: Draft) -> dict[str, Any]:
        """Returns the settings of a draft's run. ConfigError: one of them is wrong."""
        rows = RowChoices.read(draft.rows)
        return run_settings(
            self.run_of_server,
            data_settings(self.drafts.row_file(draft), rows),
            rows.length,
            MethodChoices.read(draft.method),
        )

    async def check(self, draft_id: str) -> dict[str, Any]:
        """Returns the report of `veneer data check` on a draft."""

        def describe() -> dict[str, Any]:
            draft = self.drafts.get(draft_id)
            data_set = self._examined(draft)
            return describe_check(self.drafts.row_file(draft), data_set, self._tokenizer)

        return await self._run(self._checks, describe)

    async def held_out(self, draft_id: str) -> dict[str, Any]:
        """Returns the rows that the job held out, as questions and expected answers. Choices that
        were changed since would hold out others, which the job has trained on."""

        def find() -> dict[str, Any]:
            run_file = self._job(draft_id).run_file
            rows = examine_job(
                run_file, tokenizer=self._tokenizer, capacity=self.capacity
            ).validation_rows
            return {"rows": len(rows), "questions": held_out_questions(rows)}

        return await self._run(self._checks, find)

    def _examined(self, draft: Draft) -> DataSet:
        """Reads and checks the rows of a draft. One thread at a time: tokenizers change."""
        file = self.drafts.row_file(draft)
        with hide_path(file.path, file.name):
            return examine(
                file, RowChoices.read(draft.rows), tokenizer=self._tokenizer, capacity=self.capacity
            )

    def start(self, draft_id: str, choices: MethodChoices, owner: str) -> dict[str, Any]:
        """Queues the run of a draft with these choices; returns its job."""
        with self._starts:  # two pages may start the same draft at once
            draft = self.drafts.change(draft_id, method=choices.model_dump())
            rows = self.drafts.row_file(draft).path
            job = start_job(self.jobs, draft, rows, self.run_settings(draft), owner)
            self.drafts.change(draft_id, job=job.id, model=None)
        return job_card(job)

    def stop(self, draft_id: str) -> dict[str, Any]:
        """Asks the trainer to save a checkpoint and end."""
        return job_card(self.jobs.pause(self._job(draft_id).id))

    def resume(self, draft_id: str) -> dict[str, Any]:
        """Queues a stopped job again."""
        return job_card(self.jobs.resume(self._job(draft_id).id))

    def progress(self, draft_id: str, after: int) -> dict[str, Any]:
        """Returns the job of a draft with its records from a byte on."""
        return job_progress(self._job(draft_id), after)

    def try_out(self, draft_id: str) -> dict[str, Any]:
        """Returns the model that answers with a finished job's adapter.

        It has a name of its own in the library until it is kept under another.
        """
        draft = self.drafts.get(draft_id)
        if draft.model is not None:
            return {"model": draft.model}
        name = trial_name(draft.id)
        publish(self.jobs.folder, self.library, self._job(draft_id), name)
        return {"model": name}

    def keep(self, draft_id: str, name: str, *, may_replace: bool) -> dict[str, Any]:
        """Adds the adapter to the library under a name, where it is a model at once.

        may_replace: whether it may become a version of an adapter that no job has made. Refusal:
        403.
        """
        if not may_replace:
            check_may_keep(self.jobs.folder, self.library, name)
        reference = publish(self.jobs.folder, self.library, self._job(draft_id), name)
        unpublish(self.library, trial_name(draft_id))
        draft = self.drafts.change(draft_id, model=name)
        return {**self.card(draft), "reference": reference}

    def take(self, draft_id: str, kind: str) -> tuple[bytes, str]:
        """Returns a file of the result and its name: the adapter, the report or the card."""
        draft = self.drafts.get(draft_id)
        name = draft.model or draft.name.rpartition(".")[0] or "adapter"
        return result_file(self._job(draft_id), kind, name=name, base=self.base_source)

    def remove(self, draft_id: str) -> None:
        """Deletes a draft, its rows and its jobs. An adapter that was kept stays."""
        with self._starts:
            draft = self.drafts.get(draft_id)
            # The newest job first: only that one may run, and then nothing is deleted.
            for job in self.jobs.jobs():
                if job.record.details.get("draft") == draft.id:
                    with suppress(UnknownNameError):
                        self.jobs.delete(job.id)
            unpublish(self.library, trial_name(draft.id))
            self.drafts.remove(draft_id)

    def _training(self, draft: Draft) -> dict[str, Any] | None:
        """Returns the card of a draft's job; None if it has none, or the job was deleted or is
        damaged."""
        if draft.job is None:
            return None
        try:
            return job_card(self.jobs.get(draft.job))
        except VeneerError:
            return None

    def _job(self, draft_id: str) -> TrainingJob:
        """Finds the job of a draft. Refusal: 404."""
        draft = self.drafts.get(draft_id)
        if draft.job is None:
            raise Refusal(404, "These rows are not trained on yet.", "id", "job_not_found")
        return self.jobs.get(draft.job)
