"""Own answers of a student: drawn as it stands, the same after a resume, the formula over them."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.objectives.test_distil import by_rows, inputs_of, taught_rows
from tests.support.helpers import killed_after_saving
from tests.support.joint import FLOAT32, assert_same_run, config, losses, make_world, together
from tests.support.tiny import tiny_tokenizer
from veneer.adapters.placement.acting import Acting
from veneer.data.batching import RowSpans
from veneer.data.own_answers import TaughtPair, with_longest_answers
from veneer.kernels.dense.divergence import Divergence
from veneer.models.frozen_base import FrozenBase
from veneer.objectives.config import Distil, OwnAnswersConfig
from veneer.plan.workload import Workload
from veneer.runs import run_rows
from veneer.training.drawn_rows.own_answers import OwnAnswers
from veneer.training.gradient import StepGradient, forward_backward
from veneer.training.output.screen import QuietScreen
from veneer.training.processes.world import ALONE
from veneer.training.run import run_training
from veneer.training.state.folder import resume_config


def generalized_jsd_loss(student_logits, teacher_logits, beta, temperature):
    """TRL's GKDTrainer.generalized_jsd_loss for one batch without a mask (its main of Aug 2026)."""
    log_q = F.log_softmax(student_logits / temperature, dim=-1)
    log_p = F.log_softmax(teacher_logits / temperature, dim=-1)
    if beta == 0:
        jsd = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    elif beta == 1:
        jsd = F.kl_div(log_p, log_q, reduction="none", log_target=True)
    else:
        beta = torch.tensor(beta, dtype=log_q.dtype)
        log_m = torch.logsumexp(
            torch.stack([log_q + torch.log1p(-beta), log_p + torch.log(beta)]), dim=0
        )
        kl_teacher = F.kl_div(log_m, log_p, reduction="none", log_target=True)
        kl_student = F.kl_div(log_m, log_q, reduction="none", log_target=True)
        jsd = beta * kl_teacher + (1 - beta) * kl_student
    return jsd.sum() / len(jsd)


@pytest.mark.parametrize(
    ("kind", "beta"), [("forward", 0), ("reverse", 1), ("jensen_shannon", 0.3)]
)
def test_the_divergence_is_that_of_trl_times_the_square_of_the_temperature(kind, beta):
    z = torch.randn(2, 9, 40, dtype=torch.float64)
    ours = Divergence(kind, 1.7, 0.3).of_logits(*z).mean()
    torch.testing.assert_close(ours, generalized_jsd_loss(*z, beta, 1.7) * 1.7**2)


def drawing(tmp_path, share=1.0, tokens=7):
    examples = taught_rows()
    objective = Distil(teacher="t", own_answers=share, answer_tokens=tokens)
    inputs = inputs_of(objective, examples, tmp_path)
    base = FrozenBase(inputs.model, tiny_tokenizer(), "tiny", "tiny", None, routing=inputs.routing)
    own = OwnAnswers(
        base,
        OwnAnswersConfig(share, tokens),
        examples,
        inputs.rows,
        length=12,
        teacher_length=1000,
        seed=3,
        sharded=False,
    )
    return inputs, own


def test_answers_are_those_of_the_student_as_it_stands_and_the_loss_is_the_formula(tmp_path):
    inputs, own = drawing(tmp_path)
    with inputs.routing.held(Acting.everywhere(inputs.adapters)):
        drawn = own.draw(range(6), epoch=0, index=1, world=ALONE)
        again = own.draw(range(6), epoch=0, index=1, world=ALONE)
        later = own.draw(range(6), epoch=0, index=2, world=ALONE)
    with inputs.routing.none():
        by_base = own.draw(range(6), epoch=0, index=1, world=ALONE)
    assert drawn.keys() == set(range(12))
    assert any(not np.array_equal(drawn[n].ids, by_base[n].ids) for n in drawn)
    assert all(np.array_equal(drawn[n].ids, again[n].ids) for n in drawn)
    assert any(not np.array_equal(drawn[n].ids, later[n].ids) for n in drawn)
    for number in range(0, 12, 2):
        student, teacher = drawn[number], drawn[number + 1]
        assert student.ids[student.trained].tolist() == teacher.ids[teacher.trained].tolist()
        assert 1 <= student.trained_tokens <= 8 and len(student.ids) <= 12
    rows = [drawn[number] for number in range(12)]
    gradient = StepGradient(inputs, ALONE)
    parts = [inputs.rows.examples(range(n, n + 3)) for n in (0, 3)]
    gradient.begin(range(6), parts, step=0, overrides=drawn)
    while gradient.assigned:
        forward_backward([gradient.take()])
    totals = gradient.finish()
    _, loss, gradients = by_rows(inputs.config.objective, rows, "all-linear")
    assert totals.loss == pytest.approx(loss, rel=1e-5)
    assert totals.trained_tokens == sum(row.trained_tokens for row in rows[::2])
    for parameter, theirs in zip(inputs.flat.parameters.values(), gradients, strict=True):
        torch.testing.assert_close(
            parameter.grad, theirs.float(), rtol=1e-3, atol=1e-4 * float(theirs.abs().max())
        )


def test_a_share_of_the_rows_is_answered_and_no_text_is_longer_than_planned(tmp_path):
    inputs, own = drawing(tmp_path, share=0.5)
    chosen = [len(own._chosen(range(100), 0, index)) for index in range(4)]
    assert all(30 < count < 70 for count in chosen) and len(set(chosen)) > 1
    longest = own.longest
    with inputs.routing.held(Acting.everywhere(inputs.adapters)):
        drawn = own.draw(range(6), epoch=2, index=0, world=ALONE)
    assert 0 < len(drawn) < 12
    assert all(len(example.ids) <= len(longest[number].ids) for number, example in drawn.items())
    pair = TaughtPair(*inputs.train[:2], length=5, teacher_length=1000)
    student, teacher = pair.with_answer(range(10))
    assert len(student.ids) == 5 and teacher.trained_tokens == student.trained_tokens
    assert with_longest_answers(
        inputs.train, RowSpans.of(inputs.train), 1, length=50, teacher_length=50
    ) == list(inputs.train)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def own_answers(share, **settings):
    objective = {"name": "distil", "system": "Answer with is.", "own_answers": share}
    return {"objective": {**objective, "answer_tokens": 9}, **settings}


def test_a_run_resumes_to_the_bit_and_is_the_same_beside_another_job(world, tmp_path):
    settings = own_answers(0.6, method={"name": "lora", "rank": 4, "dropout": 0.2})
    run_training(config(world, tmp_path / "whole", **settings), resume=False, screen=QuietScreen())
    with killed_after_saving(4):
        run_training(
            config(world, tmp_path / "part", **settings), resume=False, screen=QuietScreen()
        )
    run_training(resume_config(str(tmp_path / "part")), resume=True, screen=QuietScreen())
    assert_same_run(tmp_path / "part", tmp_path / "whole", tolerance=0.0)
    jobs = {"own": settings, "plain": {"seed": 3}}
    together([config(world, tmp_path / "joint" / n, **jobs[n]) for n in jobs])
    assert_same_run(tmp_path / "joint" / "own", tmp_path / "whole", tolerance=100 * FLOAT32)
    run_training(
        config(world, tmp_path / "given", **{**settings, **own_answers(0.0)}, steps=2),
        resume=False,
        screen=QuietScreen(),
    )
    assert losses(tmp_path / "given")[:1] == losses(tmp_path / "whole")[:1]
    assert losses(tmp_path / "given")[1] != losses(tmp_path / "whole")[1]


def test_a_plan_takes_answers_at_their_longest(world):
    settings = config(world, "o", **own_answers(0.5))
    data = run_rows(settings)
    planned = Workload.of(settings, data).rows
    assert max(len(row.ids) for row in planned) >= max(len(row.ids) for row in data.train)
    assert sum(len(row.ids) for row in planned) > sum(len(row.ids) for row in data.train)


def test_a_plan_reads_the_rows_of_a_teacher_beyond_the_length_of_the_student(world, tmp_path):
    document = tmp_path / "document.txt"
    document.write_text("one two three " * 60)
    objective = {"name": "distil", "document": str(document)}
    settings = config(world, "o", length=60, objective=objective)
    workload = Workload.of(settings, run_rows(settings))
    for length in (60, 30):
        rows, _ = workload._cut_rows(length)
        own, taught = rows[::2], rows[1::2]
        assert len(own) == len(taught) > 0 and max(len(row.ids) for row in own) <= length
        for student, teacher in zip(own, taught, strict=True):
            assert teacher.kind == "teacher" and len(teacher.ids) > 500
            assert teacher.trained_tokens == student.trained_tokens > 0
