"""Runs, from their settings to their folders: prepare, announce, train, write.

run.yaml  metrics.jsonl  checkpoints/  adapter/ (full fine-tuning: model/)  summary.json
          report.html

One run, or several jobs that share a base and train in the same forwards. The folder of a job is
what it would be if the job ran alone.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from veneer.data.batching import used_length
from veneer.data.files.writing import Record
from veneer.errors import ConfigError, VeneerError
from veneer.execution.train_step import fused, one_node, replacements
from veneer.files.atomic import write_text
from veneer.files.strict_json import json_text
from veneer.models.checkpointing import checkpointed
from veneer.training.announce import RunPlanner, forecast_run, start_record
from veneer.training.budget import JobMemory, JointMemory, free_bytes, plan_jobs
from veneer.training.config import RunConfig
from veneer.training.coordination import divide_batch, require_common_settings, require_same_run
from veneer.training.loop import Loop
from veneer.training.optimizer.heap import steady_heap
from veneer.training.output.loggers import open_loggers
from veneer.training.output.records import NoRecords, Records
from veneer.training.output.screen import Screen
from veneer.training.prepare import PreparedRun, prepare_run
from veneer.training.processes.world import ALONE, World
from veneer.training.result import run_manifest, run_summary, write_model, write_trained_adapter
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
from veneer.training.supervisor import Supervisor
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


def run_training(
    config: RunConfig,
    *,
    resume: bool,
    screen: Screen,
    plan: RunPlanner | None = None,
    world: World = ALONE,
    rows: Mapping[str, Iterable[Record]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Trains one run to the end; returns the content of summary.json.

    rows: files of rows to write into the folder first. world: the processes that compute the run
    together, all with the same settings; only the leader touches the folder.
    Every VeneerError leaves the last checkpoint intact.
    """
    (result,) = run_jobs([Job(config, resume, screen, rows)], plan=plan, world=world)
    if isinstance(result, VeneerError):
        raise result
    return result


def run_jobs(
    jobs: Sequence[Job],
    *,
    plan: RunPlanner | None = None,
    world: World = ALONE,
    budget: int | None = None,
    supervisor: Supervisor | None = None,
    finished: Callable[[Job, Result], None] = lambda job, result: None,
) -> list[Result]:
    """Trains jobs in the same forwards until each has ended or failed; returns their results.

    budget: most tokens in a forward of several jobs. supervisor: decides which jobs go on; without
    one, all do. finished: called when a job has its result; an error that it raises becomes the
    job's, and it is called with that.
    Raises ConfigError with the faults of all jobs before any of them starts, RunInterrupted, and
    errors that concern all jobs.
    """
    require_common_settings([job.config for job in jobs], world)
    with ExitStack() as stack:
        runs = _prepare_all(jobs, stack, world)
        if supervisor is not None:
            supervisor.check([run.prepared.inputs for run in runs])
        for run in runs:
            run.forecast(plan)
        joint = _plan_memory(runs)
        for run in runs:
            run.announce(None if joint is None else joint.peak)
        if budget is None and joint is not None and len(runs) > 1:
            budget = joint.tokens
        _train_all(runs, world, budget, supervisor, finished)
        return [run.result for run in runs]


def _prepare_all(jobs: Sequence[Job], stack: ExitStack, world: World) -> "list[_Run]":
    """Opens and prepares all runs. Raises the error of a lone run, else one with all faults."""
    runs: list[_Run] = []
    faults: list[str] = []
    for job in jobs:
        run = _Run(job, world)
        try:
            stack.enter_context(run)
            run.prepare([other.prepared for other in runs])
        except VeneerError as fault:
            if len(jobs) == 1:
                raise
            faults += fault.lines_about(job.config.out)
        else:
            runs.append(run)
    if faults:
        raise ConfigError(
            f"{len(jobs) - len(runs)} of {len(jobs)} jobs cannot run, so none was started",
            faults,
            "Correct these jobs, or leave them out.",
        )
    return runs


def _plan_memory(runs: "Sequence[_Run]") -> JointMemory | None:
    """Plans the memory of all runs together; None where a run has no plan."""
    plans = [run.memory() for run in runs]
    jobs = [plan for plan in plans if plan is not None]
    if len(jobs) < len(runs):
        return None
    return plan_jobs(jobs, free_bytes(runs[0].prepared.base.device) if len(runs) > 1 else None)


def _train_all(
    runs: "Sequence[_Run]",
    world: World,
    budget: int | None,
    supervisor: Supervisor | None,
    finished: Callable[[Job, Result], None],
) -> None:
    """Trains until every run has its result."""
    prepared = runs[0].prepared
    model, on_cpu = prepared.base.model, prepared.base.device.type == "cpu"
    planned_bytes = max(run.start["planned_memory_bytes"] or 0 for run in runs)
    runs_of = {run.begin(): run for run in runs}
    loop = Loop(list(runs_of), world=world, budget=budget, supervisor=supervisor)
    is_new = True
    while loop.trainees:
        stand_ins = replacements(model)
        loop.one_node = one_node(stand_ins)
        with (
            steady_heap(planned_bytes) if on_cpu else nullcontext(),
            fused(model, stand_ins),
            checkpointed(model, prepared.base.routing, on=prepared.config.checkpointing),
        ):
            if is_new:
                loop.start()
            is_new, ended = False, loop.run()
        results: list[tuple[_Run, Result]] = [
            (runs_of[trainee], fault) for trainee, fault in loop.failed.items()
        ]
        loop.failed.clear()
        for run in [runs_of[trainee] for trainee in ended]:
            try:
                run.write()
            except VeneerError as fault:
                results.append((run, fault))
            else:
                results.append((run, run.result))
        for run, result in results:
            run.end(result)
            try:
                finished(run.job, run.result)
            except VeneerError as fault:
                run.result = fault
                finished(run.job, fault)


class _Run:
    """A job in progress. Its folder is locked until `end`, at the latest until the block ends."""

    def __init__(self, job: Job, world: World) -> None:
        self.job, self.world = job, world
        self.result: Result = {}
        self._stack = ExitStack()

    def __enter__(self) -> "_Run":
        job = self.job
        folder = _open_folder(
            Path(job.config.out), job.rows, resume=job.resume, screen=job.screen, world=self.world
        )
        self._checkpoint, self._started = self._stack.enter_context(folder)
        return self

    def __exit__(self, *fault: Any) -> None:
        self._stack.__exit__(*fault)

    def prepare(self, beside: Sequence[PreparedRun]) -> None:
        """Loads what the run needs. beside: runs that it shares the base with."""
        config, started = self.job.config, self._started
        if started is not None:
            config = with_rows_at_once(started, config)
        config = divide_batch(config, self.world, self.job.screen)
        self.prepared = prepare_run(
            config, started, beside=beside, world=self.world, say=self.job.screen.message
        )

    def forecast(self, planner: RunPlanner | None) -> None:
        """Opens the records, and forecasts the run."""
        prepared, world, screen = self.prepared, self.world, self.job.screen
        self._records_stack = self._stack.enter_context(ExitStack())
        self.records = self._records_stack.enter_context(
            _open_records(prepared, self._checkpoint, self._started, screen, world)
        )
        inputs = prepared.inputs
        if world.size > 1:
            require_same_run(world, prepared.base, prepared.data, inputs.flat)
        inputs.largest = inputs.find_largest()
        self._forecast = forecast_run(prepared, planner, screen, world) if world.leads else None
        largest = world.broadcast_value(None if self._forecast is None else self._forecast.largest)
        if largest is not None:
            inputs.largest = [inputs.largest[largest]]

    def memory(self) -> JobMemory | None:
        """Returns what the plan says of the memory, None without a plan."""
        inputs, forecast = self.prepared.inputs, self._forecast
        if forecast is None:
            return None
        tokens = sum(used_length(inputs.train[i]) for i in inputs.largest[0])
        return JobMemory(forecast.peak, forecast.step, tokens, forecast.values, forecast.optimizer)

    def announce(self, planned: int | None) -> None:
        """Records and shows the start. planned: bytes of the peak of all runs together."""
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
        self.result = summary

    def end(self, result: Result) -> None:
        """Takes the adapter off the base, closes the records and unlocks the folder.

        The result becomes the error of records that cannot be closed, unless it is one already.
        """
        self.result = result
        self.prepared.detach()
        try:
            self._stack.close()
        except VeneerError as fault:
            self.result = result if isinstance(result, VeneerError) else fault


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
        elif run.attachment is None:
            sharding = base.sharding
            state = None if sharding is None else sharding.whole_state(base.compute.held)
            if world.leads:
                summary |= write_model(out / "model", base, state)
    return summary
