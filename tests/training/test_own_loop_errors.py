"""What a trainer is given by mistake ends its own step in words, and no other trainer's."""

import sys

import pytest
import torch

import veneer
from tests.support.joint import make_world
from veneer.errors import VeneerError
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
