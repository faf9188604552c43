"""Runs of a run file: training one, changing it so that it fits, and reading its rows."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from veneer.adapters.preamble import Preamble
from veneer.bases.tokenizer import load_tokenizer
from veneer.data.checks.check import refuse_unreadable
from veneer.data.encoder import RowRules
from veneer.data.files.writing import Record
from veneer.data.load import DataSet, examine_data
from veneer.data.template.new_tokens import bring, extended, room_with
from veneer.errors import ConfigError, VeneerError
from veneer.library.library import Library
from veneer.library.names import name_of_run
from veneer.models.capacity import configured_capacity
from veneer.plan.probe import fit_config, forecast
from veneer.report.page import write_report
from veneer.training.config import RunConfig
from veneer.training.job import Job
from veneer.training.output.screen import Screen
from veneer.training.processes.world import join_processes, world_of
from veneer.training.run import run_jobs, run_training
from veneer.training.supervisor import Supervisor


def train_run(
    config: RunConfig | None,
    *,
    resume: bool,
    screen: Screen,
    rows: Mapping[str, Iterable[Record]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Trains a run, writes its report, and returns the content of summary.json.

    rows: by name, files of rows to write into the run's folder first. With torchrun's variables in
    the environment this is one of several processes (training/processes/world.py): all compute the
    run of rank 0, and the others may give None.
    """
    with join_processes() as world:
        settings, set_fields = world.broadcast_value(
            None
            if config is None
            else [config.model_dump(mode="json"), sorted(config.method.model_fields_set)]
        )
        if config is None:
            config = _with_set_fields(RunConfig.model_validate(settings), set_fields)
        if config.model_dump(mode="json") != settings:
            raise ConfigError(
                "the processes of this run were given different settings",
                next_step="Give all the same.",
            )
        summary = run_training(
            config, resume=resume, screen=screen, plan=forecast, world=world, rows=rows
        )
        if world.leads:
            forecast.compare(config.out, summary)
            write_report(Path(config.out))
            screen.end(summary)
    return summary


def train_jobs(
    configs: Sequence[RunConfig],
    *,
    resume: bool | Sequence[bool],
    screens: Sequence[Screen],
    supervisor: Supervisor | None = None,
    library: Library | None = None,
) -> list[dict[str, Any] | VeneerError]:
    """Trains several runs of one base in the same forwards, and writes their reports.

    resume: of all runs, or of each. supervisor: decides which runs go on (training/supervisor.py).
    library: takes each adapter, under the name of its folder, as soon as its run has finished.
    Returns for each the content of summary.json, or the error that ended it.
    """
    resumes = [resume] * len(configs) if isinstance(resume, bool) else resume
    jobs = [Job(*job) for job in zip(configs, resumes, screens, strict=True)]

    def finish(job: Job, result: dict[str, Any] | VeneerError) -> None:
        if isinstance(result, VeneerError):
            job.screen.failure(result.headline)
        else:
            out = Path(job.config.out)
            forecast.compare(job.config.out, result)
            write_report(out)
            if library is not None:
                library.add(out, name=name_of_run(out))
            job.screen.end(result)

    return run_jobs(jobs, plan=forecast, supervisor=supervisor, finished=finish)


def _with_set_fields(config: RunConfig, fields: Sequence[str]) -> RunConfig:
    """Marks only these settings of the method as set: a run that continues an adapter takes the
    adapter's value of the others."""
    method = config.method
    values = method.model_dump(include=set(fields))
    return config.model_copy(update={"method": type(method).model_validate(values)})


def fit_run(config: RunConfig, memory_bytes: int) -> tuple[RunConfig, list[str]]:
    """Changes as few settings as possible so that a run fits; returns it and the changes in words.

    Raises DoesNotFitError if no change helps.
    """
    if config.from_adapter:
        raise ConfigError(
            "a run that continues an adapter cannot be changed to fit",
            next_step="Omit --fit, and change micro_batch, length or checkpointing yourself.",
        )
    return fit_config(config, run_rows(config), memory_bytes, world_of(os.environ).size)


def run_rows(config: RunConfig) -> DataSet:
    """Reads and encodes the rows of a run, and cuts rows that are too long. Loads no weights.

    Raises DataError if the run would refuse the rows for another reason.
    """
    tokenizer, model_config = load_tokenizer(config.base)
    capacity = configured_capacity(model_config)
    tokens = bring(tokenizer, config.new_tokens, rows=capacity.tokens)
    data = examine_data(
        config.data.model_copy(update={"long_rows": "cut"}),
        RowRules(
            config.length,
            room_with(capacity, tokens),
            Preamble(variables=config.template.variables),
            kind=config.objective.rows,
            teacher=config.objective.teacher_text(),
            head=config.objective.head,
        ),
        extended(tokenizer, config.new_tokens),
    )
    refuse_unreadable(data.report, config.data.called)
    return data
