"""What a step's time went into, as a run of several processes writes it down."""

from __future__ import annotations

import json

import pytest

from tests.processes.test_processes import RUNS, settings, told, world
from veneer.train.records import read_records

__all__ = ["world"]


def test_a_step_says_what_its_time_went_into(world):
    jobs = [
        {"config": settings(world, world / name, **RUNS["lora"], shard=name == "shards")} for name in ("a", "shards")
    ]
    assert told(jobs, 2) == [["done"] * 2] * 2
    for name, parts in (("a", ["compute", "wait", "reduce"]), ("shards", ["compute", "wait", "reduce", "gather"])):
        steps = [record for record in read_records(world / name / "metrics.jsonl") if record["kind"] == "step"]
        for record in steps:
            assert list(record["parts"]) == parts and min(record["parts"].values()) > 0
        summary = json.loads((world / name / "summary.json").read_text())
        timed = {part: sum(record["parts"][part] for record in steps[1:]) for part in parts}
        assert summary["seconds_by_part"] == pytest.approx(timed)
        assert sum(timed.values()) == pytest.approx(summary["seconds"], rel=0.5)  # the mean of all, and the leader's
