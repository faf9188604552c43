"""The studio: sets of rows, and how to train on them, beside a running server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from veneer.data.examples import Capacity
from veneer.data.load import DataSet
from veneer.errors import QuotaError, UnknownNameError, VeneerError, hide_path
from veneer.jobs.record import AT_WORK, TrainingJob
from veneer.library.library import Library
from veneer.objectives.config import ObjectiveConfig
from veneer.serve.engine.fine_tuning import FineTuning
from veneer.serve.refusals import Refusal
from veneer.serve.studio.bases import StudioBases
from veneer.serve.studio.bodies import OBJECTIVE, KeepBody, MethodChoices, PlanBody, RowChoices
from veneer.serve.studio.documents import Document, remove_documents, store_document
from veneer.serve.studio.drafts import Draft, Drafts, public_name
from veneer.serve.studio.objective import chosen_objective, objectives_for
from veneer.serve.studio.plans import Plans, run_settings, with_names
from veneer.serve.studio.results import Results
from veneer.serve.studio.row_preview import (
    count_records,
    data_settings,
    describe_check,
    describe_columns,
    examine,
    first_choices,
    layout_of,
)
from veneer.serve.studio.training import job_card, job_records_after, start_job

T = TypeVar("T")
FOLDER = "the studio's folder"
"""Name of the folder in errors."""


class Studio:
    """Answers the requests of the Teach tab. Methods read files: call them by `run`.

    fine_tuning: stores jobs and uploaded files. bases: on which adapters train
    """

    def __init__(self, fine_tuning: FineTuning, bases: StudioBases, library: Library) -> None:
        self.jobs, self.bases = fine_tuning.store, bases
        self.drafts = Drafts(self.jobs.folder / "drafts", fine_tuning.uploads)
        self.plans = Plans()
        self._checks = ThreadPoolExecutor(1, thread_name_prefix="veneer-checks")
        self._files = ThreadPoolExecutor(4, thread_name_prefix="veneer-studio")
        self._starts = threading.Lock()
        self.results = Results(
            self.jobs, library, bases, self.drafts, read=self.run, check=self.run_check
        )

    async def run(self, function: Callable[[], T]) -> T:
        """Runs a function that reads files beside the event loop. No error names the folder."""
        return await self._run(self._files, function)

    async def run_check(self, function: Callable[[], T]) -> T:
        """Runs a function that uses a tokenizer: one at a time, because tokenizers change."""
        return await self._run(self._checks, function)

    async def _run(self, threads: ThreadPoolExecutor, function: Callable[[], T]) -> T:
        def hidden() -> T:
            with hide_path(self.jobs.folder, FOLDER):
                return function()

        return await asyncio.get_running_loop().run_in_executor(threads, hidden)

    async def close(self) -> None:
        await self.results.work.close()
        for threads in (self._checks, self._files):
            threads.shutdown(wait=False, cancel_futures=True)

    def cards(self) -> list[dict[str, Any]]:
        """Lists the drafts, the newest first."""
        return [self.card(draft) for draft in self.drafts.all()]

    def card(self, draft: Draft) -> dict[str, Any]:
        names = ("id", "name", "bytes", "created", "rows", "method", "job", "model")
        training = self._training(draft)
        state = None if training is None else training["state"]
        document = None if draft.document is None else draft.document.model_dump(exclude={"file"})
        fields = {name: getattr(draft, name) for name in names}
        return {**fields, "document": document, "state": state}

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
        draft = self.drafts.change(draft_id, rows=choices.model_dump())
        method = MethodChoices.read(draft.method)
        layout = layout_of(self.drafts.row_file(draft), choices)
        if method.settings.get(OBJECTIVE) not in objectives_for(layout):
            method.settings.pop(OBJECTIVE, None)  # it was for another layout
            self.drafts.change(draft_id, method=method.model_dump())
        return self.show(draft_id)

    def set_document(self, draft_id: str, name: str, content: bytes) -> dict[str, Any]:
        """Stores the document that a draft's teacher reads, in place of another. DataError: it is
        no text. QuotaError: there is no room."""
        if (fault := self.jobs.limits.disk_fault(self.jobs.used_bytes())) is not None:
            raise QuotaError(fault, [], "Remove rows first.")
        with self._starts:
            folder = self.drafts.place(self.drafts.get(draft_id).id)
            document = store_document(folder, public_name(name) or "document", content)
            return self._change_document(draft_id, document)

    def remove_document(self, draft_id: str) -> dict[str, Any]:
        with self._starts:
            return self._change_document(draft_id, None)

    def _change_document(self, draft_id: str, document: Document | None) -> dict[str, Any]:
        """Changes a draft's document. Keeps the one that its job reads."""
        draft = self.drafts.change(draft_id, document=document)
        keep = {None if document is None else document.file}
        with suppress(VeneerError, Refusal):  # it has no job
            keep.add(str(self.results.job(draft_id).record.details.get("document")))
        remove_documents(self.drafts.place(draft_id), keep=keep)
        return self.card(draft)

    def choose_method(self, draft_id: str, choices: MethodChoices) -> dict[str, Any]:
        """Keeps the choices, whether or not the rows can be trained on with them: another base may
        read rows that this one cannot. Refusal: 404, the base is not on this machine."""
        self.bases.source(choices.base)
        return self.card(self.drafts.change(draft_id, method=choices.model_dump()))

    async def plan(self, draft_id: str, body: PlanBody) -> dict[str, Any]:
        """Returns the plan of a draft's run with these choices, which are kept if the body says
        so."""
        choices = MethodChoices(
            base=body.base, kind=body.kind, method=body.method, settings=body.settings
        )

        def prepare() -> tuple[Draft, dict[str, Any]]:
            draft = self.drafts.changed(draft_id, method=choices.model_dump())
            settings = self.run_settings(draft)
            if body.keep:  # choices that are refused are not kept
                draft = self.drafts.change(draft_id, method=draft.method)
            return draft, settings

        draft, settings = await self.run(prepare)
        file, folder = self.drafts.row_file(draft), self.drafts.place(draft.id)
        names = {str(file.path): file.name}
        if Path(settings["base"]).is_absolute():
            names[settings["base"]] = body.base or self.bases.name
        if draft.document is not None:
            names[str(self.drafts.document_path(draft))] = draft.document.name
        with hide_path(self.jobs.folder, FOLDER), hide_path(file.path, file.name):
            plan = await self.plans.plan(folder, settings, kind=body.kind, compare=body.compare)
        return dict(with_names(plan, names))

    def run_settings(self, draft: Draft) -> dict[str, Any]:
        """Returns the settings of a draft's run. ConfigError: one of them is wrong."""
        rows, method = RowChoices.read(draft.rows), MethodChoices.read(draft.method)
        return run_settings(
            self.bases.run_settings(method.base),
            data_settings(self.drafts.row_file(draft), rows),
            rows.length,
            method,
            self._objective(draft).name,
            self.drafts.document_path(draft),
        )

    async def check(self, draft_id: str) -> dict[str, Any]:
        """Returns the report of `veneer data check` on a draft."""

        def describe() -> dict[str, Any]:
            draft = self.drafts.get(draft_id)
            data_set = self._examined(draft)
            return describe_check(self.drafts.row_file(draft), data_set, self._reader(draft)[0])

        return await self.run_check(describe)

    def _examined(self, draft: Draft) -> DataSet:
        """Reads and checks the rows of a draft. One thread at a time: tokenizers change."""
        file = self.drafts.row_file(draft)
        tokenizer, capacity = self._reader(draft)
        with hide_path(file.path, file.name):
            return examine(
                file,
                RowChoices.read(draft.rows),
                self._objective(draft),
                tokenizer=tokenizer,
                capacity=capacity,
            )

    def _objective(self, draft: Draft) -> ObjectiveConfig:
        """Returns the objective of a draft's run: the chosen one, or the usual one for the rows."""
        layout = layout_of(self.drafts.row_file(draft), RowChoices.read(draft.rows))
        name = MethodChoices.read(draft.method).settings.get(OBJECTIVE)
        return chosen_objective(layout, name)

    def _reader(self, draft: Draft) -> tuple[Any, Capacity]:
        """Returns the tokenizer and the capacity of the base that was chosen for a draft."""
        return self.bases.reader(self.bases.source(MethodChoices.read(draft.method).base))

    def start(self, draft_id: str, choices: MethodChoices, owner: str) -> dict[str, Any]:
        """Queues the run of a draft with these choices; returns its job."""
        with self._starts:  # two pages may start the same draft at once
            draft = self.drafts.changed(draft_id, method=choices.model_dump())
            rows = self.drafts.row_file(draft).path
            job = start_job(self.jobs, draft, rows, self.run_settings(draft), owner)
            self.results.forget(draft_id)
            self.drafts.change(draft_id, method=draft.method, job=job.id, model=None, kept=None)
        return self._job_card(job)

    def stop(self, draft_id: str) -> dict[str, Any]:
        """Asks the trainer to save a checkpoint and end."""
        return self._job_card(self.jobs.pause(self.results.job(draft_id).id))

    def resume(self, draft_id: str) -> dict[str, Any]:
        """Queues a stopped job again."""
        return self._job_card(self.jobs.resume(self.results.job(draft_id).id))

    def progress(self, draft_id: str, after: int) -> dict[str, Any]:
        """Returns the job of a draft with its records from a position on."""
        job = self.results.job(draft_id)
        return {**job_records_after(job, after), "job": self._job_card(job)}

    def _job_card(self, job: TrainingJob) -> dict[str, Any]:
        """Describes a job, with its base, and how many jobs are before it or train with it."""
        return {
            **job_card(job),
            "base": self.results.base(job),
            "ahead": self._jobs_ahead(job),
            "together": self.jobs.num_together(job),
        }

    def _jobs_ahead(self, job: TrainingJob) -> int:
        """Returns how many jobs run or were queued before this one; 0 if it does not wait."""
        if job.state != "queued":
            return 0
        return sum(
            queue_job.state in AT_WORK
            or (queue_job.state == "queued" and queue_job.record.queued < job.record.queued)
            for queue_job in self.jobs.jobs()
        )

    def keep(self, draft_id: str, body: KeepBody, *, may_replace: bool) -> dict[str, Any]:
        """Adds the adapter to the library under a name, as Results.keep does."""
        draft, reference = self.results.keep(draft_id, body, may_replace=may_replace)
        return {**self.card(draft), "reference": reference}

    def remove(self, draft_id: str) -> None:
        """Deletes a draft, its rows and its jobs. An adapter that was kept stays."""
        with self._starts:
            draft = self.drafts.get(draft_id)
            # The newest job first: only that one may run, and then nothing is deleted.
            for job in self.jobs.jobs():
                if job.record.details.get("draft") == draft.id:
                    with suppress(UnknownNameError):
                        self.jobs.delete(job.id)
            self.results.forget(draft.id)
            self.drafts.remove(draft_id)

    def _training(self, draft: Draft) -> dict[str, Any] | None:
        """Returns the card of a draft's job; None if it has none, or the job was deleted or is
        damaged."""
        if draft.job is None:
            return None
        try:
            return self._job_card(self.jobs.get(draft.job))
        except VeneerError:
            return None
