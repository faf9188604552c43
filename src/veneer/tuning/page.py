"""Writes tune.html: the verdict, the search and the judging on one page."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any

from veneer.report.html import html_page, section, table
from veneer.report.jobs_page import STYLE, job_sections
from veneer.report.many_jobs import JobRecord
from veneer.tuning.verdict import figure_text, title, verdict
from veneer.wording import between, clock, number

NAME = "tune.html"
SEARCHED = ("learning_rate", "method.lr_ratio", "method.rank", "batch")
"""Settings in which the candidates differ."""


def make_page(result: Mapping[str, Any], jobs: Sequence[JobRecord]) -> str:
    """Returns the HTML text. jobs: the candidates that trained"""
    rows = result["rows"]
    facts = [
        f"on {result['base']}",
        f"{rows['train']} rows to train on, {rows['search']} to search with, {rows['judge']} to"
        " judge with",
        clock(result["seconds"]),
    ]
    header = f"<header><h1>Tuned</h1><p>{escape(' · '.join(facts))}</p></header>"
    words = "".join(f"<p>{escape(line)}</p>" for line in verdict(result))
    body = [
        header,
        section("In words", words, "words"),
        section("Judged once, at the end", _judging(result["judging"])),
        job_sections([_with_searched_settings(job) for job in jobs]),
        section("How this was done", _method(result)),
    ]
    style = STYLE + " .words p { margin: 0 0 10px; max-width: 68ch; }"
    return html_page("Tuned", "".join(body), style)


def _with_searched_settings(job: JobRecord) -> JobRecord:
    """Leaves out settings that follow from others, such as steps."""
    return replace(job, settings={name: job.settings[name] for name in SEARCHED})


def _judging(judging: Mapping[str, Any] | None) -> str:
    if judging is None:
        return ""
    units, against = judging["adapter"]["units"], judging["adapter"]["against"]

    def text(name: str, value: float) -> str:
        return figure_text(value, units.get(name) == "share")

    def signed(name: str, value: float) -> str:
        return ("+" if value > 0 else "") + text(name, value)

    def ends(name: str) -> str:
        low, high = against[name]["interval"] or (None, None)
        if low is None or high is None or units.get(name) != "share":
            return between(low, high)
        return f"{100 * low:.1f} to {100 * high:.1f}%"

    lines = [
        [
            title(name),
            text(name, against[name]["other"]),
            text(name, judging["adapter"][name]),
            signed(name, against[name]["difference"]),
            ends(name),
        ]
        for name in judging["measures"]
    ]
    general = judging["adapter"]["general"]
    low, high = general["forgetting_interval"] or (None, None)
    lines.append(
        [
            "loss on general text",
            number(general["before"]),
            number(general["loss"]),
            number(general["forgetting"]),
            between(low, high),
        ]
    )
    return table(("", "base", "adapter", "difference", "95% interval"), lines, "wide-table")


def _method(result: Mapping[str, Any]) -> str:
    paragraphs = [
        "Rows were divided by content: equal prompts are in one part"
        + (", and so are nearly equal ones." if result["rows"]["by_likeness"] else "."),
        "The search compared settings by their loss on the rows to search with. The rows to judge"
        " with were read once, after the training.",
        "The steps of every setting follow from its measured time, so a smaller batch takes more"
        " steps. Intervals are 95%, over rows.",
        *result["reasons"],
    ]
    return "".join(f"<p>{escape(text)}</p>" for text in paragraphs)
