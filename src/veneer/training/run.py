"""One run, from its settings to its folder: prepare, announce, train, write.

run.yaml  metrics.jsonl  checkpoints/  adapter/ (full fine-tuning: model/)  summary.json
          report.html
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

from veneer.data.files.writing import Record
from veneer.execution.train_step import fused
from veneer.files.atomic import atomic_file
from veneer.files.strict_json import json_text
from veneer.models.checkpointing import checkpointed
from veneer.training.announce import RunPlanner, forecast_run, start_record
from veneer.training.config import RunConfig
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
from veneer.training.together import agree, divide_batch


def run_training(
    config: RunConfig,
    *,
    resume: bool,
    screen: Screen,
    plan: RunPlanner | None = None,
    world: World = ALONE,
    rows: Mapping[str, Iterable[Record]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Trains to the end; returns the content of summary.json.

    rows: files of rows to write into the folder first. world: the processes that compute the run
    together, all with the same settings; only the leader touches the folder.
    Every VeneerError leaves the last checkpoint intact.
    """
    out = Path(config.out)
    folder = _open_folder(out, rows, resume=resume, screen=screen, world=world)
    with folder as (checkpoint, started):
        if started is not None:
            config = with_rows_at_once(started, config)
        config = divide_batch(config, world, screen)
        run = prepare_run(config, started, world=world, say=screen.message)
        with _open_records(run, checkpoint, started, screen, world) as records:
            if world.size > 1:
                agree(world, run.base, run.data, run.inputs.flat)
            start = _announce(run, plan, records, screen, world, resumes=checkpoint is not None)
            loop, reason = _train(run, start, checkpoint, records, screen, world)
            summary = _write(run, start, loop, reason, world)
            records.write({"kind": "end", "reason": reason, "step": loop.progress.step})
        summary["failed_loggers"] = records.failed
        if world.leads:
            with atomic_file(out / "summary.json", replace=True) as partial:
                partial.write_text(json_text(summary), encoding="utf-8")
        return summary


@contextmanager
def _open_folder(
    out: Path, rows: Mapping[str, Iterable[Record]], *, resume: bool, screen: Screen, world: World
) -> Iterator[tuple[Path | None, Origin | None]]:
    """Locks the run's folder; yields the checkpoint to resume from and what the run started with.

    Both are None for a new run, and for one that stopped before its first checkpoint.
    """
    with ExitStack() as stack:
        checkpoint, started = None, None
        with world.together("at its folder"):
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
        path, fields = world.shared([checkpoint and str(checkpoint), started and started.to_dict()])
        yield path and Path(path), fields and Origin(**fields)


@contextmanager
def _open_records(
    run: PreparedRun, checkpoint: Path | None, started: Origin | None, screen: Screen, world: World
) -> Iterator[Records | NoRecords]:
    """Writes run.yaml, unless a resumed run has it, and opens metrics.jsonl on the leader."""
    with ExitStack() as stack:
        records: Records | NoRecords = NoRecords()
        with world.together("before its first step"):
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


def _announce(
    run: PreparedRun,
    planner: RunPlanner | None,
    records: Records | NoRecords,
    screen: Screen,
    world: World,
    *,
    resumes: bool,
) -> dict[str, Any]:
    """Forecasts the run, then records and shows its start; returns the start record."""
    inputs = run.inputs
    inputs.largest = inputs.find_largest()
    forecast = forecast_run(run, planner, screen, world) if world.leads else None
    largest = world.shared(None if forecast is None else forecast.largest)
    if largest is not None:
        inputs.largest = [inputs.largest[largest]]
    start = start_record(run, forecast, world)
    if not resumes:
        records.write({name: value for name, value in start.items() if name != "paths"})
    screen.start(start)
    return start


def _train(
    run: PreparedRun,
    start: Mapping[str, Any],
    checkpoint: Path | None,
    records: Records | NoRecords,
    screen: Screen,
    world: World,
) -> tuple[Loop, str]:
    """Trains to the end; returns the loop and why it ended."""
    base = run.base
    loop = Loop(run.inputs, records, screen, origin=run.origin, resume_from=checkpoint, world=world)
    on_cpu = base.device.type == "cpu"
    with (
        steady_heap(start["planned_memory_bytes"] or 0) if on_cpu else nullcontext(),
        fused(base.model, run.fused_modules),
        checkpointed(base.model, base.routing, on=run.config.checkpointing),
    ):
        reason = loop.run()
    loop.release()
    return loop, reason


def _write(
    run: PreparedRun, start: dict[str, Any], loop: Loop, reason: str, world: World
) -> dict[str, Any]:
    """Writes the adapter or the model; returns the content of summary.json."""
    config, base, out = run.config, run.base, run.inputs.out
    held_out = loop.held_out()
    summary = run_summary(
        config,
        base,
        start,
        loop.progress,
        reason=reason,
        held_out=held_out,
        damaged_best=loop.damaged_best,
    )
    with world.together("on writing its result"):
        if world.leads and run.attachment is not None:
            manifest = run_manifest(
                config, base, run.data, best_loss=loop.progress.best_loss, held_out=held_out
            )
            summary |= write_trained_adapter(out / "adapter", run.attachment, manifest, base)
        elif world.leads:
            summary |= write_model(out / "model", base)
    return summary
