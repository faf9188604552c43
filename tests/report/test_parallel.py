"""Parallel coordinates, and the figures of jobs side by side."""

import re
from pathlib import Path

from veneer.report.many_jobs import CurvePoint, JobRecord, equal_tokens, ranked, short_title
from veneer.report.parallel import Line, parallel_chart


def job(loss, tokens, reason="done", curve=()):
    return JobRecord(Path("j"), {}, reason, 1, tokens, 1.0, loss, curve=curve)


def test_a_line_crosses_each_axis_at_its_value():
    lines = [Line("a", [1e-4, "lora", 1.0], "a"), Line("b", [1e-2, "<dora>", 3.0], "b")]
    chart = parallel_chart(["rate", "method", "loss"], lines, title="t")
    wide = chart[chart.index("wide") : chart.index("narrow")]
    ends = [
        [float(point.split(",")[1]) for point in points.split()]
        for points in re.findall(r'points="([^"]*)"', wide)
    ]
    assert ends[0][0] > ends[1][0] and ends[0][2] > ends[1][2]  # larger values are higher
    assert "&lt;dora&gt;" in chart and "<dora>" not in chart


def test_values_that_are_all_equal_or_missing_are_drawn():
    lines = [Line("a", [2, 1.0], "a"), Line("b", [None, 1.0], "b")]
    assert parallel_chart(["rank", "loss"], lines, title="t").count("<polyline") == 4
    assert parallel_chart(["loss"], lines, title="t") == ""


def test_equal_tokens_are_those_of_the_shortest_complete_job():
    assert equal_tokens([job(1, 100), job(2, 400), job(3, 10, "halving")]) == 100
    assert equal_tokens([job(1, 100), job(2, 101)]) is None
    curve = [CurvePoint(0, 0, 4.0), CurvePoint(2, 200, 2.0)]
    assert job(2, 200, curve=curve).loss_after(100) == 3.0
    assert job(2, 200, curve=curve).loss_after(300) is None


def test_jobs_without_a_loss_and_failed_jobs_are_last():
    jobs = [job(None, 1, "failed"), job(None, 1), job(2.0, 1), job(1.0, 1)]
    assert ranked(jobs) == [jobs[3], jobs[2], jobs[1], jobs[0]]


def test_jobs_over_different_rows_are_not_compared():
    jobs = [job(None, 1, "failed"), job(2.0, 10), job(1.0, 90)]
    for number, record in enumerate(jobs):
        record.settings["data.train"] = f"{number}.jsonl"
    assert ranked(jobs) == [jobs[1], jobs[2], jobs[0]] and equal_tokens(jobs) is None
    for record in jobs:
        record.settings["data.validation"] = "held-out.jsonl"
    assert ranked(jobs) == [jobs[2], jobs[1], jobs[0]] and equal_tokens(jobs) == 10
    for number, record in enumerate(jobs):
        record.settings["objective.beta"] = 0.1 * (number + 1)
    assert ranked(jobs) == [jobs[1], jobs[2], jobs[0]] and equal_tokens(jobs) is None


def test_a_setting_is_named_by_its_last_part_if_no_other_ends_with_it():
    names = ["method.rank", "batch", "data.format", "other.format"]
    assert [short_title(name, names) for name in names] == ["rank", "batch", *names[2:]]
