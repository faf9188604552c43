"""Objectives of preferences equal their papers: packed, with shared prompts, accumulated, resumed,
beside other jobs."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.objectives.papers import Answer, kto_z, loss_of_row
from tests.support.helpers import fill, killed_after_saving
from tests.support.joint import (
    FLOAT32,
    assert_same_run,
    config,
    make_world,
    together,
    write_preferences,
)
from tests.support.tiny import tiny_model
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.adapters.placement.routing import Routing
from veneer.data.examples import Example, RowRef
from veneer.errors import ConfigError, DataError, RefusedError
from veneer.models.step import ComputePaths, prepare
from veneer.objectives.config import DPO, IPO, KTO, ORPO
from veneer.objectives.objective import AnswerBatch, HeldOutFigures
from veneer.objectives.registry import make_objective
from veneer.training import trainee as trainee_module
from veneer.training.config import RunConfig
from veneer.training.gradient import StepGradient, forward_backward
from veneer.training.held_out.evaluations import figures_of
from veneer.training.inputs import ReferenceLogProbs, TrainingInputs
from veneer.training.optimizer.buffer import FlatParameters
from veneer.training.output.records import read_records
from veneer.training.output.screen import QuietScreen
from veneer.training.processes.world import ALONE
from veneer.training.run import run_training
from veneer.training.state.folder import resume_config

OBJECTIVES = {
    "dpo": DPO(beta=0.3),
    "dpo with all": DPO(beta=2.0, label_smoothing=0.2, sft_weight=0.7, per_token=True),
    "ipo": IPO(beta=0.4),
    "ipo of sums": IPO(beta=0.4, per_token=False, sft_weight=0.1),
    "orpo": ORPO(weight=0.6),
    "kto": KTO(beta=0.2, good_weight=1.5, bad_weight=0.5),
}


def rows_of(objective, *, count=6, vocab=272):
    """Rows of two or three answers; rows of kto hold a rated answer and a mismatched one."""
    generator = np.random.default_rng(3)
    examples = []
    for row in range(count):
        prompt = generator.integers(0, vocab, 4 + row % 3)
        kinds = ["chosen", "rejected", *(["rejected"] if row % 3 == 1 else [])]
        if isinstance(objective, KTO):
            kinds = [("chosen", "rejected")[row % 2], "mismatched"]
        for number, kind in enumerate(kinds):
            answer = generator.integers(0, vocab, 3 + 2 * number + row % 4)
            ids = np.concatenate([prompt, answer]).astype(np.int32)
            trained = np.zeros(len(ids), dtype=bool)
            trained[len(prompt) :] = True
            ref = RowRef("pairs.jsonl", row + 1)
            examples.append(Example(ids, trained, ref, 10 * row + number, row=row, kind=kind))
    return examples


def adapted(dtype):
    model, routing = tiny_model("llama", dtype), Routing()
    attachment = attach(
        model, LoRA(rank=3, alpha=5), name="a", routing=routing, head=model.get_output_embeddings()
    )
    fill(attachment.parameters().values())
    return model, routing, attachment


def inputs_of(objective, examples, tmp_path, *, share_prompt=True):
    model, routing, attachment = adapted(torch.float32)
    inputs = TrainingInputs(
        model=model,
        paths=prepare(model),
        routing=routing,
        adapters=((attachment, 1.0),),
        flat=FlatParameters(attachment.parameters()),
        train=examples,
        validation=[],
        config=RunConfig(
            base="b", data="d", out="o", objective=objective, share_prompt=share_prompt
        ),
        learning_rate=0.01,
        steps=1,
        out=tmp_path,
        sample=None,
    )
    generator = np.random.default_rng(5)
    lengths = np.array([example.trained.sum() for example in examples])
    inputs.reference = ReferenceLogProbs(
        -5.0 * lengths + generator.normal(size=len(lengths)), np.zeros(0)
    )
    return inputs


def by_paper(objective, examples, reference, micro_batches):
    """Loss and gradient: every answer alone in a float64 model, through whole logits."""
    model, routing, attachment = adapted(torch.float64)
    routing.active = (("a", 1.0),)
    parameters = list(attachment.parameters().values())
    answers = []
    for number, example in enumerate(examples):
        ids = torch.from_numpy(example.ids).long()[None]
        log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)
        targets = np.flatnonzero(example.trained)
        log_prob = log_p[targets - 1, ids[0, targets]].sum()
        answers.append(Answer(log_prob, float(reference[number]), len(targets), example.kind))
    loss, counted = 0.0, 0.0
    for numbers in micro_batches:
        z = kto_z([answers[n] for n in numbers]) if isinstance(objective, KTO) else None
        for row in dict.fromkeys(examples[n].row for n in numbers):
            own = [answers[n] for n in numbers if examples[n].row == row]
            loss = loss + loss_of_row(objective, own, z)
            kto = isinstance(objective, KTO)
            counted += sum(a.kind != "mismatched" for a in own) if kto else 1
    loss = loss / counted
    return loss.item(), torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize(("share_prompt", "rows_at_once"), [(True, 2), (False, 6)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_are_those_of_the_paper(name, share_prompt, rows_at_once, tmp_path):
    objective = OBJECTIVES[name]
    examples = rows_of(objective)
    inputs = inputs_of(objective, examples, tmp_path, share_prompt=share_prompt)
    micro_batches = [
        inputs.rows.examples(range(start, start + rows_at_once))
        for start in range(0, 6, rows_at_once)
    ]
    gradient = StepGradient(inputs, ALONE)
    gradient.begin(range(6), micro_batches, step=0)
    while gradient.assigned:
        forward_backward([gradient.take()])
    totals = gradient.finish()
    loss, gradients = by_paper(objective, examples, inputs.reference.train, micro_batches)
    assert totals.loss == pytest.approx(loss, rel=1e-5)
    own = inputs.flat.parameters.values()
    for parameter, theirs in zip(own, gradients, strict=True):
        torch.testing.assert_close(
            parameter.grad.double(),
            theirs.double(),
            rtol=1e-4,
            atol=1e-5 * float(theirs.abs().max()),
        )


def test_figures_say_how_far_apart_good_and_bad_answers_are():
    objective = make_objective(DPO(beta=0.5))
    examples = rows_of(DPO(), count=1)
    nats, reference = np.array([4.0, 9.0]), np.array([-6.0, -7.0])
    held_out = objective.held_out(nats, AnswerBatch(examples, reference))
    assert held_out.figures == {
        "accuracy": 1.0,
        "chosen": 2.0,
        "rejected": -2.0,
        "margin": 4.0,
        "chosen_tokens": 3.0,
        "rejected_tokens": 5.0,
    }
    assert held_out.right.tolist() == held_out.counted.tolist() == [1.0]


def test_time_of_an_evaluation_grows_with_its_rows_alone():
    """All held-out rows are one batch. A pass over it for each row took 25 s of these."""
    example = rows_of(DPO(), count=1)[0]
    kinds = ("chosen", "rejected")
    examples = [replace(example, row=row, kind=kind) for row in range(16_000) for kind in kinds]
    start = time.process_time()
    losses = make_objective(DPO()).answer_losses(
        np.ones(len(examples)), AnswerBatch.without_reference(examples)
    )
    assert losses.sum() == pytest.approx(16_000 * np.log(2))
    assert time.process_time() - start < 5


def test_kto_without_one_class_is_finite():
    objective = make_objective(KTO())
    examples = rows_of(KTO(), count=1)
    answers = AnswerBatch(examples, np.array([-3.0, -4.0]))
    losses = objective.answer_losses(np.array([3.0, 2.0]), answers)
    assert np.isfinite(losses).all() and losses[1] == 0
    figures = objective.held_out(np.array([3.0, 2.0]), answers).figures
    assert "rejected" not in figures and "margin" not in figures


# runs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"))
    write_preferences(folder, 14)
    return folder


def settings_of(name):
    return {"objective": name, "rows": "ratings" if name == "kto" else "pairs", "batch": 4}


def preferences(out):
    return [
        (record["kind"], record["step"], record["preference"])
        for record in read_records(out / "metrics.jsonl")
        if "preference" in record
    ]


def test_pairs_of_the_same_prompt_are_one_observation_of_the_accuracy():
    held_out = HeldOutFigures({"accuracy": 0.75}, np.array([1.0, 1, 1, 1, 1, 1, 0, 0]), np.ones(8))
    own, shared = (
        figures_of(held_out, prompts)["accuracy"]
        for prompts in (range(8), [0, 0, 1, 1, 2, 2, 3, 3])
    )
    assert shared["high"] - shared["low"] > own["high"] - own["low"] + 0.1


@pytest.mark.parametrize("name", ["dpo", "ipo", "orpo", "kto"])
def test_a_run_learns_shows_its_figures_and_resumes_to_the_bit(name, world, tmp_path, monkeypatch):
    settings = settings_of(name) | {
        "method": {"name": "lora", "rank": 4, "dropout": 0.2},
        "micro_batch": 2,
    }
    whole = config(world, tmp_path / "whole", **settings)
    summary = run_training(whole, resume=False, screen=QuietScreen())
    records = preferences(tmp_path / "whole")
    assert [step for kind, step, _ in records if kind == "evaluation"] == [0, 2, 4, 6]
    accuracy = records[-1][2]["accuracy"]
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    assert summary["objective"] == name and "accuracy" in summary["preference"]
    part = config(world, tmp_path / "part", **settings)
    with killed_after_saving(4):
        run_training(part, resume=False, screen=QuietScreen())
    monkeypatch.setattr(
        trainee_module, "compute_reference", lambda *_: pytest.fail("computed again")
    )
    run_training(resume_config(str(tmp_path / "part")), resume=True, screen=QuietScreen())
    assert_same_run(tmp_path / "part", tmp_path / "whole", tolerance=0.0)
    assert preferences(tmp_path / "part") == records


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_job_of_preferences_beside_an_ordinary_one_is_what_it_is_alone(name, world, tmp_path):
    jobs = {"preference": settings_of(name), "plain": {"seed": 3}}
    together([config(world, tmp_path / "joint" / n, **jobs[n]) for n in jobs])
    for n, settings in jobs.items():
        run_training(config(world, tmp_path / n, **settings), resume=False, screen=QuietScreen())
        assert_same_run(tmp_path / "joint" / n, tmp_path / n, tolerance=5 * FLOAT32)


def test_before_step_1_the_model_is_its_reference(world, tmp_path):
    """A new prefix does not act like the base; the base alone is then the reference."""
    run_training(
        config(world, tmp_path / "first", **settings_of("dpo"), steps=2),
        resume=False,
        screen=QuietScreen(),
    )
    start = preferences(tmp_path / "first")[0][2]
    assert abs(start["chosen"]) < 1e-4 and abs(start["margin"]) < 1e-4
    further = settings_of("dpo") | {"from_adapter": str(tmp_path / "first"), "method": "lora"}
    run_training(config(world, tmp_path / "further", **further), resume=False, screen=QuietScreen())
    start = preferences(tmp_path / "further")[0][2]
    assert abs(start["chosen"]) < 1e-4 and abs(start["margin"]) < 1e-4
    prefix = settings_of("dpo") | {"method": {"name": "prefix", "tokens": 3}}
    run_training(config(world, tmp_path / "prefix", **prefix), resume=False, screen=QuietScreen())
    assert abs(preferences(tmp_path / "prefix")[0][2]["chosen"]) > 1e-3


def test_a_base_that_computes_the_answers_of_a_row_apart_is_refused(world, tmp_path, monkeypatch):
    apart = lambda self, lengths: [[number] for number in range(len(lengths))]  # noqa: E731
    monkeypatch.setattr(ComputePaths, "groups_of_lengths", apart)
    with pytest.raises(RefusedError, match="computes them apart") as refused:
        run_training(
            config(world, tmp_path / "a", **settings_of("dpo")), resume=False, screen=QuietScreen()
        )
    assert "pairs.jsonl:" in str(refused.value)
    long = {"prompt": "p", "chosen": "yes " * 12, "rejected": "no"}
    (tmp_path / "long.jsonl").write_text(json.dumps(long) + "\n")
    settings = settings_of("dpo") | {"data": {"train": str(world / "pairs.jsonl")}}
    settings["data"]["validation"] = str(tmp_path / "long.jsonl")
    monkeypatch.setattr(
        ComputePaths,
        "groups_of_lengths",
        lambda self, lengths: (
            apart(self, lengths) if max(lengths) > 50 else [[*range(len(lengths))]]
        ),
    )
    with pytest.raises(RefusedError, match="computes them apart") as refused:
        run_training(config(world, tmp_path / "b", **settings), resume=False, screen=QuietScreen())
    assert "long.jsonl:" in str(refused.value)


def test_rows_and_objective_must_fit(world, tmp_path):
    with pytest.raises(DataError, match="--objective dpo"):
        run_training(
            config(world, tmp_path / "a", rows="pairs"), resume=False, screen=QuietScreen()
        )
    with pytest.raises(DataError, match="learns from pairs of answers"):
        run_training(
            config(world, tmp_path / "b", objective="dpo"), resume=False, screen=QuietScreen()
        )
    with pytest.raises(DataError, match="--objective kto"):
        run_training(
            config(world, tmp_path / "c", objective="ipo", rows="ratings"),
            resume=False,
            screen=QuietScreen(),
        )
    with pytest.raises(ConfigError, match="train_on all"):
        RunConfig(base="b", data={"train": "d", "train_on": "all"}, out="o", objective="dpo")
