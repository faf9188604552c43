"""Which jobs of several are ranked by their held-out losses."""

from pathlib import Path

import pytest

from veneer.errors import VeneerError
from veneer.report.jobs_page import job_sections
from veneer.report.many_jobs import CurvePoint, JobRecord, have_same_held_out, read_job
from veneer.training.config import RunConfig

OWN_ROWS = {"data": {"validation": "held.jsonl"}}


def compare(common, first, second):
    """Returns whether the held-out losses of jobs with these settings compare."""
    jobs = []
    for own in (first, second):
        data = {"train": "rows.jsonl", **common.get("data", {}), **own.get("data", {})}
        config = RunConfig.model_validate({"base": "b", "out": "o", **common, **own, "data": data})
        jobs.append(read_job(config, VeneerError("ended")))
    return have_same_held_out(jobs)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"data": {"train": "a.jsonl"}}, {"data": {"train": "b.jsonl"}}),
        ({"data": {"validation_share": 0.1}}, {"data": {"validation_share": 0.4}}),
        ({"data": {"train_on": "assistant"}}, {"data": {"train_on": "all"}}),
        ({"data": {"map": {"q": "prompt"}}}, {"data": {"map": {"question": "prompt"}}}),
        ({"data": {"format": "alpaca"}}, {"data": {"format": "text"}}),
        ({"data": {"long_rows": "cut"}}, {"data": {"long_rows": "drop"}}),
        (
            {"length": 30, "data": {"long_rows": "cut"}},
            {"length": 60, "data": {"long_rows": "cut"}},
        ),
        ({"new_tokens": []}, {"new_tokens": ["order("]}),
        ({"template": {"variables": {"a": 1}}}, {"template": {"variables": {"a": 2}}}),
        ({"objective": {"name": "dpo", "beta": 0.1}}, {"objective": {"name": "dpo", "beta": 0.2}}),
    ],
)
def test_losses_over_other_rows_or_tokens_do_not_compare(first, second):
    assert not compare({}, first, second)


@pytest.mark.parametrize(
    ("common", "first", "second"),
    [
        ({}, {"learning_rate": 1e-3, "seed": 1}, {"learning_rate": 1e-2, "method": "dora"}),
        ({}, {"length": 30}, {"length": 60}),  # a row that is too long is refused
        ({}, {"data": {"tokens": "memory"}}, {"data": {"tokens": "files"}}),
        (OWN_ROWS, {"data": {"train": "a.jsonl"}}, {"data": {"train": "b.jsonl"}}),
        (OWN_ROWS, {"data": {"validation_share": 0.1}}, {"data": {"validation_share": 0.4}}),
    ],
)
def test_losses_over_the_same_rows_compare_whatever_was_trained(common, first, second):
    assert compare(common, first, second)


@pytest.mark.parametrize(
    ("setting", "values", "reason", "has_best"),
    [
        ("learning_rate", (1e-3, 1e-2), "done", True),
        ("objective.beta", (0.1, 0.5), "done", False),
        ("data.train", ("a.jsonl", "b.jsonl"), "done", False),
        ("learning_rate", (1e-3, 1e-2), "failed", False),
    ],
)
def test_a_page_names_a_job_best_only_if_the_jobs_compare(setting, values, reason, has_best):
    jobs = [
        JobRecord(
            Path(str(value)),
            {setting: value},
            reason,
            loss=loss,
            curve=[CurvePoint(step, 10 * step, loss + 1 / step) for step in (1, 2)],
        )
        for value, loss in zip(values, (3.0, 2.0), strict=True)
    ]
    page = job_sections(jobs)
    assert "polyline" in page
    assert (">best</span>" in page) == has_best
