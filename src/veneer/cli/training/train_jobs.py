"""`veneer train` with several jobs, and the table of their results."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.cli.common import pause_collection, print_json
from veneer.cli.early import check_place, check_run
from veneer.errors import ConfigError, VeneerError
from veneer.training.config import RunConfig
from veneer.wording import number, shown

MOST_SETTINGS = 5
"""Most settings that the table shows."""


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
    with pause_collection():
        from veneer import api

    results = api.train_jobs(configs, resume=resume, screens=screens)
    if args.json:
        print_json([result if isinstance(result, dict) else str(result) for result in results])
    elif not args.quiet:
        from veneer.training.output.console import log_console

        for line in job_table(names, configs, results):
            log_console(stderr=False).print(line, soft_wrap=True)
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
    names: Sequence[str],
    configs: Sequence[RunConfig],
    results: Sequence[Mapping[str, Any] | VeneerError],
) -> list[str]:
    """Returns a table of the jobs: the settings that differ, and what came of each; the lowest
    held-out loss first."""
    settings = [flat_settings(config) for config in configs]
    columns = _different_settings(settings)
    rows = [["job", *columns, "steps", "loss", "held out", "95% interval"]]
    order = sorted(range(len(names)), key=lambda n: _rank(results[n]))
    for n in order:
        own = [_cell(settings[n].get(column)) for column in columns]
        rows.append([shown(names[n]), *own, *_outcome(results[n])])
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def flat_settings(config: RunConfig) -> dict[str, Any]:
    """Returns the settings of a run by dotted names, without its folder."""
    from veneer.training.output.loggers import flat

    return flat(config.model_dump(mode="json", exclude={"out"}))


def _different_settings(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for values in settings for name in values)
    different = [name for name in names if len({repr(values.get(name)) for values in settings}) > 1]
    return different[:MOST_SETTINGS]


def _rank(result: Mapping[str, Any] | VeneerError) -> tuple[bool, bool, float]:
    """Sorts results: by held-out loss, those without one behind them, failed jobs last."""
    if isinstance(result, VeneerError):
        return True, True, 0.0
    loss = result["validation_loss"]
    return False, loss is None, result["last_loss"] if loss is None else loss


def _outcome(result: Mapping[str, Any] | VeneerError) -> list[str]:
    if isinstance(result, VeneerError):
        return ["", "", "failed", ""]
    figures = (result["held_out"] or {}).get("loss") or {}
    low, high = figures.get("low"), figures.get("high")
    interval = "" if low is None or high is None else f"{number(low)} to {number(high)}"
    steps = str(result["steps"]) + (" (early)" if result["reason"] == "early_stop" else "")
    return [steps, number(result["last_loss"]), number(result["validation_loss"]), interval]


def _cell(value: Any) -> str:
    return "" if value is None else shown(f"{value:g}" if isinstance(value, float) else value)
