"""The result of a draft's job: judging it, keeping it, and files to take.

Work that takes long is done by commands in processes of their own (commands.py). Methods that are
not coroutines read files: call them beside the event loop.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final

from veneer.data.load import DataSet
from veneer.errors import ConfigError, QuotaError, UnknownNameError, VeneerError
from veneer.files.partial import remove, sweep
from veneer.files.strict_json import read_yaml
from veneer.files.system_errors import explained
from veneer.jobs.launch import share_of_machine
from veneer.jobs.record import TrainingJob
from veneer.jobs.store import JobStore
from veneer.library.library import Library
from veneer.library.names import TRIAL
from veneer.serve.refusals import Refusal
from veneer.serve.studio.bases import StudioBases
from veneer.serve.studio.bodies import ExportBody, KeepBody
from veneer.serve.studio.commands import CommandLine
from veneer.serve.studio.drafts import Draft, Drafts
from veneer.serve.studio.exports import EXPORTS, export_arguments, export_report, finish_export
from veneer.serve.studio.judging import (
    ADAPTER,
    BASE,
    JudgedModel,
    arguments_for,
    comparison,
    held_out_rows,
    is_judged,
    save_result,
    whole_rows,
    write_rows,
)
from veneer.serve.studio.keeping import (
    check_is_free,
    check_may_keep,
    held_out_questions,
    kept_reference,
    publish,
    result_file,
    trial_name,
    unpublish,
)
from veneer.serve.studio.row_preview import examine_job
from veneer.serve.studio.training import base_name_of
from veneer.serve.studio.work import FOLDER as WORK
from veneer.serve.studio.work import RunFunction, WorkKey, WorkQueue
from veneer.training.config import RunConfig

COMMAND_SECONDS = 3600.0
"""Limit of an evaluation or an export."""
JUDGE: Final = "judge"
EXPORT: Final = "export"
"""Folders of a draft, and kinds of its work."""


class Results:
    """Judges, keeps and exports the adapters of drafts.

    store: of their jobs. read: runs a function that reads files. check: runs one that uses a
    tokenizer
    """

    def __init__(
        self,
        store: JobStore,
        library: Library,
        bases: StudioBases,
        drafts: Drafts,
        *,
        read: RunFunction,
        check: RunFunction,
    ) -> None:
        self._store, self._library, self._bases, self._drafts = store, library, bases, drafts
        self._read, self._check = read, check
        commands = CommandLine(
            COMMAND_SECONDS, share_of_machine(store.train_share), lambda: read(self._room)
        )
        self.work = WorkQueue(commands, drafts, read)
        sweep(drafts.folder)  # drafts whose removal was interrupted
        for draft in drafts.all():
            with suppress(VeneerError):  # a damaged report
                self._remove_unfinished_export(draft.id)

    def _remove_unfinished_export(self, draft_id: str) -> None:
        """Removes the files of an export that ended with its server."""
        folder = self._drafts.place(draft_id) / EXPORT
        if export_report(folder) is None and not self.work.state(WorkKey(draft_id, EXPORT))["open"]:
            remove(folder)

    def job(self, draft_id: str) -> TrainingJob:
        """Finds the job of a draft. Refusal: 404."""
        draft = self._drafts.get(draft_id)
        if draft.job is None:
            raise Refusal(404, "No run was started on these rows yet.", "id", "job_not_found")
        try:
            return self._store.get(draft.job)
        except UnknownNameError:
            raise _removed_run() from None

    def _finished_job(self, draft_id: str) -> TrainingJob:
        job = self.job(draft_id)
        if job.state != "done":
            raise ConfigError(f"the job is {job.state}: only a finished run has a result")
        return job

    def base(self, job: TrainingJob) -> dict[str, Any]:
        """Describes the base that a job trains on."""
        return self._bases.describe(_source(job), base_name_of(job))

    # judging

    def held_out(self, draft_id: str) -> dict[str, Any]:
        """Returns the rows that the job held out, as questions and expected answers. Choices that
        were changed since would hold out others, which the job has trained on."""
        job = self.job(draft_id)
        rows = held_out_rows(self._examined(job))
        return {"rows": len(rows), "questions": held_out_questions(rows), "head": has_head(job)}

    def _examined(self, job: TrainingJob) -> DataSet:
        tokenizer, capacity = self._bases.reader(_source(job))
        return examine_job(job.run_file, tokenizer=tokenizer, capacity=capacity)

    def try_out(self, draft_id: str) -> dict[str, Any]:
        """Returns the model that answers with a finished job's adapter.

        That is the version that was kept, or else a name of its own in the library.
        """
        draft, job = self._drafts.get(draft_id), self.job(draft_id)
        base = self.base(job)
        if not base["served"]:
            raise Refusal(
                409,
                f"The adapter was trained on {base['name']}, and this server answers with"
                f" {self._bases.name}. To ask it: {base['command']}",
            )
        if draft.model is not None and (
            reference := kept_reference(self._library, draft.model, draft.kept)
        ):
            return {"model": reference}
        name = trial_name(draft.id)
        publish(self._store.folder, self._library, job, name)
        return {"model": name}

    def _judged(
        self, draft_id: str, other_adapter: str
    ) -> tuple[TrainingJob, list[JudgedModel], Path]:
        """Returns a draft's finished job, the models that are compared on its held-out rows, and
        the folder of this evaluation."""
        job = self._finished_job(draft_id)
        return job, self._judged_models(job, other_adapter), self.judged_folder(draft_id, job)

    def _judged_models(self, job: TrainingJob, other_adapter: str) -> list[JudgedModel]:
        """Returns the base, unless labels are learnt, the job's adapter and, if it is named,
        another one. ConfigError: the library has no such adapter."""
        models = [JudgedModel(ADAPTER, "this adapter", job.run_folder / "adapter")]
        if not has_head(job):  # the base has no score head
            models.insert(0, JudgedModel(BASE, self.base(job)["name"]))
        if other_adapter:
            entry = self._library.get(other_adapter)
            folder = self._library.path(entry.reference)
            models.append(JudgedModel(f"other-{entry.version.object}", entry.reference, folder))
        return models

    def judged_folder(self, draft_id: str, job: TrainingJob) -> Path:
        """Returns the folder of a job's evaluation: the rows of a draft may be trained on again."""
        return self._folder(draft_id, JUDGE) / job.id

    def _prepare_evaluation(self, job: TrainingJob, folder: Path) -> None:
        """Writes the held-out rows for the commands that evaluate."""
        for path in (folder.parent, folder):  # not the draft's: it may be gone
            path.mkdir(exist_ok=True)
        settings = read_yaml(job.run_file)
        tokenizer, _ = self._bases.reader(_source(job))
        settings["quantize"] = RunConfig.of(settings).quantize
        write_rows(folder, whole_rows(self._examined(job), settings), settings, tokenizer)

    async def evaluate(self, draft_id: str, other_adapter: str) -> dict[str, Any]:
        """Queues the evaluation of the models that were not evaluated yet."""
        job, models, folder = await self._read(lambda: self._judged(draft_id, other_adapter))

        async def work(commands: CommandLine) -> None:
            if not is_judged(folder, models[0]):
                await self._check(lambda: self._prepare_evaluation(job, folder))
            for model in models:
                if not is_judged(folder, model):
                    result = await commands.run(arguments_for(folder, model))
                    await self._read(partial(save_result, folder, model, result))

        await self._read(self._room)
        key = _evaluation_key(draft_id, models)
        await self.work.start(key, {"other": other_adapter}, work)
        return await self.evaluation(draft_id, other_adapter)

    async def evaluation(self, draft_id: str, other_adapter: str) -> dict[str, Any]:
        """Returns the state of the evaluation, and the figures that are there."""

        def state() -> dict[str, Any]:
            _, models, folder = self._judged(draft_id, other_adapter)
            some = is_judged(folder, models[0])
            return {
                **self.work.state(_evaluation_key(draft_id, models)),
                "comparison": comparison(folder, models) if some else None,
                "whole": all(is_judged(folder, model) for model in models),
            }

        return dict(await self._read(state))

    # keeping

    def keep(self, draft_id: str, body: KeepBody, *, may_replace: bool) -> tuple[Draft, str]:
        """Adds the adapter to the library under a name; returns its reference. It is a model of
        this server at once, if it was trained on this server's base.

        may_replace: whether it may become a version of an adapter that no job has made. Refusal:
        403, 409 for a name that is taken unless the body allows a next version, or 400 for a name
        of adapters that are judged, and for that of the base.
        """
        name = body.name
        if name.startswith(TRIAL):
            message = f"Names that begin with {TRIAL} are reserved. Choose another name."
            raise Refusal(400, message, "name")
        if name == self._bases.name:
            message = f"{name} is the base, which answers under this name. Choose another name."
            raise Refusal(400, message, "name")
        if not may_replace:
            check_may_keep(self._store.folder, self._library, name)
        job = self.job(draft_id)
        if not body.next_version:
            check_is_free(self._library, name, self._drafts.get(draft_id).kept)
        entry = publish(self._store.folder, self._library, job, name)
        unpublish(self._library, trial_name(draft_id))
        draft = self._drafts.change(draft_id, model=name, kept=entry.version.object)
        return draft, entry.reference

    def take(self, draft_id: str, kind: str) -> tuple[bytes, str]:
        """Returns a file of the result and its name: the adapter, the report or the card."""
        draft, job = self._drafts.get(draft_id), self.job(draft_id)
        try:
            with explained(f"the {kind}", reading=True):
                return result_file(job, kind, name=_file_name(draft), base=_source(job))
        except VeneerError:
            if job.run_folder.is_dir():
                raise
            raise _removed_run() from None

    # exporting

    def _prepare_export(self, draft_id: str, body: ExportBody) -> tuple[list[str], int]:
        """Removes the last export, and returns the arguments of the next, and the bytes that its
        file may have. QuotaError: there is no room."""
        job = self._finished_job(draft_id)
        folder = self._folder(draft_id, EXPORT)
        remove(folder)
        room = self._room() // EXPORTS[body.to].copies
        folder.mkdir()
        name = _file_name(self._drafts.get(draft_id))
        adapter = job.run_folder / "adapter"
        return export_arguments(folder, adapter, body, base=_source(job), name=name), room

    def _room(self) -> int:
        """Returns the bytes that exports and evaluations may still write. QuotaError: none."""
        used_bytes, limit_bytes = self._store.used_bytes(), self._store.limits.results_bytes
        if used_bytes >= limit_bytes:
            raise QuotaError(
                f"jobs and files take {used_bytes:,} bytes; exports and evaluations"
                f" may fill {limit_bytes:,}",
                [],
                "Remove rows or exports first.",
            )
        return limit_bytes - used_bytes

    async def export(self, draft_id: str, body: ExportBody) -> dict[str, Any]:
        """Queues an export. One that fails or is stopped leaves no file."""

        async def work(commands: CommandLine) -> None:
            folder = await self._read(lambda: self._folder(draft_id, EXPORT))
            try:
                arguments, room = await self._read(lambda: self._prepare_export(draft_id, body))
                result = await commands.run(arguments, most_bytes=room)
                await self._read(lambda: finish_export(folder, body, result))
                await self._read(self._room)
            except BaseException:
                await self._read(lambda: remove(folder))
                raise

        await self._read(lambda: self._finished_job(draft_id))
        await self._read(self._room)
        await self.work.start(WorkKey(draft_id, EXPORT), body.model_dump(), work)
        return await self.exported(draft_id)

    async def exported(self, draft_id: str) -> dict[str, Any]:
        """Returns the state of the export, and describes the finished one."""

        def state() -> dict[str, Any]:
            report = export_report(self._folder(draft_id, EXPORT))
            return {**self.work.state(WorkKey(draft_id, EXPORT)), "export": report}

        return dict(await self._read(state))

    def exported_file(self, draft_id: str) -> tuple[BinaryIO, str]:
        """Opens the finished export; returns the file and its name. Refusal: 404."""
        folder = self._folder(draft_id, EXPORT)
        if (report := export_report(folder)) is not None:
            name = str(report["file"])
            with suppress(FileNotFoundError):  # removed meanwhile
                return (folder / name).open("rb"), name
        raise Refusal(404, "Nothing is exported yet.", "id", "export_not_found")

    def forget(self, draft_id: str) -> None:
        """Removes the trial name, evaluation and export of an earlier run of a draft."""
        unpublish(self._library, trial_name(draft_id))
        for name in (JUDGE, EXPORT, WORK):
            remove(self._folder(draft_id, name))

    def _folder(self, draft_id: str, name: str) -> Path:
        return self._drafts.place(self._drafts.get(draft_id).id) / name


def _evaluation_key(draft_id: str, models: Sequence[JudgedModel]) -> WorkKey:
    return WorkKey(draft_id, JUDGE, models[-1].key)


def has_head(job: TrainingJob) -> bool:
    """Whether a job trains a score head, which gives labels instead of answers."""
    return RunConfig.of(read_yaml(job.run_file)).objective.head is not None


def _removed_run() -> Refusal:
    return Refusal(404, "The run on these rows was removed.", "id", "job_not_found")


def _source(job: TrainingJob) -> str:
    return str(read_yaml(job.run_file)["base"])


def _file_name(draft: Draft) -> str:
    """Returns a name for files of a draft's result."""
    name = draft.model or draft.name.rpartition(".")[0]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "adapter"
