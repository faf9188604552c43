"""Several runs from one run file: its `jobs:`, or the points of --sweep (sweep_points.py).

    base: smollm2-135m
    data: tickets.jsonl
    jobs:
      - {out: runs/small, method: {rank: 8}}
      - {out: runs/other, data: orders.jsonl, learning_rate: 1e-3}
      - {files: desks/*.jsonl, out: "runs/{name}"}      one job for each file

A job overrides what stands above it, key by key. Flags and --set override both. --sweep makes
several jobs of each, in folders of their own below `out`.

An entry with `files` is a template: for each file that matches, `data.train` is the file, and
`{name}` in the entry's texts is its name without folder and ending.
"""

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
from veneer.data.files.places import KINDS, PACKED, matching_files
from veneer.errors import ConfigError
from veneer.files.home import expanded
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
    _refuse_too_many(len(jobs))
    for job in jobs:
        override(job, flags, sets, columns)
    num_swept = len(jobs)
    if sweep is not None:
        axes = read_axes(sweep, ranges=draws is not None, faults=faults)
        _refuse_too_many((draws or math.prod(len(axis) for axis in axes)) * len(jobs))
        jobs = [
            _at_point(job, point)
            for job in jobs
            for point in (grid(axes) if draws is None else draw(axes, draws, _seed(job), faults))
        ]
    configs = _validate_all(jobs, faults)
    if sweep is not None and not faults:
        faults += _equal_points(configs, len(jobs) // num_swept)
    if faults or above.faults:
        raise ConfigError(
            f"{above.source} do not describe jobs",
            list(dict.fromkeys(above.faults + faults)),
            NEXT_STEP,
        )
    return configs


def _refuse_too_many(count: int) -> None:
    if count > MOST_JOBS:
        raise ConfigError(f"{count:,} jobs are more than {MOST_JOBS}")


def _jobs_of(above: UncheckedSettings, faults: list[str]) -> Iterator[UncheckedSettings]:
    """Yields the settings of each of `jobs`, over a copy of those above; of each file of a
    template."""
    jobs = above.values.pop("jobs")
    if not isinstance(jobs, list) or not jobs:
        faults.append(f"C315 {above.origin(('jobs',))} jobs is a list of jobs, with one at least")
        return
    for number, job in enumerate(jobs):
        path = ("jobs", str(number))
        if not isinstance(job, dict) or "out" not in job:
            faults.append(
                f"C315 {above.origin((*path, 'out'))} job {number + 1} is not a mapping of"
                " settings that names its own folder, out"
            )
            continue
        for values in [job] if "files" not in job else _fill_template(above, path, job, faults):
            settings = UncheckedSettings(copy_values(above.values), dict(above.origins))
            for key, value in _leaves(values):
                settings.put(key, value, above.origin((*path, *key)))
            yield settings


def _fill_template(
    above: UncheckedSettings, path: KeyPath, job: Mapping[Any, Any], faults: list[str]
) -> Iterator[dict[Any, Any]]:
    """Yields the settings of a job for each of the template's files, in the order of the names."""
    pattern, texts = job["files"], {key: value for key, value in job.items() if key != "files"}
    paths = matching_files(expanded(pattern)) if isinstance(pattern, str) else []
    origin = above.origin((*path, "files"))
    if not paths:
        faults.append(f"C315 {origin} files: no file matches {pattern!r}")
    if len(paths) > 1 and "{name}" not in str(job["out"]):
        faults.append(f"C315 {origin} files: write {{name}} in out, for instance runs/{{name}}")
        return
    if not isinstance(texts.setdefault("data", {}), dict):
        faults.append(f"C315 {origin} files: they are the rows, so leave data out, or data.train")
        return
    for file in paths:
        values = _with_name(texts, _stem(file.name))
        yield {**values, "data": {"train": str(file), **values["data"]}}


def _stem(name: str) -> str:
    """Returns a file's name without the endings of files of rows: a for a.jsonl.gz."""
    for ending in (*PACKED, *KINDS):
        name = name.removesuffix(ending)
    return name


def _with_name(value: Any, name: str) -> Any:
    """Replaces {name} in all texts of a value."""
    if isinstance(value, dict):
        return {key: _with_name(inner, name) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_name(inner, name) for inner in value]
    return value.replace("{name}", name) if isinstance(value, str) else value


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


def _equal_points(configs: Sequence[RunConfig], points: int) -> Iterator[str]:
    """Yields a fault for each point of a job that has the settings of an earlier one. points: of
    each job"""
    first: dict[str, RunConfig] = {}
    for number, config in enumerate(configs):
        settings = f"{number // points} {config.model_dump(mode='json', exclude={'out'})}"
        earlier = first.setdefault(settings, config)
        if earlier is not config:
            names = [Path(each.out).name for each in (earlier, config)]
            yield f"C314 --sweep: {names[0]} and {names[1]} are the same settings: keep one"


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
