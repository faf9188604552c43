"""base.trainer: objectives by name and by their settings, beside what a run computes."""

import json
import math
import re
from itertools import pairwise

import pytest
import torch

import veneer
from tests.support.joint import FLOAT32, alone, losses, make_world, write_preferences
from tests.training.test_own_loop import GUIDE, METHODS
from veneer.errors import ConfigError
from veneer.training.own_loop import forward_queue, reference

DIVIDED = 1e-4
"""Relative difference after some steps: a run divides each loss, a loop the sum of gradients."""
OBJECTIVES = {
    "dpo": veneer.DPO(beta=0.3, sft_weight=0.2),
    "ipo": veneer.IPO(),
    "orpo": veneer.ORPO(),
    "kto": veneer.KTO(),
    "distil": veneer.Distil(system="Answer with numbers.", temperature=2.0),
}
BATCH = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"))
    write_preferences(folder, 8)
    answers = [{"prompt": f"p {n}", "completion": "yes " * (1 + n % 3)} for n in range(8)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    alone(folder, folder / "parent", steps=2)
    return folder


@pytest.fixture(scope="module")
def base(world):
    return veneer.load(world / "base")


def test_examples_of_other_rows_are_no_pair_and_no_teacher(base, world):
    distil = OBJECTIVES["distil"]
    with base.trainer(veneer.LoRA(rank=2)) as trainer:
        pairs = trainer.encode(world / "pairs.jsonl", loss="dpo")
        with pytest.raises(ConfigError, match="some are missing"):
            trainer.forward_backward([pairs[0], pairs[3]], loss="dpo")
        rows = [{"prompt": name, "completion": name} for name in "ab"]
        own, taught, other, others_taught = trainer.encode(rows, loss=distil)
        with pytest.raises(ConfigError, match="some are missing"):
            trainer.forward_backward([own, others_taught, other, taught], loss=distil)
        rows = [{"prompt": name, "chosen": "a", "rejected": "b"} for name in "ab"]
        both = [example for row in rows for example in trainer.encode([row], loss="dpo")]
        assert trainer.forward_backward(both, loss="dpo").rows == 2


def test_a_loop_refuses_what_it_would_not_do(base):
    row = [{"prompt": "a", "completion": "b"}]
    with base.trainer(veneer.LoRA(rank=2), new_tokens=["<z>"]) as trainer:
        with pytest.raises(ConfigError, match="own_answers"):
            trainer.encode(row, loss=veneer.Distil(system="x", own_answers=0.5))
        with pytest.raises(ConfigError, match="new tokens"):
            trainer.forward_backward(row, loss=veneer.Distil(system="x"))
    prefix = veneer.Prefix(tokens=4, start="random", frozen_tokens=2)
    with base.trainer(prefix) as trainer:
        trainer.forward_backward(row)
        with pytest.raises(ConfigError, match="weight_decay"):
            trainer.optim_step(veneer.AdamW(learning_rate=0.1, weight_decay=0.5))
        (values,) = trainer.attachment.parameters().values()
        before = values.detach().clone()
        trainer.optim_step(veneer.AdamW(learning_rate=0.1))
        assert (values[:2] == before[:2]).all() and (values[2:] != before[2:]).any()
    with pytest.raises(ConfigError, match="frozen_tokens 3 are more than the"):
        base.trainer(veneer.Prefix(prompt="a", frozen_tokens=3))


@pytest.mark.parametrize(
    ("method", "tokens", "settings", "fault"),
    [
        (veneer.LoRA(rank=2), ["<z>"], {"objective": OBJECTIVES["distil"].model_dump()}, "tokens"),
        (
            veneer.Prefix(tokens=4, start="random", frozen_tokens=2),
            [],
            {"weight_decay": 0.1, "method": {"name": "prefix"}},
            "weight_decay",
        ),
    ],
)
def test_a_run_refuses_settings_that_its_parent_rules_out(
    method, tokens, settings, fault, base, world, tmp_path
):
    with base.trainer(method, new_tokens=tokens) as trainer:
        parent = trainer.save(tmp_path / "parent")
    with pytest.raises(ConfigError, match=fault):
        alone(world, tmp_path / "o", from_adapter=[{"adapter": str(parent)}], **settings)


def batches(examples, size=BATCH):
    """Divides examples into batches of whole rows."""
    starts = [n for n, e in enumerate(examples) if n == 0 or e.row != examples[n - 1].row]
    starts = [n for n in starts if examples[n].row is not None] or list(range(len(examples)))
    borders = [*starts[::size], len(examples)]
    return [examples[a:b] for a, b in pairwise(borders)]


def steps(trainer, parts, loss):
    """Takes a step by the mean over each of these batches; returns the losses."""
    means = []
    for part in parts:
        call = trainer.forward_backward(part, loss=loss)
        trainer.optim_step(veneer.AdamW(learning_rate=0.01, max_norm=1.0), divide_by=call.count)
        means.append(call.loss_sum / call.count)
    return means


@pytest.mark.parametrize(
    ("name", "parent"), [*((name, None) for name in OBJECTIVES), ("dpo", "parent")]
)
def test_an_objective_in_a_loop_is_that_of_a_run(name, parent, base, world, tmp_path):
    loss = OBJECTIVES[name]
    start = {} if parent is None else {"from_adapter": [{"adapter": str(world / parent)}]}
    alone(
        world,
        tmp_path / "run",
        data={"train": str(world / f"{loss.rows}.jsonl"), "validation_share": 0},
        objective=loss.model_dump(),
        order="file",
        steps=4,
        batch=BATCH,
        schedule="constant",
        warmup=0,
        seed=4,
        weight_decay=0.0,
        **start,
    )
    method = veneer.LoRA(rank=2) if parent is None else world / parent
    with base.trainer(method, seed=4) as trainer:
        parts = batches(trainer.encode(world / f"{loss.rows}.jsonl", loss=loss))
        ours = steps(trainer, parts * 2, loss)
    theirs = [value for kind, _, value in losses(tmp_path / "run") if kind == "step"]
    assert ours[:2] == pytest.approx(theirs[:2], rel=1e-5)
    assert ours == pytest.approx(theirs, rel=DIVIDED)


def test_objectives_of_several_trainers_share_a_forward(base, world, monkeypatch):
    counts = []
    own = forward_queue.forward_backward
    monkeypatch.setattr(
        forward_queue, "forward_backward", lambda m: counts.append(len(m)) or own(m)
    )
    names = ["cross_entropy", *OBJECTIVES]
    files = [world / f"{OBJECTIVES[n].rows if n in OBJECTIVES else 'answers'}.jsonl" for n in names]

    def first_losses(trainers):
        calls = [
            trainer.forward_backward(file, loss=OBJECTIVES.get(name, name))
            for trainer, file, name in zip(trainers, files, names, strict=True)
        ]
        return [call.loss_sum for call in calls]

    trainers = [base.trainer(veneer.LoRA(rank=2), seed=n) for n in range(len(names))]
    joint = first_losses(trainers)
    assert counts == [len(names)]
    for trainer in trainers:
        trainer.close()
    for place, (file, name) in enumerate(zip(files, names, strict=True)):
        with base.trainer(veneer.LoRA(rank=2), seed=place) as trainer:
            call = trainer.forward_backward(file, loss=OBJECTIVES.get(name, name))
            assert call.loss_sum == pytest.approx(joint[place], rel=FLOAT32)


def test_a_reference_is_computed_once_and_goes_on_with_a_state(base, world, tmp_path, monkeypatch):
    computed = []
    own = reference.part_nats
    monkeypatch.setattr(reference, "part_nats", lambda *a: computed.append(len(a[1])) or own(*a))
    rows = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    with base.trainer(world / "parent") as trainer:
        steps(trainer, [rows[:4], rows[:4], rows[2:6]], "dpo")
        assert computed == [8, 4]
        trainer.save_state(tmp_path / "state")
        expected = steps(trainer, [rows[2:8]], "dpo")
        values = trainer.attachment.parameters()
        expected_values = {name: value.detach().clone() for name, value in values.items()}
    computed.clear()
    with base.trainer(resume=tmp_path / "state") as trainer:
        assert steps(trainer, [rows[2:8]], "dpo") == expected and computed == [4]
        for name, value in trainer.attachment.parameters().items():
            assert torch.equal(value, expected_values[name]), name


@pytest.mark.parametrize("method", ["targets", "dora", "bottleneck", "prefix"])
def test_a_reference_is_that_of_the_start_whatever_was_computed_before(
    method, base, world, tmp_path
):
    rows = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    adamw = veneer.AdamW(learning_rate=0.05)
    with base.trainer(METHODS[method]) as trainer:
        trainer.forward_backward(world / "answers.jsonl")
        trainer.optim_step(adamw)
        parent = trainer.save(tmp_path / "parent")
    figures = []
    for samples in (False, True):
        with base.trainer(parent) as trainer:
            trainer.forward_backward(rows[:2], loss="dpo")
            trainer.optim_step(adamw)
            if samples:
                trainer.sample("p 1", max_new_tokens=2)
            call = trainer.forward_backward(rows[2:6], loss="dpo")
            figures.append((call.loss_sum, dict(call.metrics)))
    assert figures[0] == figures[1]


def test_an_objective_has_figures_and_counts_of_its_own(base, world):
    with base.trainer(veneer.LoRA(rank=2)) as trainer:
        call = trainer.forward_backward(world / "pairs.jsonl", loss="dpo")
        assert (call.rows, call.count) == (8, 8.0) and call.tokens > 16
        assert call.metrics["margin"] == pytest.approx(0.0, abs=1e-5)
        assert trainer.forward_backward(world / "answers.jsonl").metrics == {}


def test_examples_of_another_objective_and_torn_rows_are_refused(base, world):
    with base.trainer(veneer.LoRA(rank=2)) as trainer:
        pairs = trainer.encode(world / "pairs.jsonl", loss="dpo")
        answers = trainer.encode(world / "answers.jsonl")
        for examples, loss, words in (
            (pairs, "cross_entropy", "not encoded for objective answers"),
            (answers, "orpo", "not encoded for objective orpo"),
            (answers, OBJECTIVES["distil"], "not encoded for objective distil"),
            (pairs[:3], "dpo", "keep the examples of a row together"),
            (pairs, "kto", "not encoded for objective kto"),
            (answers, "classify", "trains a score head"),
            (answers, "mse", "not one of cross_entropy, answers, dpo"),
            (answers, 3, "takes a name, such as"),
            (world / "answers.jsonl", "distil", "needs a teacher"),
        ):
            with pytest.raises(ConfigError, match=f"(?i){words}"):
                trainer.forward_backward(examples, loss=loss)


def test_the_pairs_of_the_guide_train(base, capsys):
    (example,) = re.findall(r"```python\n(pairs = .*?)```", GUIDE.read_text(), re.DOTALL)
    exec(example, {"veneer": veneer, "base": base})
    loss, accuracy = map(float, capsys.readouterr().out.split())
    assert loss == pytest.approx(math.log(2), rel=1e-4) and 0 <= accuracy <= 1
