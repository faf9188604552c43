"""Several runs from one run file: its `jobs:`, or the points of --sweep (sweep_points.py).

    base: smollm2-135m
    data: tickets.jsonl
    jobs:
      - {out: runs/small, method: {rank: 8}}
      - {out: runs/other, data: orders.jsonl, learning_rate: 1e-3}

A job overrides what stands above it, key by key. Flags and --set override both. --sweep makes
several jobs of each, in folders of their own below `out`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.cli.config_file import (
    FLAGS,
    UncheckedSettings,
    copy_values,
    override,
    put_yaml,
    validate,
)
from veneer.cli.sweep_points import Point, draw, grid, read_axes
from veneer.errors import ConfigError
from veneer.training.config import RunConfig
from veneer.vocabulary import KeyPath

MOST_JOBS = 256
"""Most jobs of one command: beyond that a sweep is a typing error."""
NEXT_STEP = "`veneer explain settings` lists the settings."


def read_jobs(
    above: UncheckedSettings,
    flags: Mapping[str, Any],
    sets: Sequence[str],
    columns: Mapping[str, str | None],
    sweep: Sequence[str] | None,
    draws: int | None = None,
) -> list[RunConfig] | None:
    """Reads the settings of every job; None if neither the file nor a sweep asks for several.

    above: settings of the run file, with its `jobs`. draws: random points of the sweep for each
    job, by the job's seed; None: every combination.
    Raises ConfigError with every fault of all jobs.
    """
    lists_jobs = "jobs" in above.values
    if not lists_jobs and sweep is None:
        return None
    faults: list[str] = []
    jobs = list(_jobs_of(above, faults)) if lists_jobs else [above]
    if lists_jobs and flags.get("out") is not None:
        faults.append("C315 --out: each job names its own folder, out, in the run file")
        flags = {**flags, "out": None}
    for job in jobs:
        override(job, flags, sets, columns)
    if sweep is not None:
        axes = read_axes(sweep, ranges=draws is not None, faults=faults)
        count = (draws or math.prod(len(axis) for axis in axes)) * len(jobs)
        if count > MOST_JOBS:
            raise ConfigError(f"{count:,} jobs are more than {MOST_JOBS}")
        jobs = [
            _at_point(job, point)
            for job in jobs
            for point in (grid(axes) if draws is None else draw(axes, draws, _seed(job), faults))
        ]
    configs = _validate_all(jobs, faults)
    if faults or above.faults:
        raise ConfigError(
            f"{above.source} do not describe jobs",
            list(dict.fromkeys(above.faults + faults)),
            NEXT_STEP,
        )
    return configs


def _jobs_of(above: UncheckedSettings, faults: list[str]) -> Iterator[UncheckedSettings]:
    """Yields the settings of each of `jobs`, over a copy of those above."""
    jobs = above.values.pop("jobs")
    if not isinstance(jobs, list) or not jobs:
        faults.append(f"C315 {above.origin(('jobs',))} jobs is a list of jobs, with one at least")
        return
    for number, job in enumerate(jobs):
        path = ("jobs", str(number))
        settings = UncheckedSettings(copy_values(above.values), dict(above.origins))
        if not isinstance(job, dict) or "out" not in job:
            faults.append(
                f"C315 {above.origin((*path, 'out'))} job {number + 1} is not a mapping of"
                " settings that names its own folder, out"
            )
            continue
        for key, value in _leaves(job):
            settings.put(key, value, above.origin((*path, *key)))
        yield settings


def _leaves(values: Mapping[Any, Any], path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yields the path and value of each setting; a method's name before its settings.

    `method: dora` and `data: FILE` are the name and the file, as for flags.
    """
    short_forms: dict[KeyPath, KeyPath] = {("method",): FLAGS["method"], ("data",): FLAGS["data"]}
    for key, value in sorted(values.items(), key=lambda item: item[0] != "name"):
        inner = (*path, str(key))
        if isinstance(value, dict) and value:
            yield from _leaves(value, inner)
        else:
            yield short_forms.get(inner, inner), value


def _seed(job: UncheckedSettings) -> int:
    """Returns the seed of a job; a seed that is no number is a fault that `validate` reports."""
    seed = str(job.values.get("seed", 0))  # a flag's value is still a text
    return int(seed) if seed.isdecimal() else 0


def _at_point(job: UncheckedSettings, point: Point) -> UncheckedSettings:
    """Returns a job's settings at a point of the sweep, in a folder named after it."""
    settings = UncheckedSettings(copy_values(job.values), dict(job.origins), list(job.faults))
    for name, path, text in point:
        put_yaml(settings, path, text, f"--sweep {name}={text}")
    folder = "_".join(f"{name}-{_file_name(text)}" for name, _, text in point)
    if isinstance(out := settings.values.get("out"), str):
        settings.put(("out",), str(Path(out) / folder), settings.origin(("out",)))
    return settings


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", text).strip("-")


def _validate_all(jobs: Sequence[UncheckedSettings], faults: list[str]) -> list[RunConfig]:
    """Checks every job; faults that not all jobs have name the job."""
    configs, faults_of_jobs = [], []
    for job in jobs:
        config, own_faults = validate(job)
        faults_of_jobs.append(job.faults + own_faults)
        if config is not None:
            configs.append(config)
    for job, own_faults in zip(jobs, faults_of_jobs, strict=True):
        for fault in own_faults:
            is_common = all(fault in others for others in faults_of_jobs)
            faults.append(fault if is_common else f"{fault} (job {job.values.get('out')})")
    return configs
