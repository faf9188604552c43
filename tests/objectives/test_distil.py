"""A teacher: its divergence equals its definition in float64, packed, with shared prompts,
accumulated, resumed, beside other jobs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from tests.support.helpers import fill, killed_after_saving
from tests.support.joint import assert_same_run, config, losses, make_world, together
from tests.support.tiny import tiny_model
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.adapters.placement.routing import Routing
from veneer.data.examples import Example, RowRef
from veneer.errors import ConfigError, DataError
from veneer.kernels.dense import divergence as divergences
from veneer.kernels.dense.divergence import (
    Divergence,
    TeacherRows,
    frozen_head_divergence,
    head_divergence_reference,
    trained_head_divergence,
)
from veneer.kernels.dense.loss import Head
from veneer.models.step import prepare
from veneer.objectives.config import Distil
from veneer.plan.simulation.dry_run import dry_run
from veneer.plan.simulation.remembered import rows_digest
from veneer.plan.simulation.step_counts import Step
from veneer.training.config import RunConfig
from veneer.training.gradient import StepGradient, forward_backward
from veneer.training.inputs import ForwardInputs, Teacher, TrainingInputs
from veneer.training.optimizer.buffer import FlatParameters
from veneer.training.output.screen import QuietScreen
from veneer.training.processes.world import ALONE
from veneer.training.run import run_training
from veneer.training.state.folder import resume_config
from veneer.training.teachers import teacher as teacher_module
from veneer.training.teachers.teacher import taught_nats

ROUNDING = 2e-4
"""Largest relative difference of a divergence in float32: a small difference of large numbers."""
KINDS = {
    "forward": Divergence("forward", temperature=2.0),
    "reverse": Divergence("reverse", temperature=0.7),
    "jensen_shannon": Divergence("jensen_shannon", temperature=1.5, beta=0.3),
}


def by_definition(kind, z_student, z_teacher, temperature, beta):
    """The divergence of each row: sums over the vocabulary as the papers write them."""
    q, p = (F.softmax(z / temperature, dim=-1) for z in (z_student, z_teacher))

    def kl(a, b):
        return (a * torch.log(a / b)).sum(dim=-1)

    if kind == "jensen_shannon":
        m = beta * p + (1 - beta) * q
        value = beta * kl(p, m) + (1 - beta) * kl(q, m)
    else:
        value = kl(p, q) if kind == "forward" else kl(q, p)
    return value * temperature**2


# the kernel


def states(rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64)


@pytest.fixture
def heads():
    weight = states(50, 8, 1)
    return {
        "same": (Head(weight), Head(weight)),
        "softcap": (Head(weight, scale=0.5, softcap=3.0), Head(weight, scale=0.5, softcap=3.0)),
        "own": (Head(weight), Head(states(50, 6, 2), states(1, 50, 3)[0])),
        "padded": (Head(weight), Head(torch.cat([weight, states(7, 8, 4)]))),
    }


@pytest.mark.parametrize("case", ["same", "softcap", "own", "padded"])
@pytest.mark.parametrize("name", KINDS)
def test_divergence_and_gradient_are_those_of_the_definition(name, case, heads, monkeypatch):
    monkeypatch.setattr(divergences, "CHUNK", 4)
    head, teacher_head = heads[case]
    h = states(11, 8, 5).requires_grad_()
    teacher = TeacherRows(states(11, teacher_head.weight.shape[1], 6), teacher_head)
    kind = KINDS[name]
    logits = head.logits(h), teacher_head.logits(teacher.states)[:, :50]
    expected = by_definition(kind.kind, *logits, kind.temperature, kind.beta)
    weights = states(1, 11, 7)[0]
    (gradient,) = torch.autograd.grad(expected @ weights, h)
    for function in (frozen_head_divergence, trained_head_divergence, head_divergence_reference):
        values = function(h, head, teacher, kind)
        torch.testing.assert_close(values, expected)
        torch.testing.assert_close(torch.autograd.grad(values @ weights, h)[0], gradient)
    assert (expected > 0).all()


@pytest.mark.parametrize("name", KINDS)
def test_gradient_is_that_of_finite_differences(name, heads):
    head, teacher_head = heads["softcap"]
    teacher = TeacherRows(states(3, 8, 6), teacher_head)
    h = states(3, 8, 5).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h: frozen_head_divergence(h, head, teacher, KINDS[name]), h
    )


@pytest.mark.parametrize("name", KINDS)
def test_tokens_that_neither_knows_change_nothing(name):
    z = states(4, 30, 1), states(4, 30, 2)
    wide = [F.pad(logits, (0, 3), value=float("-inf")) for logits in z]
    values, gradient = KINDS[name].with_gradient(*wide)
    torch.testing.assert_close(values, KINDS[name].of_logits(*z))
    assert (gradient[:, 30:] == 0).all() and gradient.isfinite().all()


def test_no_token_is_left_out_so_it_is_never_negative():
    """A sum over the teacher's likeliest tokens alone is negative where the student is surer."""
    teacher, student = torch.zeros(1, 1000), torch.zeros(1, 1000)
    student[0, :8] = 6.0
    p, q = teacher.softmax(-1)[0, :8], student.softmax(-1)[0, :8]
    assert (p * (p / q).log()).sum() < 0
    for kind in KINDS.values():
        assert kind.of_logits(student, teacher) > 0
        assert kind.of_logits(teacher, teacher).abs() < 1e-5


# a step


def taught_rows(count=6, vocab=272):
    """Rows whose teacher reads 5 more tokens that are the same in every row, and more."""
    generator = np.random.default_rng(3)
    shared = generator.integers(0, vocab, 5)
    examples = []
    for row in range(count):
        prompt = generator.integers(0, vocab, 3 + row % 3)
        answer = generator.integers(0, vocab, 2 + row % 4)
        for kind, begin in (("answer", prompt), ("teacher", np.concatenate([shared, prompt]))):
            ids = np.concatenate([begin, answer]).astype(np.int32)
            trained = np.arange(len(ids)) >= len(begin)
            ref = RowRef("rows.jsonl", row + 1)
            examples.append(Example(ids, trained, ref, 2 * row, row=row, kind=kind))
    return examples


def adapted(dtype, targets="all-linear"):
    model, routing = tiny_model("llama", dtype), Routing()
    head = model.get_output_embeddings()
    student, teacher = (
        attach(
            model, LoRA(rank=rank, alpha=5, targets=targets), name=name, routing=routing, head=head
        )
        for name, rank in (("student", 3), ("teacher", 2))
    )
    fill([*student.parameters().values(), *teacher.parameters().values()])
    return model, routing, student, teacher


def inputs_of(objective, examples, tmp_path, *, share_prompt=True, targets="all-linear"):
    model, routing, student, teacher = adapted(torch.float32, targets)
    paths = prepare(model)
    adapters = ((teacher, 1.0),) if objective.teacher else ()
    return TrainingInputs(
        model=model,
        paths=paths,
        routing=routing,
        adapters=((student, 1.0),),
        flat=FlatParameters(student.parameters()),
        train=examples,
        validation=examples,
        config=RunConfig(
            base="b", data="d", out="o", objective=objective, share_prompt=share_prompt
        ),
        learning_rate=0.01,
        steps=1,
        out=tmp_path,
        sample=None,
        stored_teacher=Teacher(ForwardInputs(model, paths, routing, adapters, share_prompt, 0)),
    )


def by_rows(objective, examples, targets):
    """Loss of each row and gradient: every row alone in a float64 model, through whole logits."""
    model, routing, student, _ = adapted(torch.float64, targets)

    def logits(example, active):
        routing.active = active
        ids = torch.from_numpy(example.ids).long()[None]
        return model(input_ids=ids).logits[0][np.flatnonzero(example.trained) - 1]

    values = []
    for own, taught in zip(examples[::2], examples[1::2], strict=True):
        with torch.no_grad():
            z_teacher = logits(taught, (("teacher", 1.0),) if objective.teacher else ())
        z = logits(own, (("student", 1.0),))
        kind = objective.divergence, z, z_teacher, objective.temperature, objective.teacher_share
        values.append(by_definition(*kind))
    loss = torch.cat(values).mean()
    gradients = torch.autograd.grad(loss, list(student.parameters().values()))
    return [value.sum().item() for value in values], loss.item(), gradients


OBJECTIVES = {
    "forward": Distil(system="s"),
    "reverse": Distil(system="s", divergence="reverse", temperature=2.0),
    "jensen_shannon": Distil(system="s", divergence="jensen_shannon", teacher_share=0.2),
    "adapter": Distil(teacher="t"),
}


@pytest.mark.parametrize(
    ("rows_at_once", "share_prompt", "targets"),
    [(1, True, "all-linear"), (4, True, ["q_proj", "lm_head"]), (6, False, "all-linear")],
)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_are_those_of_rows_alone(
    name, rows_at_once, share_prompt, targets, tmp_path
):
    """With lm_head among the targets, student and teacher have heads of their own."""
    objective, examples = OBJECTIVES[name], taught_rows()
    inputs = inputs_of(objective, examples, tmp_path, share_prompt=share_prompt, targets=targets)
    starts = range(0, 6, rows_at_once)
    parts = [inputs.rows.examples(range(n, min(n + rows_at_once, 6))) for n in starts]
    gradient = StepGradient(inputs, ALONE)
    gradient.begin(range(6), parts, step=0)
    while gradient.assigned:
        forward_backward([gradient.take()])
    totals = gradient.finish()
    values, loss, gradients = by_rows(objective, examples, targets)
    assert totals.loss == pytest.approx(loss, rel=1e-5)
    assert totals.trained_tokens == sum(e.trained_tokens for e in examples[::2])
    own = inputs.flat.parameters.values()
    for parameter, theirs in zip(own, gradients, strict=True):
        torch.testing.assert_close(
            parameter.grad.double(),
            theirs.double(),
            rtol=1e-4,
            atol=1e-5 * float(theirs.abs().max()),
        )
    if rows_at_once == 4:
        computed = np.concatenate(taught_nats(inputs, examples, parts))
        assert computed[::2] == pytest.approx(values, rel=1e-5)
        assert (computed[1::2] == 0).all()


def test_the_teacher_drops_nothing_out_and_has_no_gradient(tmp_path):
    """The teacher's predictions are the same with and without its dropout."""
    examples = taught_rows()
    losses = []
    for dropout in (0.0, 0.5):
        inputs = inputs_of(OBJECTIVES["adapter"], examples, tmp_path)
        ((teacher, _),) = inputs.teacher.forward.adapters
        for layer in teacher.layers.values():
            layer.dropout = dropout
        gradient = StepGradient(inputs, ALONE)
        gradient.begin(range(6), [inputs.rows.examples(range(6))], step=0)
        forward_backward([gradient.take()])
        losses.append(gradient.finish().loss)
        assert all(parameter.grad is None for parameter in teacher.parameters().values())
    assert losses[0] == losses[1]


def test_a_plan_counts_the_forward_of_the_teacher():
    """It stores nothing for backward, so only the work and the logits grow."""
    model, examples = tiny_model("llama", torch.float32), taught_rows()
    step = Step(model.config, model.dtype, LoRA(rank=3), examples)
    own, both = (dry_run(replace(step, rows=rows)) for rows in (examples[::2], examples))
    assert both.computed_tokens > own.computed_tokens
    assert both.work.flops > 1.3 * own.work.flops
    forward, backward = (
        [phase.end_bytes for phase in run.phases if phase.name in ("forward", "loss")]
        for run in (own, both)
    )
    assert backward == pytest.approx(forward, rel=0.05)
    assert rows_digest(examples) != rows_digest([replace(e, kind="answer") for e in examples])


# runs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"))
    (folder / "handbook.md").write_text("Answer with is. " * 4)
    run_training(config(folder, folder / "teacher"), resume=False, screen=QuietScreen())
    return folder


def taught(world, **objective):
    return {"objective": {"name": "distil", "document": str(world / "handbook.md"), **objective}}


@pytest.mark.parametrize("name", ["document", "adapter"])
def test_a_run_learns_and_resumes_to_the_bit(name, world, tmp_path):
    settings = taught(world) | {
        "method": {"name": "lora", "rank": 4, "dropout": 0.2},
        "micro_batch": 2,
    }
    if name == "adapter":
        settings["objective"] |= {"teacher": str(world / "teacher"), "document": None}
    whole = config(world, tmp_path / "whole", **settings)
    summary = run_training(whole, resume=False, screen=QuietScreen())
    assert summary["objective"] == "distil"
    before, after = (
        [loss for kind, _, loss in losses(tmp_path / "whole") if kind == "evaluation"][at]
        for at in (0, -1)
    )
    assert 0 < after < before
    part = config(world, tmp_path / "part", **settings)
    with killed_after_saving(4):
        run_training(part, resume=False, screen=QuietScreen())
    run_training(resume_config(str(tmp_path / "part")), resume=True, screen=QuietScreen())
    assert_same_run(tmp_path / "part", tmp_path / "whole", tolerance=0.0)


def test_jobs_with_teachers_beside_an_ordinary_one_are_what_they_are_alone(world, tmp_path):
    jobs = {
        # With seed 0 a gradient of 1e-7, which is rounding, moves a value by a whole step of Adam.
        "document": taught(world) | {"batch": 4, "micro_batch": 2, "seed": 5},
        "adapter": taught(world, teacher=str(world / "teacher"), divergence="reverse"),
        "plain": {"seed": 3},
    }
    together([config(world, tmp_path / "joint" / n, **jobs[n]) for n in jobs])
    for n, settings in jobs.items():
        run_training(config(world, tmp_path / n, **settings), resume=False, screen=QuietScreen())
        assert_same_run(tmp_path / "joint" / n, tmp_path / n, tolerance=ROUNDING)


def test_a_prefix_starts_as_what_the_teacher_reads_and_keeps_its_first_token(world, tmp_path):
    """With the whole text as prefix the student expects nearly what the teacher does."""
    settings = taught(world)
    method = {"name": "prefix", "start": "teacher", "frozen_tokens": 1}
    for name, steps in (("begin", 1), ("whole", 6)):
        run = config(world, tmp_path / name, **settings, method=method, steps=steps)
        run_training(run, resume=False, screen=QuietScreen())
    first, last = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")["prompt_embeddings"]
        for name in ("begin", "whole")
    )
    assert torch.equal(first[0], last[0]) and not torch.equal(first[1:], last[1:])
    stored = json.loads((tmp_path / "whole" / "adapter" / "adapter_config.json").read_text())
    assert (stored["peft_type"], stored["num_frozen_tokens"]) == ("CARTRIDGE", 1)
    assert stored["num_virtual_tokens"] == len(first) > 40
    run = config(world, tmp_path / "lora", **settings, steps=1)
    run_training(run, resume=False, screen=QuietScreen())
    assert losses(tmp_path / "whole")[0][2] < 0.7 * losses(tmp_path / "lora")[0][2]
    short = {**method, "tokens": 2000}
    with pytest.raises(ConfigError, match="in front of every row"):
        run_training(
            config(world, tmp_path / "a", **settings, method=short),
            resume=False,
            screen=QuietScreen(),
        )
    own = {"base": "b", "data": "d", "out": "o", "method": method}
    with pytest.raises(ConfigError, match="has none: take objective distil"):
        RunConfig(**own)
    with pytest.raises(ConfigError, match="weight_decay changes frozen tokens"):
        RunConfig(**own, **settings, weight_decay=0.1)


@pytest.mark.parametrize("name", ["document", "adapter", "larger"])
def test_the_prompt_of_a_teacher_is_computed_once_and_changes_no_loss(
    name, world, tmp_path, monkeypatch
):
    """With a document of its own each run computes its own prompt, as its adapter reads it."""
    teachers = {"adapter": str(world / "teacher"), "larger": {"base": str(world / "wide")}}
    lengths, batch = [], Teacher.batch

    def counted(self, examples):
        made = batch(self, examples)
        lengths.append(made.ids.numel())
        return made

    monkeypatch.setattr(Teacher, "batch", counted)
    (tmp_path / "other.md").write_text("Answer with was, in as many words as it takes. " * 3)
    found = {}
    documents = [world / "handbook.md", tmp_path / "other.md"][: 2 if name == "document" else 1]
    for document in documents:
        objective = taught(world, document=str(document), teacher=teachers.get(name))
        for least in (16, 10**6):
            monkeypatch.setattr(teacher_module, "LEAST_PROMPT_TOKENS", least)
            lengths.clear()
            out = tmp_path / f"{document.name} {least}"
            run_training(
                config(world, out, **objective, steps=2), resume=False, screen=QuietScreen()
            )
            found[document.name, least] = [loss for _, _, loss in losses(out)], max(lengths)
    for document in documents:
        (known, short), (again, long) = found[document.name, 16], found[document.name, 10**6]
        assert known == pytest.approx(again, rel=2e-2 if name == "larger" else 1e-5)
        assert short <= long - 32
    if len(documents) > 1:
        assert found["handbook.md", 16][0] != pytest.approx(found["other.md", 16][0], rel=1e-3)


def test_a_teacher_with_an_activation_reads_its_prompt_in_every_micro_batch(world, tmp_path):
    """An adapter with an activation acts alone, so the prompt is no prefix beside it."""
    method = {"name": "lora", "rank": 2, "activation": "rows"}
    teacher = config(world, tmp_path / "teacher", method=method, steps=2)
    run_training(teacher, resume=False, screen=QuietScreen())
    run = config(world, tmp_path / "run", **taught(world, teacher=str(tmp_path / "teacher")))
    assert run_training(run, resume=False, screen=QuietScreen())["objective"] == "distil"


def test_padded_rows_have_the_loss_of_rows_computed_one_by_one(world, tmp_path):
    by_size = []
    for size in (1, 3):
        settings = taught(world) | {"base": "bloom", "micro_batch": size, "steps": 2}
        out = tmp_path / str(size)
        run_training(config(world, out, **settings), resume=False, screen=QuietScreen())
        by_size.append([loss for _, _, loss in losses(out)])
    assert by_size[0] == pytest.approx(by_size[1], rel=ROUNDING)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(world, tmp_path):
    """The student starts from the teacher's adapter and reads the same text: the divergence is 0,
    which it is not if the teacher's positions were off by one or its adapter left out."""
    teacher = str(world / "teacher")
    settings = {"objective": {"name": "distil", "teacher": teacher}, "from_adapter": teacher}
    run_training(
        config(world, tmp_path / "a", **settings, steps=1, method="lora"),
        resume=False,
        screen=QuietScreen(),
    )
    assert losses(tmp_path / "a")[0][2] == pytest.approx(0.0, abs=1e-6)


def test_another_teacher_than_that_of_the_start_is_refused(world, tmp_path):
    """A resumed run names the content of its teacher's adapter."""
    objective = {"name": "distil", "teacher": str(world / "teacher"), "content": "0" * 64}
    with pytest.raises(ConfigError, match="not the teacher"):
        run_training(
            config(world, tmp_path / "a", objective=objective), resume=False, screen=QuietScreen()
        )


def test_rows_without_a_prompt_and_settings_without_a_teacher_are_refused(world, tmp_path):
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "only text"}) + "\n")
    settings = taught(world) | {"data": {"train": str(tmp_path / "texts.jsonl")}}
    with pytest.raises(DataError, match="D118"):
        run_training(config(world, tmp_path / "a", **settings), resume=False, screen=QuietScreen())
    (tmp_path / "long.md").write_text("word " * 9000)
    settings = taught(world, document=str(tmp_path / "long.md"))
    with pytest.raises(DataError, match=r"D118.*positions"):
        run_training(config(world, tmp_path / "b", **settings), resume=False, screen=QuietScreen())
    own = {"base": "b", "data": "d", "out": "o"}
    with pytest.raises(ConfigError, match="needs a teacher"):
        RunConfig(**own, objective="distil").objective.teacher_text()
    with pytest.raises(ConfigError, match="trains every weight"):
        RunConfig(**own, objective={"name": "distil", "system": "s"}, method="full")


def test_what_the_teacher_reads_is_its_prompt_and_the_same_answer(world):
    from veneer.runs import run_rows

    settings = config(world, "o", **taught(world, system="Be brief."))
    rows = run_rows(settings).train
    own, taught_row = rows[0], rows[1]
    assert (own.kind, taught_row.kind) == ("answer", "teacher")
    assert own.ids[own.trained].tolist() == taught_row.ids[taught_row.trained].tolist()
    assert len(taught_row.ids) > len(own.ids) + 20
    assert own.row == taught_row.row
