"""Runs of a run file that is trained again with --resume: finished, begun, or new.

A run that has begun goes on with the settings in its folder. The run file and the flags must not
ask for others.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from veneer.cli.config_file import read_run_config
from veneer.data.files.places import absolute
from veneer.data.teacher_text import absolute_path
from veneer.errors import ConfigError, RunInterrupted
from veneer.files.home import absolute_if_exists
from veneer.files.strict_json import read_json, validated
from veneer.library.names import is_name, name_of_run
from veneer.training.config import RunConfig, like_begun
from veneer.training.output.loggers import flat

if TYPE_CHECKING:
    from veneer.library.library import Library

MAY_DIFFER = {"out", "base", "device", "log", "keep", "show_answers", "micro_batch"}
"""Settings that need not be those of the folder: where things are, and how they are computed."""


@dataclass(frozen=True)
class FileJob:
    """A run of a run file. resume: whether it has begun. summary: of a finished run, else None."""

    config: RunConfig
    resume: bool
    summary: Mapping[str, Any] | None = None


def stopped_at_once(command: str) -> RunInterrupted:
    """Returns the error after Ctrl-C before step 1, or after a second one. command: that goes on"""
    return RunInterrupted(
        "stopped at once; checkpoints of earlier steps are kept",
        next_step=f"Continue with: {command}",
    )


class _Interval(BaseModel):
    low: float | None = None
    high: float | None = None


class _HeldOut(BaseModel):
    loss: _Interval | None = None


class _Summary(BaseModel):
    """The fields of a summary.json that the table of all jobs shows."""

    reason: str
    steps: int
    last_loss: float | None
    validation_loss: float | None
    held_out: _HeldOut | None = None


def new_jobs(configs: Sequence[RunConfig]) -> list[FileJob]:
    return [FileJob(config, resume=False) for config in configs]


def begun_jobs(configs: Sequence[RunConfig]) -> list[FileJob]:
    """Reads how far each run is. Raises ConfigError with every setting that differs."""
    jobs, faults = list[FileJob](), list[str]()
    for config in configs:
        file = Path(config.out) / "run.yaml"
        if not file.is_file():
            jobs.append(FileJob(config, resume=False))
            continue
        begun = read_run_config(file, {"out": config.out})
        faults += [f"{config.out}: {difference}" for difference in _differences(config, begun)]
        jobs.append(FileJob(begun, resume=True, summary=_read_summary(Path(config.out))))
    if faults:
        raise ConfigError(
            "these runs were begun with other settings",
            faults,
            "Write the settings as they were, or give these runs another out.",
        )
    pairs = zip(configs, jobs, strict=True)
    if (pair := next(((given, job.config) for given, job in pairs if job.resume), None)) is None:
        return jobs
    return [replace(job, config=like_begun(job.config, *pair)) for job in jobs]


def find_library(args: Namespace, configs: Sequence[RunConfig]) -> Library | None:
    """Returns the library of --library, None without it.

    Raises ConfigError if a run has no adapter, or no folder that gives the adapter a name.
    """
    if args.library is None:
        return None
    from veneer.library.library import Library

    library, faults = Library(args.library or None), list[str]()
    library.require_place()
    names = [name_of_run(config.out) for config in configs]
    for config, name in zip(configs, names, strict=True):
        if config.method.trains_base:
            faults.append(f"{config.out}: method {config.method.name} makes no adapter")
        elif names.count(name) > 1:
            faults.append(f"{config.out}: another job's folder has the name {name}, too")
        elif not is_name(name):
            faults.append(f"{config.out}: an adapter in a library cannot be named {name!r}")
    if faults:
        raise ConfigError(
            "--library names each adapter after its folder",
            faults,
            "Give these jobs other folders: lower-case names, with dashes.",
        )
    return library


def _read_summary(out: Path) -> dict[str, Any] | None:
    file = out / "summary.json"
    if not file.is_file():
        return None
    summary = read_json(file)
    validated(
        _Summary,
        summary,
        f"{file} does not hold a run's result",
        "Remove it, and --resume writes it again.",
    )
    return summary


def _differences(config: RunConfig, begun: RunConfig) -> list[str]:
    """Lists the settings that the run file gives and that the run does not have.

    Where the run file leaves a setting open, the folder has what the run chose. `length` is at most
    the number of positions of the base.
    """
    asked, has = _settings(config), _settings(begun)
    if config.length > begun.length:
        asked.pop("length", None)
    return [
        f"{name} is {value!r} now, and was {has.get(name)!r}"
        for name, value in asked.items()
        if value not in (None, "auto") and value != has.get(name)
    ]


def _settings(config: RunConfig) -> dict[str, Any]:
    """Returns the settings by dotted name, with absolute names of rows, files and adapters, as a
    run that has begun writes them."""
    dump = config.model_dump(mode="json", exclude=MAY_DIFFER, exclude_unset=True)
    settings = flat({**dump, "data": {**dump["data"], "train": None, "validation": None}})
    for name, sets in (
        ("train", config.data.train_sets),
        ("validation", config.data.validation_sets),
    ):
        settings[f"data.{name}"] = [(absolute(rows.path), rows.share, rows.weight) for rows in sets]
    for name, place in _PLACES.items():
        if settings.get(name) is not None:
            settings[name] = place(settings[name])
    if config.from_adapter:
        settings["from_adapter"] = [
            (_adapter_folder(parent.adapter), parent.weight) for parent in config.from_adapter
        ]
    return settings


def _adapter_folder(named: str) -> str:
    """Returns the absolute folder of an adapter that is a folder or a name in the library."""
    if Path(named).is_absolute() and not Path(named).exists():
        return named  # of a run that is finished
    from veneer.library.library import Library

    return str(Library().locate(named).absolute())


_PLACES: Mapping[str, Callable[[str], str]] = {
    "replay.rows": absolute,
    "objective.document": absolute_path,
    "objective.tools": absolute_path,
    "objective.teacher": _adapter_folder,
    "objective.teacher.base": absolute_if_exists,
    "objective.teacher.adapter": _adapter_folder,
}
"""What makes the settings that name files or adapters absolute."""
