"""What a trainer is given by mistake ends its own step in words, and no other trainer's."""

import sys
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

import veneer
from tests.support.joint import make_world
from veneer.errors import ConfigError, DataError, VeneerError
from veneer.training.own_loop import forward_queue

ADAMW = veneer.AdamW(learning_rate=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world")) / "base"


@pytest.fixture
def base(folder):
    return veneer.load(folder)


@pytest.fixture
def trainers(base):
    pair = [base.trainer(veneer.LoRA(rank=2)) for _ in range(2)]
    yield pair
    for trainer in pair:
        trainer.close()


ROWS = [{"prompt": f"row {n}", "completion": "is " * (1 + n)} for n in range(4)]


def total(log_probs):
    return -torch.cat(log_probs).sum()


def with_backward(log_probs):
    loss = total(log_probs)
    loss.backward()
    return loss


RETURNED = {
    "a number": (lambda loss: 3.0, "the loss is of type float"),
    "nothing": (lambda loss: None, "the loss is None"),
    "no gradient": (lambda loss: loss.detach(), "without a gradient"),
    "no single number": (lambda loss: loss.repeat(2), r"shape \(2,\)"),
    "a complex number": (lambda loss: loss * 1j, "complex64"),
    "a tuple of 3": (lambda loss: (loss, {}, 1), "a tuple of 3"),
    "figures that are a number": (lambda loss: (loss, 5), "are a dict, and these are of type int"),
    "figures that are a list": (lambda loss: (loss, [1.0]), "are a dict"),
    "a figure of several": (lambda loss: (loss, {"a": torch.ones(3)}), r"a is .*shape \(3,\)"),
    "a figure in text": (lambda loss: (loss, {"a": "3"}), "a is of type str"),
    "a figure too large": (lambda loss: (loss, {"a": 10**400}), "a is of type int"),
    "a figure that is none": (lambda loss: (loss, {"a": None, "b": 1}), "a is None"),
}
RAISED = {
    "an error": (lambda log_probs: 1 / 0, "ZeroDivisionError: division by zero"),
    "an exit": (lambda log_probs: sys.exit(3), "SystemExit: 3"),
    "an error in backward": (with_backward, "second time"),
}


@pytest.mark.parametrize("name", [*RETURNED, *RAISED])
def test_a_custom_loss_that_fails_ends_its_own_step_alone(name, trainers):
    result, words = RETURNED.get(name) or RAISED[name]

    def loss_fn(examples, log_probs):
        return result(total(log_probs) if name in RETURNED else log_probs)

    bad, good = trainers
    refused, loss = bad.forward_backward_custom(ROWS[:2], loss_fn), good.forward_backward(ROWS[:2])
    assert loss.loss_sum > 0
    for failing in (
        lambda: refused.loss_sum,
        lambda: refused.metrics,
        lambda: bad.optim_step(ADAMW),
    ):
        with pytest.raises(VeneerError, match=words):
            failing()
    assert good.optim_step(ADAMW).step == 1
    assert bad.forward_backward(ROWS[:2]).loss_sum == pytest.approx(loss.loss_sum)
    assert bad.optim_step(ADAMW).gradient_norm > 0


@pytest.mark.parametrize("fault", [IndexError("no such row"), RuntimeError("a kernel failed")])
def test_any_error_of_a_forward_is_kept_for_the_trainer_that_causes_it(
    fault, trainers, monkeypatch
):
    own = forward_queue.forward_backward

    def failing(micro_batches):
        own(micro_batches)
        if any(len(micro_batch.examples) == 2 for micro_batch in micro_batches):
            raise fault

    monkeypatch.setattr(forward_queue, "forward_backward", failing)
    bad, good = trainers
    refused, loss = bad.forward_backward(ROWS[:2]), good.forward_backward(ROWS[:3])
    assert good.optim_step(ADAMW).loss_sum == loss.loss_sum
    with pytest.raises(VeneerError, match=str(fault)) as raised:
        _ = refused.loss_sum
    assert raised.value.__cause__ is fault
    with pytest.raises(VeneerError, match=str(fault)):
        bad.optim_step(ADAMW)
    bad.forward_backward(ROWS[:3])
    assert bad.optim_step(ADAMW).step == 1


def test_calls_wait_again_after_an_interruption(trainers, monkeypatch):
    first, second = trainers
    losses = [trainer.forward_backward(ROWS) for trainer in trainers]
    with monkeypatch.context() as patch:

        def interrupted(micro_batches):
            raise KeyboardInterrupt

        patch.setattr(forward_queue, "forward_backward", interrupted)
        for failing in (lambda: losses[0].loss_sum, lambda: second.optim_step(ADAMW)):
            with pytest.raises(KeyboardInterrupt):
                failing()
    assert [trainer.optim_step(ADAMW).step for trainer in (first, second)] == [1, 1]
    assert losses[0].loss_sum == pytest.approx(losses[1].loss_sum)


def norm_of_gradient(trainer):
    return float(trainer._gradient.flat.gradient.norm())


@pytest.mark.parametrize(
    "divisor", [7, Fraction(7, 2), Decimal("3.5"), np.float32(3.5), np.int64(7), torch.tensor(3.5)]
)
def test_a_gradient_is_divided_by_any_real_number(divisor, trainers):
    trainer, _ = trainers
    assert trainer.forward_backward(ROWS).loss_sum > 0
    norm = norm_of_gradient(trainer)
    step = trainer.optim_step(ADAMW, divide_by=divisor)
    assert step.gradient_norm == pytest.approx(norm / float(divisor))
    assert norm_of_gradient(trainer) == 0


@pytest.mark.parametrize(
    "divisor",
    [
        *(0, -1, float("nan"), float("inf"), 10**400, Fraction(1, 10**400), Decimal("nan")),
        *("3", None, True, np.True_, 3 + 0j, [1], torch.tensor([3.0, 4.0])),
    ],
)
def test_a_wrong_divisor_changes_nothing(divisor, trainers):
    right, wrong = trainers
    for trainer in trainers:
        trainer.forward_backward(ROWS)
    with pytest.raises(ConfigError, match=r"divide_by is .* a number above 0"):
        wrong.optim_step(ADAMW, divide_by=divisor)
    assert wrong.step == 0
    assert wrong.optim_step(ADAMW, divide_by=7) == right.optim_step(ADAMW, divide_by=7)


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), RuntimeError("no memory for this")])
def test_a_step_that_ends_in_the_optimizer_leaves_no_gradient(fault, trainers):
    def failing(*arguments):
        raise fault

    trainer, untouched = trainers
    trainer.forward_backward(ROWS)
    hook = trainer._optimizer.inner.register_step_pre_hook(failing)
    with pytest.raises(type(fault)):
        trainer.optim_step(ADAMW)
    hook.remove()
    assert norm_of_gradient(trainer) == 0
    with pytest.raises(ConfigError, match="no gradient"):
        trainer.optim_step(ADAMW)
    for each in trainers:
        each.forward_backward(ROWS[:1])
    assert trainer.optim_step(ADAMW) == untouched.optim_step(ADAMW)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"new_tokens": [5]}, "number 1 is of type int"),
        ({"new_tokens": ["<order>", None]}, "number 2 is None"),
        ({"new_tokens": 5}, "takes a list of texts, and this is of type int"),
        ({"new_tokens": None}, "takes a list of texts, and this is None"),
        ({"new_tokens": "<order>"}, "takes a list of texts, and this is of type str"),
        ({"variables": 5}, "variables is of type int, not a dict"),
        ({"variables": ["a"]}, "variables is of type list, not a dict"),
        ({"name": 5}, "named by text"),
        ({"name": ""}, "named by text"),
    ],
)
def test_an_option_of_another_kind_is_refused(options, words, base):
    with pytest.raises(ConfigError, match=words):
        base.trainer(veneer.LoRA(rank=2), **options)
    assert not base.attachments


@pytest.mark.parametrize("closed", range(3))
def test_trainers_open_whichever_others_were_closed(closed, base):
    method = veneer.LoRA(rank=2)
    opened = [base.trainer(method) for _ in range(3)]
    opened[closed].close()
    names = {base.trainer(method).name for _ in range(2)}
    assert len(base.attachments) == 4 and names <= set(base.attachments)
    assert opened[closed].name in names


TOKENS = ["<order>"]
MANY = [f"<{number}>" for number in range(60)]
"""More new tokens than the tiny base's table has rows to spare."""


@pytest.mark.parametrize(("theirs", "ours"), [(TOKENS, []), (MANY, []), (MANY, TOKENS)])
@pytest.mark.parametrize("custom", [False, True])
def test_examples_with_tokens_of_another_trainer_are_refused(theirs, ours, custom, base):
    method = veneer.LoRA(rank=2)
    other, trainer = (base.trainer(method, new_tokens=texts) for texts in (theirs, ours))
    row = {"prompt": "a", "completion": f"{theirs[-1]} b"}
    examples = other.encode([*ROWS[:2], row])
    with pytest.raises(ConfigError, match=r"token \d+ is unknown"):
        if custom:
            trainer.forward_backward_custom(examples, lambda _, log_probs: total(log_probs))
        else:
            trainer.forward_backward(examples)
    ours_alone = trainer.forward_backward(trainer.encode([*ROWS[:2], row]))
    assert trainer.forward_backward(examples[:2]).loss_sum < ours_alone.loss_sum
    assert other.forward_backward(examples).loss_sum > 0


def test_examples_that_an_adapter_cannot_learn_are_refused_however_they_come(base):
    """An activation that they lack, and positions that a prefix takes."""
    plain = base.trainer(veneer.LoRA(rank=2))
    room = base.config.max_position_embeddings
    long = {"prompt": "a", "completion": "b" * (room - 40)}
    for method, row, words in (
        (veneer.LoRA(rank=2, activation="now "), ROWS[0], "does not hold the activation"),
        (veneer.Prefix(tokens=40), long, "positions"),
    ):
        with base.trainer(method) as trainer:
            for rows in ([row], plain.encode([row])):
                with pytest.raises(DataError, match=words):
                    trainer.forward_backward(rows)


def test_a_call_of_a_detached_adapter_fails_alone(trainers, base):
    detached, good = trainers
    loss, refused = good.forward_backward(ROWS), detached.forward_backward(ROWS)
    read = detached.forward_backward(ROWS[:1])
    base.detach(detached.name)
    for failing in (
        lambda: refused.loss_sum,
        lambda: read.loss_sum,
        lambda: detached.optim_step(ADAMW),
    ):
        with pytest.raises(ConfigError, match="was detached"):
            failing()
    assert loss.loss_sum > 0 and good.optim_step(ADAMW).gradient_norm > 0


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("action", ["read", "step"])
def test_a_custom_loss_neither_reads_losses_nor_takes_steps(own, action, trainers):
    bad, good = trainers
    loss = good.forward_backward(ROWS)

    def loss_fn(examples, log_probs):
        if action == "step":
            (bad if own else good).optim_step(ADAMW)
        else:
            _ = (refused if own else loss).loss_sum
        return total(log_probs)

    refused = bad.forward_backward_custom(ROWS, loss_fn)
    for failing in (lambda: refused.loss_sum, lambda: bad.optim_step(ADAMW)):
        with pytest.raises(ConfigError, match="a loss_fn cannot read losses"):
            failing()
    assert good.optim_step(ADAMW).loss_sum == loss.loss_sum > 0
    assert (bad.step, good.step) == (0, 1)
