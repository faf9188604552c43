"""Jobs that fail leave a joint training: they are told at once, the others do not notice."""

import os
import signal

import pytest

from tests.support.joint import JOBS, alone, assert_same_run, config, make_world, together
from veneer.errors import DivergedError, DoesNotFitError, RunInterrupted, VeneerError
from veneer.kernels.bindings.library import has_bf16
from veneer.objectives.objective import ObjectiveLoss
from veneer.training import gradient, loop
from veneer.training.output.screen import QuietScreen
from veneer.training.run import run_training
from veneer.training.state.checkpoint import newest_valid
from veneer.training.state.folder import resume_config
from veneer.training.trainee import Trainee


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def poisoned(monkeypatch, *, seed, step):
    """The loss of the job with this seed is NaN at this step."""
    own = gradient.batch_losses

    def batch_losses(base, batch, shares):
        found = own(base, batch, shares)
        return [
            ObjectiveLoss(share.loss * float("nan")) if name in poisons else share
            for share, name in zip(found, names_now, strict=True)
        ]

    names_now, poisons = [], set()
    own_forward = loop.forward_backward

    def forward_backward(micro_batches):
        gradients = [micro_batch.gradient for micro_batch in micro_batches]
        names_now[:] = [g.inputs.out for g in gradients]
        poisons.clear()
        poisons.update(
            g.inputs.out for g in gradients if (g.inputs.config.seed, g.step) == (seed, step)
        )
        own_forward(micro_batches)

    monkeypatch.setattr(gradient, "batch_losses", batch_losses)
    monkeypatch.setattr(loop, "forward_backward", forward_backward)


def test_a_job_that_diverges_leaves_and_the_others_do_not_notice(world, tmp_path, monkeypatch):
    names = ("lora", "dropout", "dora")
    with monkeypatch.context() as patch:
        poisoned(patch, seed=3, step=4)
        finished = []
        results = together(
            [config(world, tmp_path / "joint" / n, **JOBS[n]) for n in names],
            finished=lambda job, result: finished.append((job.config.out, result)),
        )
    assert isinstance(results[0], DivergedError) and "step 5" in str(results[0])
    assert finished[0] == (str(tmp_path / "joint" / "lora"), results[0])
    assert not (tmp_path / "joint" / "lora" / "summary.json").exists()
    assert int(newest_valid(tmp_path / "joint" / "lora" / "checkpoints")[0].name) == 4
    for name in names[1:]:
        alone(world, tmp_path / "alone" / name, **JOBS[name])
        assert_same_run(tmp_path / "joint" / name, tmp_path / "alone" / name)
    resumed = run_training(
        resume_config(tmp_path / "joint" / "lora"), resume=True, screen=QuietScreen()
    )
    assert resumed["steps"] == 6
    alone(world, tmp_path / "alone" / "lora", **JOBS["lora"])
    assert_same_run(tmp_path / "joint" / "lora", tmp_path / "alone" / "lora")


def test_a_failed_job_is_told_while_the_others_train(world, tmp_path, monkeypatch):
    poisoned(monkeypatch, seed=3, step=1)
    own, steps, told = Trainee.begin_step, [], []

    def begin_step(self):
        steps.append(self.progress.step)
        own(self)

    monkeypatch.setattr(Trainee, "begin_step", begin_step)
    together(
        [config(world, tmp_path / n, **JOBS[n]) for n in ("lora", "exact")],
        finished=lambda job, result: told.append((job.config.out, steps[-1])),
    )
    assert told == [(str(tmp_path / "lora"), 1), (str(tmp_path / "exact"), 5)]


def test_an_interrupt_tells_of_a_job_that_failed_in_the_same_round(world, tmp_path, monkeypatch):
    poisoned(monkeypatch, seed=3, step=2)
    own = Trainee.begin_step

    def begin_step(self):
        if self.progress.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        own(self)

    monkeypatch.setattr(Trainee, "begin_step", begin_step)
    with pytest.raises(RunInterrupted) as caught:
        together([config(world, tmp_path / n, **JOBS[n]) for n in ("lora", "exact")])
    assert "T601 the loss is nan at step 3" in str(caught.value)
    assert caught.value.next_step == f"Continue with: veneer train --resume {tmp_path / 'exact'}"


NO_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"


@pytest.mark.parametrize("after", ["forward", "backward"])
@pytest.mark.parametrize("base", ["base", "wide"])
def test_forwards_that_do_not_fit_get_smaller(after, base, world, tmp_path, monkeypatch):
    """Steps begin again: nothing of a forward that ran out of memory is left in a gradient."""
    own, own_losses, sizes, big = loop.forward_backward, gradient.batch_losses, [], [False]

    def forward_backward(micro_batches):
        sizes.append(len(micro_batches))
        # 4 do not fit from the start on, 3 from later on.
        big[0] = sizes[-1] == 4 or (sizes[-1] == 3 and len(sizes) > 12)
        own(micro_batches)
        if big[0]:
            raise RuntimeError(NO_MEMORY)

    def batch_losses(*arguments):
        found = own_losses(*arguments)
        if big[0] and after == "forward":
            raise RuntimeError(NO_MEMORY)
        return found

    names = ("lora", "dropout", "batch", "exact")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "forward_backward", forward_backward)
        patch.setattr(gradient, "batch_losses", batch_losses)
        results = together([config(world, tmp_path / n, base=base, **JOBS[n]) for n in names])
    assert 4 in sizes and 2 in sizes and not any(isinstance(r, VeneerError) for r in results)
    for name in names:
        alone(world, tmp_path / "alone" / name, base=base, **JOBS[name])
        if base == "base" or has_bf16():
            assert_same_run(tmp_path / name, tmp_path / "alone" / name)


@pytest.mark.parametrize("step", [0, 3])
def test_a_job_that_does_not_fit_by_itself_leaves(step, world, tmp_path, monkeypatch):
    """Before the first step, in the trial of its largest batch, or later."""
    own = loop.forward_backward

    def forward_backward(micro_batches):
        for micro_batch in micro_batches:
            if micro_batch.gradient.inputs.config.seed == 3 and micro_batch.gradient.step == step:
                raise RuntimeError(NO_MEMORY)
        own(micro_batches)

    names = ("lora", "batch", "exact")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "forward_backward", forward_backward)
        results = together([config(world, tmp_path / n, **JOBS[n]) for n in names])
    assert isinstance(results[0], DoesNotFitError) and "a batch of 3 rows" in str(results[0])
    for name in names[1:]:
        alone(world, tmp_path / "alone" / name, **JOBS[name])
        assert_same_run(tmp_path / name, tmp_path / "alone" / name)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_values_that_are_not_finite_reach_no_neighbour(poison, world, tmp_path, monkeypatch):
    """Its adapter itself computes NaN, in forward and backward, in every module."""
    own = Trainee.begin_step

    def begin_step(self):
        if self.inputs.config.seed == 3 and self.progress.step == 2:
            self.inputs.flat.values.data.fill_(poison)
        own(self)

    names = ("lora", "dropout", "bottleneck", "prefix")
    with monkeypatch.context() as patch:
        patch.setattr(Trainee, "begin_step", begin_step)
        results = together([config(world, tmp_path / "joint" / n, **JOBS[n]) for n in names])
    assert isinstance(results[0], DivergedError)
    for name in names[1:]:
        alone(world, tmp_path / "alone" / name, **JOBS[name])
        assert_same_run(tmp_path / "joint" / name, tmp_path / "alone" / name)
