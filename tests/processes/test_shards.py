"""A base in shards gives what a whole one gives, to the bit, whoever holds what."""

from __future__ import annotations

import json

import pytest
import torch

from tests.processes.test_processes import RUNS, losses, run_processes, settings, values, world
from tests.soak.counts import rounds
from tests.support.models.packed_folders import write_gptq
from tests.support.tiny import save_tiny
from veneer.errors import ConfigError
from veneer.training.config import RunConfig
from veneer.training.output.records import read_records
from veneer.training.processes.assignment import group_by_cost

__all__ = ["world"]
SHARDED = {
    "lora": {**RUNS["lora"], "show_answers": True, "learning_rate": None},  # the weights give it
    "dora nf4": RUNS["dora nf4"],
    "full": {
        "show_answers": True,
        "method": {"name": "full"},
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "clip": None,
        "reduce": "plain",
        "batch": 4,
    },
    "prefix": RUNS["prefix"],
    "bottleneck": {**RUNS["bottleneck"], "show_answers": True},
    "olora": {
        "method": {"name": "lora", "rank": 2, "init": "olora", "train_modules": ["norm"]},
        "micro_batch": 3,
    },
    "full bfloat16": {
        **RUNS["full"],
        "checkpointing": True,
        "show_answers": True,
        "clip": None,
        "reduce": "plain",
        "batch": 4,
    },
    "lora gptq": {"method": {"name": "lora", "rank": 2}, "base": "gptq"},
}
"""Full fine-tuning: one micro-batch on each of two processes, so that a sum has one order."""


WHOLE = pytest.mark.skipif(not rounds("shards", ci=0), reason="starts many processes: make soak")
HERE = {name: SHARDED[name] for name in [*SHARDED][: len(rounds("shards", ci=3))]}
ON_TWO = [name for name in HERE if name.startswith("full")]
FAILING = ["lora", "full"][: len(rounds("shards", ci=1))]
HERE["many full"] = {**SHARDED["full"], "batch": 7, "clip": 0.5}


@pytest.fixture(scope="module")
def said(world):
    """What each of two processes said, by the run's name: runs over a sharded base, one over a
    whole base, and runs in which the second process fails. The same runs over a whole base are
    computed by one process, or by two if the base trains."""
    write_gptq(save_tiny(world / "gptq"))
    for own in HERE.values():
        own.update({"base": str(world / own["base"])} if "base" in own else {})
    whole = {
        name: {"config": settings(world, world / "whole" / name, **own)}
        for name, own in HERE.items()
    }
    alone = [job for name, job in whole.items() if name not in ON_TWO]
    assert run_processes(alone, 1) == [["done"] * len(alone)]
    jobs = {f"whole {name}": whole[name] for name in HERE if name in ON_TWO}
    jobs |= {
        name: {"config": settings(world, world / "shards" / name, **own, shard=True)}
        for name, own in HERE.items()
    }
    jobs["together"] = {"config": settings(world, world / "together", **SHARDED["lora"])}
    for name in FAILING:
        run = settings(world, world / "failed" / name, **SHARDED[name], shard=True)
        jobs[f"failing {name}"] = {"config": run, "at": {"step": 1, "rank": 1, "does": "fail"}}
    return dict(zip(jobs, zip(*run_processes([*jobs.values()], 2), strict=True), strict=True))


@pytest.fixture(scope="module")
def runs(world, said):
    whole = (f"whole {name}" for name in HERE if name in ON_TWO)
    assert all(said[name] == ("done", "done") for name in (*HERE, *whole, "together"))
    return world


@pytest.mark.parametrize("name", [name for name in HERE if name != "many full"])
def test_a_base_in_shards_gives_the_bits_of_a_whole_one(runs, name):
    assert_alike(runs / "whole" / name, runs / "shards" / name, exact=True)


@pytest.mark.parametrize(
    "name", [name for name in HERE if name != "many full" and HERE[name].get("show_answers")]
)
def test_a_base_in_shards_answers_and_is_evaluated_as_a_whole_one(runs, name):
    one, other = evaluations(runs / "whole" / name), evaluations(runs / "shards" / name)
    assert one == other and len(one) == 3
    assert len({each["sample"]["answer"] for each in one}) > 1, (
        "training changed no answer: nothing is compared"
    )


def evaluations(out):
    """All that is said of each, but for how long it took."""
    records = [
        record for record in read_records(out / "metrics.jsonl") if record["kind"] == "evaluation"
    ]
    return [
        {name: value for name, value in record.items() if name != "seconds"} for record in records
    ]


def test_full_fine_tuning_in_parts_keeps_the_checkpoints_of_a_whole_one(runs):
    """The same bytes, which any number of processes reads."""
    whole, parts = (runs / each / "full" / "checkpoints" for each in ("whole", "shards"))
    names = sorted(path.name for path in whole.iterdir())
    assert names and names == sorted(path.name for path in parts.iterdir())
    for name in names:
        assert (whole / name / "state.safetensors").read_bytes() == (
            parts / name / "state.safetensors"
        ).read_bytes()


@WHOLE
@pytest.mark.parametrize("name", ["dora nf4", "full"])
def test_four_processes_with_a_round_that_is_not_full_give_the_same_bits(runs, name):
    out = runs / "four" / name
    run = settings(runs, out, **SHARDED[name], shard=True)
    assert run_processes([{"config": run}], 4) == [["done"]] * 4
    assert_alike(runs / "whole" / name, out, exact=name not in ON_TWO)


@WHOLE
@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_run_goes_on_with_shards_and_without(runs, name):
    """2 processes with shards, then one with the whole base, then 4 with shards. Only the sums of
    full fine-tuning depend on the processes."""
    out = runs / "resumed" / name
    run = {"config": settings(runs, out, **SHARDED[name], shard=True)}
    first = run_processes([{**run, "at": {"step": 1, "rank": 1, "does": "signal"}}], 2)
    assert all(said[0].startswith("130 stopped at step 1 of 4") for said in first)
    shard(out, on=False)
    second = run_processes(
        [{**run, "resume": True, "at": {"step": 3, "rank": 0, "does": "signal"}}], 1
    )
    assert second[0][0].startswith("130 stopped at step 3 of 4")
    shard(out, on=True)
    assert run_processes([{**run, "resume": True}], 4) == [["done"]] * 4
    assert_alike(runs / "whole" / name, out, exact=name not in ON_TWO)


def test_full_fine_tuning_in_parts_differs_by_the_order_of_sums_alone(runs):
    assert_alike(runs / "whole" / "many full", runs / "shards" / "many full", exact=False)


def assert_alike(whole, sharded, *, exact):
    one, other = values(whole), values(sharded)
    assert one.keys() == other.keys()
    if exact:
        assert all(one[key].equal(other[key]) for key in one)
        assert losses(whole) == losses(sharded)
        return
    assert all(torch.allclose(one[key], other[key], rtol=0, atol=1e-4) for key in one)
    for (*kind, loss), (*other_kind, other_loss) in zip(
        losses(whole), losses(sharded), strict=True
    ):
        assert kind == other_kind and abs(loss - other_loss) <= 1e-5 * abs(loss)


def shard(out, *, on):
    file = out / "run.yaml"
    before, after = f"shard: {str(not on).lower()}", f"shard: {str(on).lower()}"
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))


@pytest.mark.parametrize("name", FAILING)
def test_what_one_process_meets_while_the_others_gather_ends_all_at_once(said, name):
    first, second = said[f"failing {name}"]
    assert second == "3 no memory is left for this batch"
    assert first.startswith("6 the processes of this run do not go on together")
    assert "process 1: no memory is left for this batch" in first


def test_a_step_says_what_its_time_went_into(runs):
    parts_of_all = ["compute", "wait", "reduce"]
    for out, parts in (
        (runs / "together", parts_of_all),
        (runs / "shards" / "lora", [*parts_of_all, "gather"]),
    ):
        steps = [
            record for record in read_records(out / "metrics.jsonl") if record["kind"] == "step"
        ]
        for record in steps:
            assert list(record["parts"]) == parts and min(record["parts"].values()) > 0
        summary = json.loads((out / "summary.json").read_text())
        timed = {part: sum(record["parts"][part] for record in steps[1:]) for part in parts}
        assert summary["seconds_by_part"] == pytest.approx(timed)
        assert sum(timed.values()) == pytest.approx(
            summary["seconds"], rel=0.5
        )  # the mean of all, and the leader's


def test_full_fine_tuning_that_cannot_lie_in_parts_is_refused_by_name():
    with pytest.raises(ConfigError, match="adamw8bit scales them in blocks that parts cut through"):
        RunConfig(base="b", data="d", out="o", method="full", shard=True, optimizer="adamw8bit")
    with pytest.raises(ConfigError, match="take reduce plain, or leave shard out"):
        RunConfig(base="b", data="d", out="o", method="full", shard=True, reduce="exact")


def test_micro_batches_of_like_cost_are_computed_at_the_same_time():
    assert group_by_cost([5, 1, 9, 4, 8], 2) == [[2, 4], [0, 3], [1]]
    assert group_by_cost([5], 4) == [[0]]
