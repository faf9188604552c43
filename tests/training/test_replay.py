"""Replay rows: KL to the base beside any objective, the same however a step is computed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.objectives.test_distil import by_definition, inputs_of, taught_rows
from tests.support.helpers import killed_after_saving
from tests.support.joint import FLOAT32, assert_same_run, config, losses, make_world, together
from veneer.data.batching import used_length
from veneer.errors import ConfigError
from veneer.execution.switches import RopeSwitches
from veneer.objectives.config import Distil
from veneer.objectives.replay import ReplayObjective
from veneer.training.config import RunConfig
from veneer.training.drawn_rows.replay import Replay
from veneer.training.gradient import StepGradient, forward_backward
from veneer.training.output.records import read_records
from veneer.training.output.screen import QuietScreen
from veneer.training.prepare import prepare_run
from veneer.training.processes.world import ALONE
from veneer.training.run import run_training
from veneer.training.state.checkpoint import newest_valid
from veneer.training.state.folder import resume_config
from veneer.training.state.progress import load_state

WEIGHT = 0.7


def test_a_step_adds_the_weighted_mean_kl_to_the_base(tmp_path):
    rows = taught_rows()
    inputs = inputs_of(Distil(teacher="t"), rows, tmp_path)
    gradients = []
    for count in (0, 3):
        if count:
            examples = rows[1::2]  # other texts than the student's
            inputs.replay = Replay(examples, ReplayObjective(WEIGHT), count, 2, 40, 0, "")
        gradient = StepGradient(inputs, ALONE)
        gradient.begin(range(6), [inputs.rows.examples(range(6))], step=0, replays=True)
        while gradient.assigned:
            forward_backward([gradient.take()])
        totals = gradient.finish()
        gradients.append(torch.cat([p.grad.flatten() for p in inputs.flat.parameters.values()]))
        inputs.flat.gradient.zero_()
    numbers = [number for part in inputs.replay.micro_batches(0) for number in part]
    assert len(set(numbers)) == 3
    loss = kl_to_base(inputs, [inputs.replay.examples[number] for number in numbers])
    assert totals.replay == pytest.approx(loss.item(), rel=1e-4)
    own = list(inputs.flat.parameters.values())
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(WEIGHT * loss, own)])
    difference = gradients[1] - gradients[0]
    torch.testing.assert_close(
        difference, expected, rtol=1e-3, atol=1e-4 * float(gradients[1].abs().max())
    )


def kl_to_base(inputs, examples):
    values = []
    for example in examples:
        rows = np.flatnonzero(example.trained) - 1
        ids = torch.from_numpy(example.ids).long()[None]
        with torch.no_grad(), inputs.routing.none():
            z_base = inputs.model(input_ids=ids).logits[0][rows].double()
        inputs.routing.active = (("student", 1.0),)
        z = inputs.model(input_ids=ids).logits[0][rows].double()
        values.append(by_definition("forward", z, z_base, 1.0, 0.5))
    return torch.cat(values).mean()


def test_every_row_is_taken_once_before_one_is_taken_again():
    replay = Replay(taught_rows()[::2], ReplayObjective(1.0), 4, 3, 10, 5, "")
    taken = [number for step in range(6) for part in replay.micro_batches(step) for number in part]
    cycles = [taken[start : start + 6] for start in range(0, 24, 6)]
    assert all(sorted(cycle) == list(range(6)) for cycle in cycles)
    assert len({tuple(cycle) for cycle in cycles}) > 1


# runs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"))
    texts = [{"text": f"other text {n} " * (1 + n % 4)} for n in range(7)]
    pairs = [{"prompt": f"p {n}", "chosen": "yes " * 2, "rejected": "no"} for n in range(10)]
    long = [{"text": "other text " * 40}]
    for name, rows in (("texts", texts), ("pairs", pairs), ("long", long)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def replays(out):
    return [r["replay"] for r in read_records(out / "metrics.jsonl") if r["kind"] == "step"]


@pytest.mark.parametrize("objective", ["answers", "dpo"])
def test_a_run_with_replay_resumes_to_the_bit(objective, world, tmp_path):
    settings = {
        "replay": {"rows": str(world / "texts.jsonl"), "weight": 0.5},
        "rows": "pairs" if objective == "dpo" else "rows",
        "objective": objective,
        "method": {"name": "lora", "rank": 4, "dropout": 0.2},
    }
    run_training(config(world, tmp_path / "whole", **settings), resume=False, screen=QuietScreen())
    with killed_after_saving(4):
        run_training(
            config(world, tmp_path / "part", **settings), resume=False, screen=QuietScreen()
        )
    run_training(resume_config(str(tmp_path / "part")), resume=True, screen=QuietScreen())
    assert_same_run(tmp_path / "part", tmp_path / "whole", tolerance=0.0)
    assert replays(tmp_path / "part") == replays(tmp_path / "whole")


def test_replay_keeps_the_adapter_nearer_to_the_base_and_jobs_apart(world, tmp_path):
    rows = str(world / "texts.jsonl")
    jobs = {
        "strong": {"replay": {"rows": rows, "weight": 20.0, "batch": 4}},
        "weak": {"replay": {"rows": rows, "weight": 0.001, "batch": 4}},
        "none": {"seed": 3},
    }
    together([config(world, tmp_path / "joint" / n, **jobs[n]) for n in jobs])
    strong, weak = (replays(tmp_path / "joint" / name) for name in ("strong", "weak"))
    assert strong[0] == pytest.approx(0.0, abs=1e-6)
    assert 0 < strong[-1] < weak[-1] / 2
    for name in ("strong", "none"):
        alone = tmp_path / name
        run_training(config(world, alone, **jobs[name]), resume=False, screen=QuietScreen())
        assert_same_run(tmp_path / "joint" / name, alone, tolerance=5 * FLOAT32)
        rows = [rows_of_run(folder) for folder in (tmp_path / "joint" / name, alone)]
        assert rows[0] == rows[1]  # or it could not be resumed
    assert losses(tmp_path / "joint" / "strong")[0] == losses(tmp_path / "joint" / "weak")[0]


def rows_of_run(out):
    """Returns the fingerprint of the rows that a run read."""
    return load_state(newest_valid(out / "checkpoints")[0]).origin.data


def test_rows_that_a_base_reads_apart_do_not_share_a_forward(tmp_path):
    rows = taught_rows()
    inputs = inputs_of(Distil(teacher="t"), rows, tmp_path)
    replayed = rows[::2]
    lengths = sorted(map(used_length, replayed))
    middle = lengths[len(lengths) // 2 - 1]
    assert middle < lengths[-1]
    inputs.paths = replace(inputs.paths, switches=RopeSwitches(at=(middle,)))
    inputs.replay = Replay(replayed, ReplayObjective(1.0), len(replayed), 6, 400, 0, "")
    gradient = StepGradient(inputs, ALONE)
    gradient.begin([0], [inputs.rows.examples([0])], step=0, replays=True)
    sides = [{used_length(example) > middle for example in part} for part in gradient.replayed]
    assert sorted(sides) in ([{False}, {True}], [{True}, {False}])


def test_the_texts_of_a_teacher_do_not_lengthen_replay_rows(world, tmp_path):
    settings = {
        "objective": {"name": "distil", "system": "a long prompt " * 20},
        "replay": {"rows": str(world / "long.jsonl")},
    }
    run = prepare_run(config(world, tmp_path / "out", **settings), None, world=ALONE, say=print)
    inputs = run.inputs
    longest = max(len(example.ids) for example in inputs.train if example.kind != "teacher")
    assert max(len(example.ids) for example in inputs.replay.examples) == longest
    assert longest < max(len(example.ids) for example in inputs.train)


def test_replay_without_a_base_that_stays_is_refused():
    own = {"base": "b", "data": "d", "out": "o", "replay": {"rows": "r.jsonl"}}
    for settings in ({"method": "full"}, {"new_tokens": ["<a>"]}):
        with pytest.raises(ConfigError, match="leave it out"):
            RunConfig(**own, **settings)
