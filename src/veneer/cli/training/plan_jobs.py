"""`veneer plan JOBS.yaml`: the plan of jobs that train together."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from veneer.cli.common import make_console, print_json, working
from veneer.cli.training.train_jobs import short_names
from veneer.errors import ConfigError
from veneer.wording import clock, folded, millions, shown, size

if TYPE_CHECKING:
    from veneer.plan.ask import PlanQuestion
    from veneer.plan.joint import JointPlan
    from veneer.training.config import RunConfig

ONE_RUN = ("compare", "kind", "merge", "html", "price")
"""Flags that ask for something about one run."""


def refuse_flags(configs: Sequence[RunConfig], args: Namespace) -> None:
    """Raises ConfigError for flags that jobs cannot take, and for jobs that cannot train
    together."""
    from veneer.training.coordination import require_common_settings
    from veneer.training.processes.world import ALONE

    flags = [f"--{name}" for name in ONE_RUN if getattr(args, name)]
    flags += ["--processes"] * (args.processes > 1)
    if flags:
        raise ConfigError(
            f"{', '.join(flags)}: about one run, and {args.run} lists jobs",
            next_step="Leave them out, or plan one run.",
        )
    require_common_settings(configs, ALONE)


def print_jobs(
    configs: Sequence[RunConfig], questions: Sequence[PlanQuestion], args: Namespace
) -> bool:
    """Plans and prints jobs. Returns False if they cannot train together in this memory."""
    from veneer.plan.joint import plan_together

    with working(f"planning {len(configs)} jobs"):
        plan = plan_together(questions)
    names = short_names([config.out for config in configs])
    if args.json:
        print_json(plan.to_dict([config.out for config in configs]))
    else:
        _print_table(plan, names)
    return plan.fits is not False


def _print_table(plan: JointPlan, names: Sequence[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    console = make_console(wraps=True)
    parts = [shown(plan.rows[0].base), f"{len(names)} jobs", plan.answer.machine.name]
    parts += [f"{size(plan.memory)} of memory"] if plan.memory else []
    console.print(Text(folded(" · ".join(parts), console.width)))
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="dim")
    for title in ("job", "method", "trained", "file", "memory alone", "run alone"):
        justify: Literal["left", "right"] = "left" if title in ("job", "method") else "right"
        table.add_column(title, justify=justify)
    for name, row in zip(names, plan.rows, strict=True):
        table.add_row(
            shown(name),
            row.choice.label,
            millions(row.run.trainable_parameters),
            size(row.run.file_bytes),
            size(row.estimate.needed_bytes),
            "–" if row.run_seconds is None else clock(row.run_seconds),
        )
    console.print(table)
    for line in joint_lines(plan):
        console.print(Text(folded("  " + line, console.width)))
    for note in plan.answer.notes:
        console.print(Text(note, style="dim"))


def joint_lines(plan: JointPlan) -> list[str]:
    """Says what the jobs need together: how many share a forward, memory, and time."""
    count, schedule = len(plan.rows), plan.schedule
    if schedule is None:
        lines = [f"together: {size(plan.at_once)} with the rows of all jobs in one forward"]
        if plan.fits is False:
            lines.append(f"does not fit: {size(plan.least)} even in forwards of one job at a time")
        return lines
    waiting = count - schedule.training
    lines = [
        f"together: {_jobs(schedule.training)} train at the same time, up to {schedule.shared}"
        f" share a forward{f'; {waiting} wait for memory' if waiting else ''}",
        f"memory: at most {size(schedule.peak)}; all rows in one forward {size(plan.at_once)}, one"
        f" job at a time {size(plan.least)}",
    ]
    if plan.run_seconds is not None:
        lines.append(
            f"last adapter after {clock(schedule.seconds)} in {schedule.forwards:,} forwards; one"
            f" after another {clock(plan.run_seconds)}. Start-up and evaluations come on top"
        )
    return lines


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count} jobs"
