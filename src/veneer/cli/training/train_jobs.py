"""`veneer train` with several jobs, and the table of their results."""

from __future__ import annotations

import os
import shlex
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.cli.common import pause_collection, print_json
from veneer.cli.early import check_place, check_run
from veneer.cli.training.file_jobs import FileJob, stopped_at_once
from veneer.errors import ConfigError, RunInterrupted, VeneerError
from veneer.library.folder import default_folder
from veneer.library.names import name_of_run
from veneer.report.jobs_page import (
    RESULT_TITLES,
    result_cells,
    setting_cells,
    tokens_note,
    tokens_title,
    write_sweep_page,
)
from veneer.report.many_jobs import (
    JobRecord,
    different_settings,
    equal_tokens,
    have_same_held_out,
    ranked,
    read_job,
    short_title,
)
from veneer.training.config import RunConfig
from veneer.training.output.console import log_console
from veneer.wording import shown, wrapped

if TYPE_CHECKING:
    from veneer.library.library import Library

Result = Mapping[str, Any] | VeneerError
"""The content of a job's summary.json, or the error that ended it."""


def train_jobs(jobs: Sequence[FileJob], args: Namespace, library: Library | None) -> int:
    """Trains all jobs that are not finished in the same forwards.

    Raises the faults of all jobs together, before any starts; those of single jobs afterwards,
    with the exit code of the first.
    """
    refuse_flags(args)
    left = [job for job in jobs if job.summary is None]
    if args.halving:
        refuse_unequal([job.config for job in left])
    check_all(left)
    console, names = log_console(stderr=args.json), short_names([job.config.out for job in jobs])
    for line in [] if args.quiet else _first_lines(jobs, left, halving=args.halving):
        console.print(wrapped(line, console.width), soft_wrap=True)
    results: dict[str, Result] = {
        job.config.out: job.summary for job in jobs if job.summary is not None
    }
    if library is not None:
        for out in results:
            library.add(out, name=name_of_run(out))
    if left:
        names_left = [name for job, name in zip(jobs, names, strict=True) if job.summary is None]
        results |= _train(names_left, left, args, library)
    records = [read_job(job.config, results[job.config.out]) for job in jobs]
    is_sweep = args.sweep is not None
    page = write_sweep_page(_common_folder(records), records) if is_sweep else None
    if args.json:
        in_order = [results[job.config.out] for job in jobs]
        print_json([r if isinstance(r, Mapping) else str(r) for r in in_order])
    elif not args.quiet:
        _print_results(records, None if is_sweep else names, page, library)
    _raise_failures(results, args)
    return 0


def _train(
    names: Sequence[str], jobs: Sequence[FileJob], args: Namespace, library: Library | None
) -> dict[str, Result]:
    """Trains jobs in the same forwards; returns their results by folder."""
    with pause_collection():
        from veneer import api
        from veneer.training.output.job_screen import make_job_screens
        from veneer.training.supervisor import SuccessiveHalving, halving_shares

    try:
        results = api.train_jobs(
            [job.config for job in jobs],
            resume=[job.resume for job in jobs],
            screens=make_job_screens(names, json=args.json, quiet=args.quiet),
            supervisor=SuccessiveHalving(halving_shares(len(jobs))) if args.halving else None,
            library=library,
        )
    except RunInterrupted as interrupted:
        raise RunInterrupted(
            interrupted.headline, interrupted.faults, f"Continue with: {_command_again(args)}"
        ) from None
    except KeyboardInterrupt:
        raise stopped_at_once(_command_again(args)) from None
    return {job.config.out: result for job, result in zip(jobs, results, strict=True)}


def _first_lines(
    jobs: Sequence[FileJob], left: Sequence[FileJob], *, halving: bool
) -> Iterator[str]:
    """Yields lines to show before the jobs are loaded."""
    finished = len(jobs) - len(left)
    yield f"loading {shown(jobs[0].config.base)} for {len(left)} jobs" + (
        f"; {finished} are finished" if finished else ""
    )
    configs = [job.config for job in left]
    if halving and len({config.batch for config in configs if config.steps}) > 1:
        yield (
            "halving compares after equal steps, where larger batches have seen more rows: set"
            " epochs instead of steps to compare after equal rows"
        )


def _raise_failures(results: Mapping[str, Result], args: Namespace) -> None:
    """Raises one error with those of all jobs that failed."""
    failed = {out: fault for out, fault in results.items() if isinstance(fault, VeneerError)}
    if failed:
        raise type(next(iter(failed.values())))(
            f"{len(failed)} of {len(results)} jobs failed",
            [line for out, fault in failed.items() for line in fault.lines_about(out)],
            "Correct their settings or rows. From their last checkpoints they continue with: "
            + _command_again(args, failed),
        )


def _command_again(args: Namespace, folders: Iterable[str] = ()) -> str:
    """Returns the command that goes on with the jobs that are not finished.

    folders: of these jobs, if only some can go on
    """
    dropped = {"--resume", "--halving", *(args.resume or ())}
    words = [
        word for word in args.words[1:] if word not in dropped and not word.startswith("--resume=")
    ]
    resumed = [] if args.run is not None else folders or args.resume
    return shlex.join(["veneer", "train", *words, "--resume", *resumed])


def _common_folder(jobs: Sequence[JobRecord]) -> Path:
    """Returns the nearest folder around the folders of all jobs."""
    return Path(os.path.commonpath([job.folder.parent for job in jobs]))


def _print_results(
    jobs: Sequence[JobRecord],
    names: Sequence[str] | None,
    page: Path | None,
    library: Library | None,
) -> None:
    """Prints the table of all jobs, and where the best one, the page and the library are."""
    console = log_console(stderr=False)
    by_folder = (
        None
        if names is None
        else {str(job.folder): name for job, name in zip(jobs, names, strict=True)}
    )
    order, tokens = ranked(jobs), equal_tokens(jobs)
    lines = job_table(order, tokens, by_folder, width=console.width)
    if tokens is not None:
        lines.append(wrapped(f"  {tokens_note(tokens)}", console.width))
    if page is not None and order[0].loss is not None:
        if have_same_held_out(jobs):
            lines.append(f"  best: {shown(order[0].folder)}")
        lines.append(f"  page: {shown(page)}")
    if library is not None:
        place = "" if library.folder == default_folder() else f" --library {library.folder}"
        base = jobs[0].settings["base"]
        lines.append(f"next: veneer serve --base {shown(base)}{shown(place)}")
    for line in lines:
        console.print(line, soft_wrap=True)


def refuse_flags(args: Namespace) -> None:
    """Raises ConfigError for flags that several jobs cannot take."""
    if args.processes is not None or os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "several processes compute one run at a time, and these are several jobs",
            next_step="Leave --processes out, or train the jobs one after the other.",
        )
    if args.fit:
        raise ConfigError(
            "--fit changes the settings of one run, and these are several jobs",
            next_step="Leave --fit out; `veneer plan` shows what one job needs.",
        )


def refuse_unequal(configs: Sequence[RunConfig]) -> None:
    """Raises ConfigError if jobs would be compared after unequal steps that are unequal rows, too.

    Rungs are shares of a job's steps.
    """
    asked = {(config.steps, config.epochs) for config in configs}
    rows = {None if config.steps is None else config.steps * config.batch for config in configs}
    if len(asked) > 1 and (len(rows) > 1 or None in rows):
        raise ConfigError(
            "--halving compares jobs after equal shares of their steps, and theirs are different"
            " numbers of rows",
            [
                f"{config.out}: steps {config.steps}, epochs {config.epochs}, batch {config.batch}"
                for config in configs
            ],
            "Give all jobs the same steps or epochs, or leave --halving out.",
        )


def check_all(jobs: Sequence[FileJob]) -> None:
    """Checks the folders, bases and rows of all jobs. Raises ConfigError with all faults."""
    faults: dict[str, None] = {}
    for job in jobs:
        place = partial(check_place, job.config, resume=job.resume)
        for check in (place, partial(check_run, job.config)):
            try:
                check()
            except VeneerError as fault:
                faults |= dict.fromkeys(fault.lines_about(job.config.out))
    if faults:
        raise ConfigError(
            "not all jobs can start, so none was started",
            list(faults),
            "Correct these jobs, or leave them out.",
        )


def short_names(folders: Sequence[str]) -> list[str]:
    """Names jobs by their folders, without the part that all have in common."""
    paths = [Path(folder).absolute() for folder in folders]
    common = Path(os.path.commonpath(paths))
    return [str(path.relative_to(common)) if path != common else path.name for path in paths]


def job_table(
    order: Sequence[JobRecord], tokens: int | None, names: Mapping[str, str] | None, *, width: int
) -> list[str]:
    """Returns the lines of a table of jobs: the settings that differ, and the results.

    names: of the jobs, by folder; None: their settings name them, as in a sweep. If the table is
    wider than that, columns are left out: where jobs have names, their widest settings first.
    """
    settings = different_settings(order)
    titles = [short_title(name, settings) for name in settings]
    results = RESULT_TITLES if tokens is None else (*RESULT_TITLES, tokens_title(tokens))
    rows = [[*titles, *results]]
    rows += [[*setting_cells(job, settings), *result_cells(job, tokens)] for job in order]
    columns = [list(column) for column in zip(*rows, strict=True)]
    may_leave = [columns[len(titles) + 1]]  # the tokens
    if names is not None:
        may_leave = sorted(columns[: len(titles)], key=_width_of, reverse=True) + may_leave
        columns.insert(0, ["job", *(shown(names[str(job.folder)]) for job in order)])
    for column in may_leave:
        if sum(2 + _width_of(other) for other in columns) > width:
            columns.remove(column)
    padded = [[cell.ljust(_width_of(column)) for cell in column] for column in columns]
    return ["  " + "  ".join(row).rstrip() for row in zip(*padded, strict=True)]


def _width_of(column: Sequence[str]) -> int:
    return max(map(len, column))
