"""A base in shards gives what a whole one gives, to the bit, whoever holds what."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from tests.processes.test_processes import RUNS, losses, settings, told, values, world
from tests.soak.counts import rounds
from tests.support.models.packed_folders import write_gptq
from tests.support.tiny import save_tiny
from veneer.errors import ConfigError, RefusedError
from veneer.shards import Shards, make_whole
from veneer.training.config import RunConfig
from veneer.training.optimizer.parts import FlatShards
from veneer.training.output.records import read_records
from veneer.training.processes.dealing import in_rounds
from veneer.training.processes.world import ALONE

__all__ = ["world"]
SHARDED = {
    "lora": {**RUNS["lora"], "show_answers": True},
    "dora nf4": RUNS["dora nf4"],
    "full": {
        "show_answers": True,
        "method": {"name": "full"},
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "clip": 0.5,
    },
    "prefix": RUNS["prefix"],
    "bottleneck": {**RUNS["bottleneck"], "show_answers": True},
    "olora": {
        "method": {"name": "lora", "rank": 2, "init": "olora", "train_modules": ["norm"]},
        "micro_batch": 3,
    },
    "full bfloat16": {**RUNS["full"], "checkpointing": True, "show_answers": True},
    "lora gptq": {"method": {"name": "lora", "rank": 2}, "base": "gptq"},
}


WHOLE = pytest.mark.skipif(not rounds("shards", ci=0), reason="starts many processes: make soak")
HERE = {name: SHARDED[name] for name in [*SHARDED][: len(rounds("shards", ci=3))]}
EXACT = [*HERE]
FAILING = ["lora", "full"][: len(rounds("shards", ci=1))]
HERE["plain full"] = {**SHARDED["full"], "reduce": "plain"}


@pytest.fixture(scope="module")
def said(world):
    """The same runs by one process that holds the whole base and by two that hold a half of its
    layers each; one by two that hold all of them; and those in which the second of two fails: what
    each of two said, by name."""
    write_gptq(save_tiny(world / "gptq"))
    for own in HERE.values():
        own.update({"base": str(world / own["base"])} if "base" in own else {})
    jobs = [
        {"config": settings(world, world / "whole" / name, **own)} for name, own in HERE.items()
    ]
    assert told(jobs, 1) == [["done"] * len(jobs)]
    jobs = {
        name: {"config": settings(world, world / "shards" / name, **own, shard=True)}
        for name, own in HERE.items()
    }
    jobs["together"] = {"config": settings(world, world / "together", **SHARDED["lora"])}
    for name in FAILING:
        run = settings(world, world / "failed" / name, **SHARDED[name], shard=True)
        jobs[f"failing {name}"] = {"config": run, "at": {"step": 1, "rank": 1, "does": "fail"}}
    return dict(zip(jobs, zip(*told([*jobs.values()], 2), strict=True), strict=True))


@pytest.fixture(scope="module")
def runs(world, said):
    assert all(said[name] == ("done", "done") for name in (*HERE, "together"))
    return world


@pytest.mark.parametrize("name", EXACT)
def test_a_base_in_shards_gives_the_bits_of_a_whole_one(runs, name):
    one, other = values(runs / "whole" / name), values(runs / "shards" / name)
    assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)
    assert losses(runs / "whole" / name) == losses(runs / "shards" / name)


@pytest.mark.parametrize("name", [name for name in EXACT if HERE[name].get("show_answers")])
def test_a_base_in_shards_answers_and_is_evaluated_as_a_whole_one(runs, name):
    one, other = evaluations(runs / "whole" / name), evaluations(runs / "shards" / name)
    assert one == other and len(one) == 3
    assert len({each["sample"]["answer"] for each in one}) > 1, (
        "training changed no answer: nothing is compared"
    )


def evaluations(out):
    """All that is said of each, but for how long it took."""
    records = [each for each in read_records(out / "metrics.jsonl") if each["kind"] == "evaluation"]
    return [{name: value for name, value in each.items() if name != "seconds"} for each in records]


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
    assert told([{"config": run}], 4) == [["done"]] * 4
    one, other = values(runs / "whole" / name), values(out)
    assert all(one[key].equal(other[key]) for key in one)
    assert losses(runs / "whole" / name) == losses(out)


@WHOLE
@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_run_goes_on_with_shards_and_without(runs, name):
    """2 processes with shards, then one with the whole base, then 4 with shards."""
    out = runs / "resumed" / name
    run = {"config": settings(runs, out, **SHARDED[name], shard=True)}
    first = told([{**run, "at": {"step": 1, "rank": 1, "does": "signal"}}], 2)
    assert all(said[0].startswith("130 stopped at step 1 of 4") for said in first)
    shard(out, on=False)
    second = told([{**run, "resume": True, "at": {"step": 3, "rank": 0, "does": "signal"}}], 1)
    assert second[0][0].startswith("130 stopped at step 3 of 4")
    shard(out, on=True)
    assert told([{**run, "resume": True}], 4) == [["done"]] * 4
    one, other = values(runs / "whole" / name), values(out)
    assert all(one[key].equal(other[key]) for key in one)
    assert losses(runs / "whole" / name) == losses(out)


def test_full_fine_tuning_in_parts_with_plain_sums_differs_by_rounding_alone(runs):
    one, other = losses(runs / "whole" / "plain full"), losses(runs / "shards" / "plain full")
    assert [each[:2] for each in one] == [each[:2] for each in other]
    assert all(abs(a - b) <= 1e-5 * abs(a) for (_, _, a), (_, _, b) in zip(one, other, strict=True))


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
    with pytest.raises(RefusedError, match="tensors are all trained and of one type") as told:
        FlatShards({"a": nn.Parameter(torch.zeros(3))}, in_two_types(), ALONE)
    assert told.value.faults == ["Parameter of bfloat16", "Parameter of float32"]


def in_two_types():
    layer = nn.Sequential(
        nn.Linear(64, 48), nn.Linear(48, 64, dtype=torch.bfloat16)
    ).requires_grad_(False)
    shards = Shards(0, 1, lambda whole, own: whole.copy_(own))
    shards.take(layer)
    return shards


def layer_in_shards():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64)).requires_grad_(False)
    shards = Shards(0, 1, lambda whole, own: whole.copy_(own))
    weight = layer[0].weight.clone()
    shards.take(layer)
    return shards, layer, weight


def test_what_is_not_whole_takes_no_memory_and_reads_as_nan():
    shards, layer, weight = layer_in_shards()
    assert layer[0].weight.shape == (48, 64) and layer[0].weight.isnan().all()
    assert layer[0].weight.untyped_storage().nbytes() == 4
    make_whole(layer[0])
    assert layer[0].weight.equal(weight)
    shards.changed(lambda module: module.double())
    make_whole(layer[0])
    assert layer[0].weight.dtype == torch.float64 and layer[0].weight.equal(weight.double())


def test_a_gradient_finds_the_weights_of_its_own_layer():
    """Autograd keeps them for backward, after another layer was whole."""
    shards, first, weight = layer_in_shards()
    second = nn.Linear(64, 64).requires_grad_(False)
    plain = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64), nn.Linear(64, 64)).requires_grad_(
        False
    )
    make_whole(first)
    plain.load_state_dict(
        {**first.state_dict(), **{f"2.{name}": each for name, each in second.state_dict().items()}}
    )
    shards.take(second)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for run in (plain, lambda x: second(first(x))):
        own = x.clone().requires_grad_()
        run(own).square().sum().backward()
        gradients.append(own.grad)
    assert first[0].weight.equal(weight) and gradients[0].equal(gradients[1])


def test_micro_batches_of_like_cost_are_computed_at_the_same_time():
    assert in_rounds([5, 1, 9, 4, 8], 2) == [[2, 4], [0, 3], [1]]
    assert in_rounds([5], 4) == [[0]]
