"""`veneer train` with several jobs, and the table of their results."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from veneer.cli.common import pause_collection, print_json
from veneer.cli.early import check_place, check_run
from veneer.errors import ConfigError, VeneerError
from veneer.report.jobs import (
    JobRecord,
    different_settings,
    equal_tokens,
    ranked,
    read_job,
    short_title,
)
from veneer.report.jobs_page import (
    RESULT_TITLES,
    result_cells,
    setting_cells,
    tokens_note,
    tokens_title,
    write_sweep_page,
)
from veneer.training.config import RunConfig
from veneer.wording import shown, wrapped


def train_jobs(configs: Sequence[RunConfig], args: argparse.Namespace) -> int:
    """Trains all jobs in the same forwards. Raises the faults of all together, before any starts;
    those of single jobs afterwards, with the exit code of the first."""
    refuse_flags(args)
    resume = args.resume is not None
    check_all(configs, resume=resume)
    from veneer.training.output.job_screen import make_job_screens

    names = short_names([config.out for config in configs])
    screens = make_job_screens(names, json=args.json, quiet=args.quiet)
    screens[0].message(f"loading {configs[0].base} for {len(configs)} jobs")
    if args.halving and len({config.batch for config in configs if config.steps}) > 1:
        screens[0].message(
            "halving compares after equal steps, where larger batches have seen more rows: set"
            " epochs instead of steps to compare after equal rows"
        )
    if args.halving and len({(config.steps, config.epochs) for config in configs}) > 1:
        screens[0].message(
            "halving compares after equal shares of the steps: jobs of fewer steps are compared"
            " after fewer rows, and stop more easily"
        )
    with pause_collection():
        from veneer import api
        from veneer.training.supervisor import SuccessiveHalving, halving_shares

    halving = SuccessiveHalving(halving_shares(len(configs))) if args.halving else None
    results = api.train_jobs(configs, resume=resume, screens=screens, supervisor=halving)
    jobs = [read_job(config, result) for config, result in zip(configs, results, strict=True)]
    is_sweep = args.sweep is not None
    page = write_sweep_page(_common_folder(jobs), jobs) if is_sweep else None
    if args.json:
        print_json([result if isinstance(result, dict) else str(result) for result in results])
    elif not args.quiet:
        _print_results(jobs, None if is_sweep else names, page)
    failed = [
        (c.out, r) for c, r in zip(configs, results, strict=True) if isinstance(r, VeneerError)
    ]
    if failed:
        folders = " ".join(out for out, _ in failed)
        raise type(failed[0][1])(
            f"{len(failed)} of {len(configs)} jobs failed",
            [line for out, fault in failed for line in fault.lines_about(out)],
            f"Continue them from their last checkpoints: veneer train --resume {folders}",
        )
    return 0


def _common_folder(jobs: Sequence[JobRecord]) -> Path:
    """Returns the nearest folder around the folders of all jobs."""
    return Path(os.path.commonpath([job.folder.parent for job in jobs]))


def _print_results(
    jobs: Sequence[JobRecord], names: Sequence[str] | None, page: Path | None
) -> None:
    """Prints the table of all jobs, and where the best one and the page are."""
    from veneer.training.output.console import log_console

    console = log_console(stderr=False)
    by_folder = (
        None
        if names is None
        else {str(job.folder): name for job, name in zip(jobs, names, strict=True)}
    )
    order, tokens = ranked(jobs), equal_tokens(jobs)
    lines = job_table(order, tokens, by_folder)
    if tokens is not None:
        lines.append(wrapped(f"  {tokens_note(tokens)}", console.width))
    if page is not None and order[0].loss is not None:
        lines += [f"  best: {shown(order[0].folder)}", f"  page: {shown(page)}"]
    for line in lines:
        console.print(line, soft_wrap=True)


def refuse_flags(args: argparse.Namespace) -> None:
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


def check_all(configs: Sequence[RunConfig], *, resume: bool) -> None:
    """Checks the folders, bases and rows of all jobs. Raises ConfigError with all faults."""
    faults: dict[str, None] = {}
    for config in configs:
        for check in (lambda c: check_place(c, resume=resume), check_run):
            try:
                check(config)
            except VeneerError as fault:
                faults |= dict.fromkeys(fault.lines_about(config.out))
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
    order: Sequence[JobRecord], tokens: int | None, names: Mapping[str, str] | None
) -> list[str]:
    """Returns the lines of a table of jobs: the settings that differ, and the results.

    names: of the jobs, by folder; None: their settings name them, as in a sweep
    """
    columns = different_settings(order)
    head = [] if names is None else ["job"]
    head += [short_title(column, columns) for column in columns] + list(RESULT_TITLES)
    rows = [head if tokens is None else [*head, tokens_title(tokens)]]
    for job in order:
        own = [] if names is None else [shown(names[str(job.folder)])]
        rows.append([*own, *setting_cells(job, columns), *result_cells(job, tokens)])
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
