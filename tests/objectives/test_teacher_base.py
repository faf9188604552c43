"""A teacher that is another base with the same tokenizer: formula, runs, jobs, plan, refusals."""

import gc
import json
from dataclasses import replace
from weakref import ref

import numpy as np
import pytest
import torch

from tests.objectives.test_distil import by_definition, taught_rows
from tests.support.helpers import fill, killed_after_saving
from tests.support.joint import FLOAT32, assert_same_run, config, losses, make_world, together
from tests.support.tiny import VOCAB_SIZE, save_letters, save_tiny, tiny_model, tiny_tokenizer
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.adapters.placement.routing import Routing
from veneer.api import load
from veneer.bases.loading.from_config import blueprint
from veneer.cli import main
from veneer.errors import ConfigError
from veneer.models.step import prepare
from veneer.objectives.config import Distil, TeacherBase
from veneer.plan.choice import Choice
from veneer.plan.planner import Planner
from veneer.plan.probe import forecast
from veneer.plan.simulation.dry_run import dry_run
from veneer.plan.simulation.step_counts import TEACHER, Step, TeacherModel
from veneer.training import run
from veneer.training.config import RunConfig
from veneer.training.gradient import StepGradient, forward_backward
from veneer.training.inputs import ForwardInputs, Teacher, TrainingInputs
from veneer.training.optimizer.buffer import FlatParameters
from veneer.training.output.screen import QuietScreen
from veneer.training.processes.world import ALONE
from veneer.training.run import run_training
from veneer.training.state.folder import resume_config
from veneer.training.teachers import teacher_base
from veneer.training.trainee import Trainee

LARGER = {"hidden_size": 48, "num_hidden_layers": 3, "vocab_size": VOCAB_SIZE + 24}
TOKENS = 259
"""Tokens of the tokenizer; both models have more rows than that."""


def models(dtype):
    student, teacher = tiny_model("llama", dtype), tiny_model("qwen3", dtype, **LARGER)
    routing = Routing()
    head = student.get_output_embeddings()
    adapter = attach(student, LoRA(rank=3), name="a", routing=routing, head=head)
    fill(list(adapter.parameters().values()))
    return student, routing, adapter, teacher


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen_shannon"])
def test_loss_and_gradient_are_those_of_the_formula_over_the_common_tokens(divergence, tmp_path):
    objective = Distil(teacher=TeacherBase(base="t"), divergence=divergence, temperature=1.5)
    examples = taught_rows(vocab=TOKENS)
    model, routing, adapter, teacher = models(torch.float32)
    paths, adapters = prepare(model), ((adapter, 1.0),)
    forward = ForwardInputs(teacher, prepare(teacher), Routing(), (), True, 0)
    inputs = TrainingInputs(
        model=model,
        paths=paths,
        routing=routing,
        adapters=adapters,
        flat=FlatParameters(adapter.parameters()),
        train=examples,
        validation=examples,
        config=RunConfig(base="b", data="d", out="o", objective=objective),
        learning_rate=0.01,
        steps=1,
        out=tmp_path,
        sample=None,
        stored_teacher=Teacher(forward, TOKENS),
    )
    gradient = StepGradient(inputs, ALONE)
    gradient.begin(range(6), [inputs.rows.examples(range(n, n + 3)) for n in (0, 3)], step=0)
    while gradient.assigned:
        forward_backward([gradient.take()])
    totals = gradient.finish()

    model, routing, adapter, teacher = models(torch.float64)
    values = []
    for own, taught in zip(examples[::2], examples[1::2], strict=True):
        routing.active = (("a", 1.0),)
        z_student, z_teacher = (
            m(input_ids=torch.from_numpy(row.ids).long()[None]).logits[0][
                np.flatnonzero(row.trained) - 1, :TOKENS
            ]
            for m, row in ((model, own), (teacher, taught))
        )
        kind = divergence, z_student, z_teacher, objective.temperature, objective.teacher_share
        values.append(by_definition(*kind))
    loss = torch.cat(values).mean()
    assert totals.loss == pytest.approx(loss.item(), rel=1e-5)
    expected = torch.autograd.grad(loss, list(adapter.parameters().values()))
    for parameter, theirs in zip(inputs.flat.parameters.values(), expected, strict=True):
        torch.testing.assert_close(
            parameter.grad, theirs.float(), rtol=1e-3, atol=1e-4 * float(theirs.abs().max())
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"))
    save_tiny(folder / "larger", "qwen3", **LARGER)
    return folder


def taught_by(world, base="larger", **settings):
    return {"objective": {"name": "distil", "teacher": {"base": str(world / base), **settings}}}


def test_a_run_learns_and_resumes_to_the_bit_and_names_its_teacher(world, tmp_path):
    settings = taught_by(world) | {"method": {"name": "lora", "rank": 4, "dropout": 0.2}}
    whole = config(world, tmp_path / "whole", **settings)
    run_training(whole, resume=False, screen=QuietScreen(), plan=forecast)
    values = [loss for kind, _, loss in losses(tmp_path / "whole") if kind == "evaluation"]
    assert 0 < values[-1] < values[0]
    with killed_after_saving(4):
        run_training(
            config(world, tmp_path / "part", **settings), resume=False, screen=QuietScreen()
        )
    resumed = resume_config(str(tmp_path / "part"))
    assert resumed.objective.teacher.digest and resumed.objective.teacher.dtype == "float32"
    teacher = resumed.objective.teacher.model_copy(update={"digest": "0a"})
    objective = resumed.objective.model_copy(update={"teacher": teacher})
    with pytest.raises(ConfigError, match="not what the run started with"):
        run_training(
            resumed.model_copy(update={"objective": objective}), resume=True, screen=QuietScreen()
        )
    with pytest.raises(ConfigError, match="not the teacher"):
        run_training(
            resumed.model_copy(update={"objective": objective, "out": str(tmp_path / "new")}),
            resume=False,
            screen=QuietScreen(),
        )
    run_training(resumed, resume=True, screen=QuietScreen())
    assert_same_run(tmp_path / "part", tmp_path / "whole", tolerance=0.0)


def test_memory_for_another_job_is_what_the_base_of_its_teacher_leaves(
    world, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(run, "free_bytes", lambda device: 10**6)
    monkeypatch.setattr(run, "has_room", lambda jobs, free: asked.append(free) or True)
    jobs = {"plain": {}, "a": taught_by(world), "b": taught_by(world), "c": {}}
    together(
        [config(world, tmp_path / n, steps=1, **job) for n, job in jobs.items()], plan=forecast
    )
    weights = sum(p.nbytes for p in load(world / "larger").model.parameters())
    assert asked == [10**6 - weights] * 3  # the second asks before the teacher is loaded


def test_the_base_of_a_teacher_is_freed_after_its_last_job(world, tmp_path, monkeypatch):
    """One job after another; two have the same teacher, which is loaded once."""
    bases, asked, alive = [], [], []
    own_load, own_begin = teacher_base.load_on_all_processes, Trainee.begin_step

    def load_teacher(*arguments):
        bases.append(ref((base := own_load(*arguments)).model))
        return base

    def begin_step(trainee):
        gc.collect()
        alive.append((trainee.inputs.out.name, bases[0]() is not None))
        own_begin(trainee)

    monkeypatch.setattr(teacher_base, "load_on_all_processes", load_teacher)
    monkeypatch.setattr(Trainee, "begin_step", begin_step)
    monkeypatch.setattr(run, "free_bytes", lambda device: 10**6)
    monkeypatch.setattr(run, "has_room", lambda jobs, free: asked.append(free))
    jobs = {"a": taught_by(world), "b": taught_by(world), "c": {}, "d": {}}
    together(
        [config(world, tmp_path / n, steps=1, **job) for n, job in jobs.items()], plan=forecast
    )
    assert len(bases) == 1 and alive == [("a", True), ("b", True), ("c", False), ("d", False)]
    weights = sum(p.nbytes for p in load(world / "larger").model.parameters())
    assert asked == [10**6, 10**6, 10**6 + weights]


def test_jobs_with_and_without_a_larger_teacher_are_what_they_are_alone(world, tmp_path):
    jobs = {
        "dense": taught_by(world),
        "nf4": taught_by(world, quantize="nf4"),
        "plain": {"seed": 3},
    }
    jobs = {name: job | {"steps": 3} for name, job in jobs.items()}
    together([config(world, tmp_path / "joint" / n, **jobs[n]) for n in jobs])
    for n, settings in jobs.items():
        run_training(config(world, tmp_path / n, **settings), resume=False, screen=QuietScreen())
        assert_same_run(tmp_path / "joint" / n, tmp_path / n, tolerance=100 * FLOAT32)
    assert losses(tmp_path / "dense")[0] != losses(tmp_path / "nf4")[0]


def test_a_plan_counts_the_weights_and_the_forward_of_the_teacher(world, tmp_path):
    planner = Planner(blueprint(str(world / "base")), device="cpu")
    peaks, weights = {}, {}
    for name, settings in (("none", None), ("dense", {}), ("nf4", {"quantize": "nf4"})):
        taught = {} if settings is None else taught_by(world, **settings)
        choice = Choice.of(config(world, tmp_path / name, **taught))
        estimate = planner.estimate(choice)
        peaks[name], weights[name] = estimate.peak_bytes, estimate.run.static.get(TEACHER, 0)
    parameters = tiny_model("qwen3", **LARGER).parameters()
    assert weights["none"] == 0 < weights["nf4"] < weights["dense"]
    assert weights["dense"] == sum(parameter.nbytes for parameter in parameters)
    assert peaks["dense"] - peaks["none"] == weights["dense"]
    model, examples = tiny_model("llama"), taught_rows()
    step = Step(model.config, model.dtype, LoRA(rank=3), examples)
    larger = TeacherModel(blueprint(str(world / "larger")), torch.float32)
    own, other = (dry_run(replace(step, teacher=teacher)) for teacher in (None, larger))
    assert other.work.flops > 1.1 * own.work.flops


def test_a_teacher_with_another_tokenizer_or_too_few_positions_is_refused(world, tmp_path):
    save_tiny(world / "foreign", "qwen3", **LARGER)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(world / "foreign")
    with pytest.raises(ConfigError, match="tokenizers differ") as caught:
        run_training(
            config(world, tmp_path / "a", **taught_by(world, "foreign")),
            resume=False,
            screen=QuietScreen(),
        )
    assert "'<new>' is missing and 259" in str(caught.value)


def test_a_larger_base_draws_questions_and_answers_and_teaches(tmp_path, capsys):
    base = save_letters(tmp_path / "base")
    larger = save_letters(tmp_path / "larger")
    command = ["distil", "--base", str(base), "--teacher", str(larger), "--rows", "4"]
    command += ["--max-new-tokens", "8", "--out", str(tmp_path / "run"), "--json"]
    for setting in ("steps=1", "show_answers=false", "objective.teacher.dtype=float32"):
        command += ["--set", setting]
    assert main.main(command) == 0
    assert json.loads(capsys.readouterr().out)["objective"] == "distil"
    rows = [json.loads(line) for line in (tmp_path / "run" / "rows.jsonl").open()]
    assert [turn["role"] for turn in rows[0]["messages"]] == ["user", "assistant"]
