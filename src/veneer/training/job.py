"""A job: one run, trained alone or beside others, from its folder to its result.

run.yaml  metrics.jsonl  checkpoints/  adapter/ (full fine-tuning: model/)  prompts.json
          summary.json  report.html

The folder of a job is what it would be if the job ran alone.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from veneer.adapters.placement.acting import score_head_of
from veneer.data.batching import used_length
from veneer.data.files.writing import Record
from veneer.errors import RefusedError, VeneerError
from veneer.files.atomic import write_text
from veneer.files.strict_json import json_text
from veneer.training.announce import RunPlanner, forecast_run, start_record
from veneer.training.budget import JobMemory
from veneer.training.config import RunConfig
from veneer.training.coordination import divide_batch, require_same_run
from veneer.training.output.loggers import open_loggers
from veneer.training.output.records import NoRecords, Records
from veneer.training.output.screen import Screen
from veneer.training.prepare import PreparedRun, SharedBase, prepare_run
from veneer.training.processes.world import World
from veneer.training.result import (
    run_manifest,
    run_summary,
    write_model,
    write_prompt_sample,
    write_trained_adapter,
)
from veneer.training.state.checkpoint import prune
from veneer.training.state.folder import (
    resume_point,
    sweep,
    with_absolute_paths,
    write_run_file,
    written_rows,
)
from veneer.training.state.origin import Origin, with_rows_at_once
from veneer.training.state.place import locked_folder, refuse_unless_new
from veneer.training.state.progress import load_state
from veneer.training.trainee import Trainee


@dataclass(frozen=True)
class Job:
    """A run to be trained, alone or beside others.

    rows: files of rows to write into the folder first
    """

    config: RunConfig
    resume: bool
    screen: Screen
    rows: Mapping[str, Iterable[Record]] = field(default_factory=dict)


Result = dict[str, Any] | VeneerError
"""The content of summary.json, or the error that ended a job."""


class JobRun:
    """A job in progress. Its folder is locked until `end`, at the latest until the block ends.

    memory: what the plan says of its memory, None without a plan
    """

    def __init__(self, job: Job, world: World) -> None:
        self.job, self.world = job, world
        self.result: Result = {}
        self.memory: JobMemory | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "JobRun":
        job = self.job
        folder = _open_folder(
            Path(job.config.out), job.rows, resume=job.resume, screen=job.screen, world=self.world
        )
        self._checkpoint, self._started = self._stack.enter_context(folder)
        return self

    def __exit__(self, *fault: Any) -> None:
        self._stack.__exit__(*fault)

    def prepare(self, planner: RunPlanner | None, shared: SharedBase) -> None:
        """Loads what the run needs, and forecasts it. Writes nothing."""
        config, started, world = self.job.config, self._started, self.world
        if started is not None:
            config = with_rows_at_once(started, config)
        config = divide_batch(config, world, self.job.screen)
        self.prepared = prepare_run(
            config, started, shared=shared, world=world, say=self.job.screen.message
        )
        inputs = self.prepared.inputs
        if world.size > 1:
            require_same_run(world, self.prepared.base, self.prepared.data, inputs.flat)
        inputs.largest = inputs.find_largest()
        self._forecast = (
            forecast_run(self.prepared, planner, self.job.screen, world) if world.leads else None
        )
        largest = world.broadcast_value(None if self._forecast is None else self._forecast.largest)
        if largest is not None:
            inputs.largest = [inputs.largest[largest]]
        self.memory = self._planned_memory()

    def _planned_memory(self) -> JobMemory | None:
        inputs, forecast = self.prepared.inputs, self._forecast
        if forecast is None:
            return None
        tokens = sum(used_length(inputs.longest_train[i]) for i in inputs.largest[0])
        return replace(forecast.memory, tokens=tokens)

    def announce(self, planned: int | None) -> None:
        """Records and shows the start. planned: bytes of the peak of all runs together."""
        self._records_stack = self._stack.enter_context(ExitStack())
        self.records = self._records_stack.enter_context(
            _open_records(
                self.prepared, self._checkpoint, self._started, self.job.screen, self.world
            )
        )
        self.start = start_record(self.prepared, self._forecast, self.world, planned=planned)
        if self._checkpoint is None:
            self.records.write(
                {name: value for name, value in self.start.items() if name != "paths"}
            )
        self.job.screen.start(self.start)

    def begin(self) -> Trainee:
        prepared = self.prepared
        self.trainee = Trainee(
            prepared.inputs,
            self.records,
            self.job.screen,
            origin=prepared.origin,
            resume_from=self._checkpoint,
            world=self.world,
        )
        return self.trainee

    def write(self) -> None:
        """Writes the adapter or the model, and summary.json."""
        trainee = self.trainee
        trainee.release()
        summary = _write(self.prepared, self.start, trainee, self.world)
        self.records.write({"kind": "end", "reason": trainee.reason, "step": trainee.progress.step})
        self._records_stack.close()
        summary["failed_loggers"] = self.records.failed
        if self.world.leads:
            file = self.prepared.inputs.out / "summary.json"
            write_text(file, json_text(summary), replace=True)
            if self.prepared.config.keep is None:
                self._drop_checkpoints()
            _refuse_emptied(self.prepared.inputs.out)
        self.result = summary

    def _drop_checkpoints(self) -> None:
        """Removes all checkpoints but the newest. The best values are in the result, and a finished
        run is not resumed."""
        try:
            prune(self.prepared.inputs.out / "checkpoints", keep=1, best=None)
        except OSError as fault:
            self.job.screen.message(f"older checkpoints were not removed: {fault}")

    def end(self, result: Result) -> None:
        """Takes the adapter off the base, frees memory, closes the records, unlocks the folder.

        The result becomes the error of records that cannot be closed, unless it is one already.
        """
        self.result = result
        prepared = vars(self).pop("prepared", None)  # missing if the run could not be prepared
        vars(self).pop("trainee", None)
        if prepared is not None:
            prepared.detach()
        try:
            self._stack.close()
        except VeneerError as fault:
            self.result = result if isinstance(result, VeneerError) else fault


def _refuse_emptied(out: Path) -> None:
    """Raises RefusedError if somebody removed the folder while the run trained."""
    if not (out / "run.yaml").is_file():
        raise RefusedError(
            f"{out} was removed while the run trained: it holds the result, but no run.yaml and no"
            " records; move it away to train the run again"
        )


@contextmanager
def _open_folder(
    out: Path, rows: Mapping[str, Iterable[Record]], *, resume: bool, screen: Screen, world: World
) -> Iterator[tuple[Path | None, Origin | None]]:
    """Locks the run's folder; yields the checkpoint to resume from and what the run started with.

    Both are None for a new run, and for one that stopped before its first checkpoint.
    """
    with ExitStack() as stack:
        checkpoint, started = None, None
        with world.fail_together("at its folder"):
            if world.leads:
                if not resume:
                    refuse_unless_new(out)  # before a lock file is put among other files
                stack.enter_context(locked_folder(out))
                if not resume:
                    refuse_unless_new(out)
                sweep(out)
                stack.enter_context(written_rows(out, rows))
                checkpoint = resume_point(out, screen.message) if resume else None
                started = None if checkpoint is None else load_state(checkpoint).origin
        path, fields = world.broadcast_value(
            [checkpoint and str(checkpoint), started and started.to_dict()]
        )
        yield path and Path(path), fields and Origin(**fields)


@contextmanager
def _open_records(
    run: PreparedRun, checkpoint: Path | None, started: Origin | None, screen: Screen, world: World
) -> Iterator[Records | NoRecords]:
    """Writes run.yaml, unless a resumed run has it, and opens metrics.jsonl on the leader."""
    with ExitStack() as stack:
        records: Records | NoRecords = NoRecords()
        with world.fail_together("before its first step"):
            if world.leads:
                if started is None or started.settings is None:
                    write_run_file(with_absolute_paths(run.config))
                records = stack.enter_context(
                    Records(
                        run.inputs.out / "metrics.jsonl",
                        resumed_step=None if checkpoint is None else int(checkpoint.name),
                        listeners=open_loggers(
                            run.config.log,
                            out=run.inputs.out,
                            settings=run.config.model_dump(mode="json"),
                        ),
                        say=screen.message,
                    )
                )
        yield records


def _write(
    run: PreparedRun, start: dict[str, Any], trainee: Trainee, world: World
) -> dict[str, Any]:
    """Writes the adapter or the model; returns the content of summary.json."""
    config, base, out = run.config, run.base, run.inputs.out
    held_out = trainee.held_out()
    summary = run_summary(
        config,
        base,
        start,
        trainee.progress,
        reason=trainee.reason,
        held_out=held_out,
        damaged_best=trainee.damaged_best,
    )
    with world.fail_together("on writing its result"):
        if world.leads and run.attachment is not None:
            manifest = run_manifest(
                config, base, run.data, best_loss=trainee.progress.best_loss, held_out=held_out
            )
            summary |= write_trained_adapter(out / "adapter", run.attachment, manifest, base)
            write_prompt_sample(out, run.rows)
        elif run.attachment is None:
            sharding = base.sharding
            state = None if sharding is None else sharding.whole_state(base.compute.held)
            if world.leads:
                summary |= write_model(
                    out / "model", base, state, score_head_of(run.inputs.adapters)
                )
    return summary
