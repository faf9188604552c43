"""OpenAI's fine-tuning jobs: the body of a new one, as settings of a run, and the objects of
answers.

    {"model": BASE, "training_file": "file-...", "method": {"type": "supervised", "supervised":
     {"hyperparameters": {"n_epochs": 2}}}}

Knows nothing of files or processes: serve/engine/fine_tuning.py calls it.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from veneer.bounds import BETA, COUNT, LEARNING_RATE, ROWS, SEED, Number
from veneer.errors import UnknownNameError, VeneerError
from veneer.files.strict_json import read_json
from veneer.jobs.record import ENDED, ID_PREFIX, State, TrainingJob
from veneer.jobs.result_file import RESULT, job_records
from veneer.jobs.uploads import UploadedFile
from veneer.serve.limits import MOST_NAME
from veneer.serve.protocols.body import Body, EmptyList, Length, Num, Object, OneOf
from veneer.serve.protocols.faults import invalid
from veneer.serve.refusals import Fault, brief, without_folders
from veneer.training.state.checkpoint import numbers

STATUSES: dict[State, str] = {
    "queued": "queued",
    "running": "running",
    "stopping": "running",
    "paused": "paused",
    "done": "succeeded",
    "failed": "failed",
    "cancelled": "cancelled",
}
MOST_AT_ONCE = 8
"""Rows computed at once, however large a batch is: memory beside the server's."""
MOST_SUFFIX = 64
MOST_METADATA = 16


@dataclass(frozen=True)
class NumberOrAuto:
    """A number within bounds, or "auto"."""

    bounds: Number

    def __get_pydantic_core_schema__(self, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        number = Num(self.bounds).__get_pydantic_core_schema__(float, handler)
        return core_schema.no_info_wrap_validator_function(self._check, number)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        number = Num(self.bounds).__get_pydantic_json_schema__(schema, handler)
        return {"anyOf": [number, {"const": "auto"}]}

    def _check(self, value: Any, validate: core_schema.ValidatorFunctionWrapHandler) -> Any:
        if isinstance(value, str) and value != "auto":
            raise invalid([((), f'{brief(value)} is not {self.bounds.description}, or "auto"')])
        return value if value == "auto" else validate(value)


class Hyperparameters(Body):
    """Hyperparameters of a supervised job; "auto" leaves the choice to Veneer."""

    n_epochs: Annotated[Any, NumberOrAuto(COUNT)] = "auto"
    """passes over the rows; auto: 3"""
    batch_size: Annotated[Any, NumberOrAuto(ROWS)] = "auto"
    """rows of an optimizer step; auto: 8"""
    learning_rate_multiplier: Annotated[Any, NumberOrAuto(LEARNING_RATE)] = "auto"
    """factor of the method's usual learning rate for the base; auto: 1"""


class PreferenceHyperparameters(Hyperparameters):
    beta: Annotated[Any, NumberOrAuto(BETA)] = "auto"
    """strength of the pull towards the reference; auto: 0.1"""


class SupervisedSettings(Body):
    hyperparameters: Hyperparameters | None = None
    """n_epochs, batch_size, learning_rate_multiplier"""


class PreferenceSettings(Body):
    hyperparameters: PreferenceHyperparameters | None = None
    """the same, and beta"""


class SupervisedMethod(Body):
    type: Literal["supervised"]
    """learns the answers of the rows"""
    supervised: SupervisedSettings | None = None
    """its hyperparameters"""


class PreferenceMethod(Body):
    type: Literal["dpo"]
    """learns which of two answers is preferred"""
    dpo: PreferenceSettings | None = None
    """its hyperparameters"""


class CreateJobBody(Body):
    """The body of /v1/fine_tuning/jobs."""

    model: Annotated[str, Length(1, MOST_NAME)]
    """the served base, or an adapter of the library that training continues"""
    training_file: Annotated[str, Length(1, MOST_NAME)]
    """id of an uploaded file"""
    validation_file: Annotated[str, Length(1, MOST_NAME)] | None = None
    """id of an uploaded file of held-out rows"""
    method: (
        Annotated[
            SupervisedMethod | PreferenceMethod,
            OneOf("type", hint="reinforcement is not supported"),
        ]
        | None
    ) = None
    """{"type": "supervised"} or {"type": "dpo"}, with hyperparameters"""
    hyperparameters: Hyperparameters | None = None
    """of a supervised job, in place of method"""
    seed: Annotated[int, Num(SEED)] = 0
    """decides initial values and the order of rows"""
    suffix: Annotated[str, Length(1, MOST_SUFFIX)] | None = None
    """part of the new model's name"""
    metadata: (
        Annotated[
            dict[Annotated[str, Length(1, 64)], Annotated[str, Length(0, 512)]],
            Length(0, MOST_METADATA),
        ]
        | None
    ) = None
    """texts that are kept with the job"""
    integrations: EmptyList | None = None
    """none are supported; set `log` in a run file to send records to W&B"""

    def conflicts(self) -> Iterator[Fault]:
        yield from super().conflicts()
        if self.method is not None and self.hyperparameters is not None:
            yield Fault("hyperparameters", "and method: give one of them")

    @property
    def kind(self) -> Literal["supervised", "dpo"]:
        return "supervised" if self.method is None else self.method.type

    @property
    def chosen(self) -> Hyperparameters:
        """The hyperparameters, wherever the body has them."""
        if self.hyperparameters is not None:
            return self.hyperparameters
        if isinstance(self.method, PreferenceMethod):
            settings = self.method.dpo
            chosen = None if settings is None else settings.hyperparameters
            return chosen or PreferenceHyperparameters()
        supervised = None if self.method is None else self.method.supervised
        return (None if supervised is None else supervised.hyperparameters) or Hyperparameters()

    def run_settings(self) -> Object:
        """Returns settings of a run file for all but base, rows and learning rate."""
        chosen = self.chosen
        settings: Object = {"seed": self.seed, "show_answers": False}
        if chosen.n_epochs != "auto":
            settings["epochs"] = chosen.n_epochs
        if chosen.batch_size != "auto":
            settings["batch"] = chosen.batch_size
            if chosen.batch_size > MOST_AT_ONCE:
                settings["micro_batch"] = MOST_AT_ONCE
        if isinstance(chosen, PreferenceHyperparameters):
            beta = {} if chosen.beta == "auto" else {"beta": chosen.beta}
            settings["objective"] = {"name": "dpo", **beta}
        return settings

    def details(self) -> Object:
        """Returns what the job's object shows of the request."""
        chosen = self.chosen.model_dump()
        return {
            "model": self.model,
            "training_file": self.training_file,
            "validation_file": self.validation_file,
            "method": {"type": self.kind, self.kind: {"hyperparameters": chosen}},
            "seed": self.seed,
            "suffix": self.suffix,
            "metadata": self.metadata,
        }


def job_object(job: TrainingJob, *, others: int) -> Object:
    """Describes a job as OpenAI's clients read it. Jobs that were not created through the API have
    no training_file. others: jobs that train together with it (trains_with, a field of Veneer)"""
    record, details = job.record, job.record.details
    facts = job.facts()
    is_done = job.state == "done"
    status = STATUSES[job.state]
    if job.state == "running" and not facts:
        status = "validating_files"
    method: Any = details.get("method")
    kind = method.get("type") if isinstance(method, dict) else None
    hyperparameters = method[kind]["hyperparameters"] if kind in ("supervised", "dpo") else {}
    return {
        "object": "fine_tuning.job",
        "id": job.id,
        "created_at": int(record.created),
        "finished_at": int(record.ended) if record.ended and job.state in ENDED else None,
        "model": details.get("model") or record.base,
        "fine_tuned_model": record.publish_as if is_done else None,
        "organization_id": "local",
        "status": status,
        "error": _error(job),
        "training_file": details.get("training_file"),
        "validation_file": details.get("validation_file"),
        "result_files": [result_file_id(job.id)] if is_done else [],
        "hyperparameters": hyperparameters,
        "method": method,
        "seed": details.get("seed"),
        "suffix": details.get("suffix"),
        "metadata": details.get("metadata"),
        "integrations": [],
        "trained_tokens": _trained_tokens(job) if is_done else None,
        "estimated_finish": _estimated_finish(job, facts, others),
        "user_provided_suffix": details.get("suffix"),
        "trains_with": others,
    }


def _estimated_finish(job: TrainingJob, facts: Mapping[str, Any], others: int) -> int | None:
    """Estimates when a running job ends; None before the first step since its start. A step's
    seconds are the job's share of the time that it and the others took."""
    left, started, now = facts.get("seconds_left"), job.record.started or 0.0, time.time()
    if job.state != "running" or left is None or now - facts["idle_seconds"] < started:
        return None
    return int(now + max(left * (1 + others) - facts["idle_seconds"], 0))


def _error(job: TrainingJob) -> Object | None:
    if job.error is None:
        return None
    is_row_fault = job.record.started is None  # the server has read the rows, and no trainer ran
    return {
        "code": "invalid_training_file" if is_row_fault else "training_failed",
        "message": without_folders(job.error),
        "param": "training_file" if is_row_fault else None,
    }


def _trained_tokens(job: TrainingJob) -> int | None:
    try:
        tokens = read_json(job.run_folder / "summary.json").get("trained_tokens")
    except VeneerError:  # removed or damaged
        return None
    return tokens if isinstance(tokens, int) else 0


def event_objects(job: TrainingJob, events: list[Object]) -> list[Object]:
    """Lists a job's events and the losses of its newest steps, the newest first."""
    merged: list[tuple[float, str, str, str, Object]] = [
        (event["time"], "message", event["level"], event["message"], {}) for event in events
    ]
    clock, steps = job.record.started or job.record.created, 0
    for record in job_records(job):
        if record["kind"] == "start":
            clock, steps = record.get("time", clock), record.get("steps") or 0
        elif record["kind"] in ("step", "evaluation"):
            clock += record.get("seconds") or 0.0
            name = "training loss" if record["kind"] == "step" else "validation loss"
            key = "train_loss" if record["kind"] == "step" else "valid_loss"
            loss = record.get("loss")
            value = "none" if loss is None else f"{loss:.4f}"
            message = f"Step {record['step']}/{steps}: {name}={value}"
            data = {"step": record["step"], "total_steps": steps, key: loss}
            merged.append((clock, "metrics", "info", message, data))
    merged.sort(key=lambda event: event[0])
    objects = [
        {
            "object": "fine_tuning.job.event",
            "id": f"ftevent-{job.id.removeprefix(ID_PREFIX)}-{number}",
            "created_at": int(when),
            "level": level,
            "message": without_folders(message),
            "type": kind,
            "data": data,
        }
        for number, (when, kind, level, message, data) in enumerate(merged)
    ]
    return objects[::-1]


def checkpoint_objects(job: TrainingJob) -> list[Object]:
    """Lists the checkpoints on disk, the newest first. Only the one with the lowest held-out loss,
    or the last, is a model of the server, under the job's name; it is listed even if only its
    adapter is left."""
    metrics_of: dict[int, Object] = {}
    best: int | None = None
    for record in job_records(job):
        if record["kind"] in ("step", "evaluation"):
            key = "train_loss" if record["kind"] == "step" else "valid_loss"
            metrics = metrics_of.setdefault(record["step"], {"step": record["step"]})
            metrics[key] = record.get("loss")
            if record.get("best"):
                best = record["step"]
    steps = numbers(job.run_folder / "checkpoints")
    kept = best if best is not None else max(steps, default=None)
    times = dict(_checkpoint_times(job, steps))
    if job.state == "done" and kept is not None:
        times.setdefault(kept, job.record.ended or job.record.created)
    return [
        {
            "object": "fine_tuning.job.checkpoint",
            "id": f"ftckpt-{job.id.removeprefix(ID_PREFIX)}-{step}",
            "created_at": int(created),
            "fine_tuned_model_checkpoint": (
                job.record.publish_as if job.state == "done" and step == kept else None
            ),
            "fine_tuning_job_id": job.id,
            "metrics": metrics_of.get(step, {"step": step}),
            "step_number": step,
        }
        for step, created in sorted(times.items(), reverse=True)
    ]


def _checkpoint_times(job: TrainingJob, steps: Sequence[int]) -> Iterator[tuple[int, float]]:
    """Yields the steps with the times of their checkpoints, without those that the trainer has
    removed meanwhile."""
    for step in steps:
        with suppress(FileNotFoundError):
            yield step, (job.run_folder / "checkpoints" / f"{step:06d}").stat().st_mtime


def file_object(file: UploadedFile) -> Object:
    """Describes an uploaded file."""
    return _file_object(file.id, file.name, file.bytes, file.created, "fine-tune")


def result_file_object(job: TrainingJob) -> Object:
    """Describes the result file of a job. Raises UnknownNameError if it was removed."""
    try:
        size = (job.folder / RESULT).stat().st_size
    except FileNotFoundError:
        raise UnknownNameError(f"job {job.id} has no file {RESULT}") from None
    created = job.record.ended or job.record.created
    return _file_object(result_file_id(job.id), RESULT, size, created, "fine-tune-results")


def _file_object(file_id: str, name: str, size_bytes: int, created: float, purpose: str) -> Object:
    return {
        "object": "file",
        "id": file_id,
        "bytes": size_bytes,
        "created_at": int(created),
        "expires_at": None,
        "filename": name,
        "purpose": purpose,
        "status": "processed",
        "status_details": None,
    }


def result_file_id(job_id: str) -> str:
    return f"file-result-{job_id.removeprefix(ID_PREFIX)}"


def job_of_result(file_id: str) -> str | None:
    """Returns the id of the job whose result file this is; None for an uploaded file."""
    prefix, _, digits = file_id.rpartition("-")
    return f"{ID_PREFIX}{digits}" if prefix == "file-result" else None
