"""Writes sweep.html: the jobs of a sweep on one page, in the style of a run's report."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from veneer.files.atomic import write_text
from veneer.report.html import html_page, section, table
from veneer.report.many_jobs import (
    JobRecord,
    different_settings,
    equal_tokens,
    have_same_held_out,
    interval_text,
    ranked,
    setting_text,
    short_title,
    steps_text,
)
from veneer.report.parallel import Line, parallel_chart
from veneer.report.plots import Series, line_chart
from veneer.wording import millions, number

NAME = "sweep.html"
STYLE = (
    " .axis { stroke: var(--soft); } main { max-width: 1000px; } .scroll { overflow-x: auto; }"
    " .wide-table td, .wide-table th { white-space: nowrap; width: auto; padding-right: 16px; }"
    " .wide-table td:first-child, .wide-table td:nth-child(3) { width: auto; color: var(--ink); }"
    " svg polyline.line.quiet { stroke-width: 1.5; }"
)
COLOURS = {
    "best": "a",
    "trained to the end": "b",
    "stopped by halving": "quiet",
    "not finished": "quiet",
}


def write_sweep_page(folder: Path, jobs: Sequence[JobRecord]) -> Path:
    """Writes the page into a folder, replacing an older one; returns its path."""
    title = f"Sweep of {len(jobs)} jobs"
    place = f"<p>{escape(str(folder))}</p>"
    header = f"<header><h1>{escape(title)}</h1>{place}</header>"
    write_text(folder / NAME, html_page(title, header + job_sections(jobs), STYLE), replace=True)
    return folder / NAME


def job_sections(jobs: Sequence[JobRecord]) -> str:
    """Returns the sections of a page: held-out curves, parallel coordinates, and a table."""
    order = ranked(jobs)
    tokens = equal_tokens(order)
    by_tokens = _curves(order, by_tokens=True) if tokens is not None else ""
    note = f"<p>{escape(tokens_note(tokens))}</p>" if by_tokens and tokens is not None else ""
    return "".join(
        [
            section("Held-out loss", _curves(order, by_tokens=False)),
            section("Held-out loss after equal tokens", by_tokens + note),
            section("Settings and result", _coordinates(order)),
            section("All jobs", job_table(order, tokens)),
        ]
    )


def tokens_note(tokens: int) -> str:
    return (
        "With the same number of steps a larger batch sees more rows. The figures after"
        f" {millions(tokens)} tokens compare all jobs after equally many."
    )


def group_of(job: JobRecord, order: Sequence[JobRecord]) -> str:
    """Returns the name of the job's group in the legend. No job is the best if their losses do not
    compare. order: as of `ranked`"""
    is_first = job is order[0] and job.reason != "failed"
    if is_first and have_same_held_out(order):
        return "best"
    if job.reason in ("failed", "interrupted"):
        return "not finished"
    return "stopped by halving" if job.reason == "halving" else "trained to the end"


def _curves(order: Sequence[JobRecord], *, by_tokens: bool) -> str:
    lines = [
        Series(
            job_name(job, order),
            [(point.tokens if by_tokens else point.step, point.loss) for point in job.curve],
            COLOURS[group_of(job, order)],
            marks=True,
            group=group_of(job, order),
        )
        for job in reversed(order)
    ]
    return line_chart(
        lines,
        title="Held-out loss",
        x_label="tokens" if by_tokens else "step",
        y_label="held-out loss, nats per trained token",
    )


def _coordinates(order: Sequence[JobRecord]) -> str:
    names = different_settings(order)
    titles = [short_title(name, names) for name in names]
    lines = [
        Line(
            job_name(job, order),
            [*(_axis_value(job.settings.get(name)) for name in names), job.loss],
            COLOURS[group_of(job, order)],
        )
        for job in reversed(order)
        if job.loss is not None
    ]
    return parallel_chart([*titles, "held-out loss"], lines, title="Settings and held-out loss")


def _axis_value(value: object) -> object:
    return value if value is None or isinstance(value, int | float) else setting_text(value)


def job_name(job: JobRecord, jobs: Sequence[JobRecord]) -> str:
    """Names a job by the settings in which the jobs differ."""
    names = different_settings(jobs)
    parts = [f"{short_title(name, names)} {setting_text(job.settings.get(name))}" for name in names]
    return ", ".join(parts) or job.folder.name


def job_table(order: Sequence[JobRecord], tokens: int | None) -> str:
    names = different_settings(order)
    head = [*(short_title(name, names) for name in names), *RESULT_TITLES]
    head += [] if tokens is None else [tokens_title(tokens)]
    rows = [[*setting_cells(job, names), *result_cells(job, tokens)] for job in order]
    return table(head, rows, "wide-table")


RESULT_TITLES = ("steps", "tokens", "held out", "95% interval")


def tokens_title(tokens: int) -> str:
    return f"at {millions(tokens)}"


def setting_cells(job: JobRecord, names: Sequence[str]) -> list[str]:
    return [setting_text(job.settings.get(name)) for name in names]


def result_cells(job: JobRecord, tokens: int | None) -> list[str]:
    """Returns the cells under RESULT_TITLES, and with tokens the loss after so many."""
    if job.reason == "failed":
        cells = ["failed", "", "", ""]
    else:
        cells = [steps_text(job), millions(job.tokens), number(job.loss), interval_text(job)]
    return cells if tokens is None else [*cells, number(job.loss_after(tokens))]
