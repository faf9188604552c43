"""The gradients of optimizer steps: forward and backward of micro-batches, of one trainee or of
several at once, summed over all processes.

forward_backward computes for everything that collects gradients: here a run's step, and the step of
a loop that a user writes (own_loop/).

Raises before any weight changes if a loss is not finite. Knows nothing of optimizers, evaluations
or checkpoints.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from veneer.adapters.placement.acting import Acting, TokenKeys, in_turn
from veneer.data.batching import Batch, used_length
from veneer.data.examples import Example
from veneer.data.joint_batch import join_batches
from veneer.errors import DivergedError, DoesNotFitError, fits_memory
from veneer.kernels.layers.block import adding_gradients_in_place
from veneer.models.step import BatchShare, batch_losses, parts_of
from veneer.objectives.objective import AnswerBatch, BatchLoss, ObjectiveLoss, Predictions
from veneer.training.drawn_rows.replay import Replay
from veneer.training.inputs import ForwardInputs, TrainingInputs
from veneer.training.optimizer.offload import Offload, offload_for, offloaded
from veneer.training.processes.assignment import assign_by_cost, group_by_cost
from veneer.training.processes.reduce import KINDS
from veneer.training.processes.world import World
from veneer.training.teachers.teacher import Taught, predict_as_teachers, teacher_examples

FEWER_VALUES = (
    "Train fewer values (an adapter instead of full, a smaller --rank), or --set"
    " optimizer=adamw8bit."
)


@dataclass(frozen=True)
class StepTotals:
    """Totals of one step over all processes.

    loss: the objective's; of answers nats per trained token. norm: the gradient's. figures: what
    the objective shows besides.
    """

    loss: float
    norm: float
    tokens: int
    trained_tokens: int
    computed_tokens: int
    figures: Mapping[str, float]
    replay: float | None = None


class GradientCollector(Protocol):
    """Collects the gradient of one step in the buffer of its adapter.

    step: number of steps before this one, from which dropout masks are drawn
    """

    step: int
    offload: Offload | None

    @property
    def forward(self) -> ForwardInputs:
        """Returns what a forward over its rows needs."""

    def add(self, micro_batch: "MicroBatch", result: ObjectiveLoss, batch: Batch) -> None:
        """Adds the result of a micro-batch, whose gradient is in the buffer."""


class StepGradient:
    """The gradient of one trainee's step, in its flat buffer; forward_backward adds to it.

    rows       rows of the step, for errors
    seconds    seconds that the step took so far
    assigned   micro-batches that this process still has to compute, as of own_micro_batches
    """

    def __init__(self, inputs: TrainingInputs, world: World) -> None:
        self.inputs, self.world, self.forward = inputs, world, inputs.forward
        flat = inputs.flat
        self.sum = KINDS[inputs.config.reduce](flat.gradient, world, apart=flat.apart)
        weights = [*inputs.model.parameters(), *inputs.model.buffers(), flat.values]
        self.offload = offload_for(flat.values.device, weights) if inputs.config.offload else None
        self.rows: Sequence[int] = ()
        self.micro_batches: Sequence[Sequence[int]] = ()
        self.replayed: Sequence[Sequence[Example]] = ()
        self.overrides: Mapping[int, Example] = {}
        self.step, self.seconds, self.total = 0, 0.0, 0.0
        self.assigned: deque[tuple[int, bool]] = deque()
        self._losses: dict[int, Tensor] = {}
        self._figures: list[Tensor] = []
        self._tokens = [0, 0, 0]

    def begin(
        self,
        rows: Sequence[int],
        micro_batches: Sequence[Sequence[int]],
        *,
        step: int,
        replays: bool = False,
        overrides: Mapping[int, Example] = MappingProxyType({}),
    ) -> None:
        """Begins the gradient of the objective over the examples of these micro-batches.

        step: number of steps before this one. replays: whether replay rows are added. overrides:
        examples in place of those of the rows, by number
        """
        inputs = self.inputs
        self.rows, self.micro_batches, self.step = rows, micro_batches, step
        self.overrides = overrides
        examples = [self._example(i) for part in micro_batches for i in part]
        self.total = float(inputs.objective.counts(examples).sum())
        replay = inputs.replay if replays else None
        self.replayed = [] if replay is None else self._divided(replay, step)
        self.seconds = 0.0
        self._assign()

    def _divided(self, replay: Replay, step: int) -> list[list[Example]]:
        """Returns the replay rows of a step, divided into the forwards that the model requires."""
        inputs, examples, parts = self.inputs, replay.examples, replay.micro_batches(step)
        with inputs.routing.held(Acting.everywhere(inputs.adapters)):
            forwards = list(parts_of(inputs, examples, parts))
        return [[examples[number] for number in forward] for forward in forwards]

    def begin_again(self) -> None:
        """Drops what was computed of the step, and begins it with the same micro-batches."""
        self.inputs.flat.gradient.zero_()
        self._assign()

    def _assign(self) -> None:
        inputs = self.inputs
        self._losses, self._figures, self._tokens = {}, [], [0, 0, 0]
        parts = map(self._examples, range(self._num_micro_batches))
        self.assigned = deque(own_micro_batches(parts, self.world, sharded=inputs.sharded))
        self.sum.begin()

    @property
    def _num_micro_batches(self) -> int:
        return len(self.micro_batches) + len(self.replayed)

    def _examples(self, number: int) -> Sequence[Example]:
        """Returns the examples of a micro-batch; those of replay rows come last."""
        if number >= len(self.micro_batches):
            return self.replayed[number - len(self.micro_batches)]
        return [self._example(i) for i in self.micro_batches[number]]

    def _example(self, number: int) -> Example:
        """Returns a training example, with the student's own answer if it has drawn one."""
        return self.overrides.get(number) or self.inputs.train[number]

    def take(self) -> "MicroBatch":
        """Takes the next micro-batch that this process computes."""
        inputs = self.inputs
        number, counts = self.assigned.popleft()
        if number >= len(self.micro_batches):
            return self._replay_micro_batch(number, counts)
        examples, taught = self._examples(number), None
        if inputs.objective.has_teacher:
            taught = Taught(inputs.teacher, teacher_examples(examples))
        # If another process counts it, the loss is divided by infinity, so the gradient is 0.
        total = self.total if counts else math.inf
        return MicroBatch(
            self,
            number,
            counts,
            inputs.objective,
            inputs.answers(self.micro_batches[number], examples),
            total,
            taught,
        )

    def _replay_micro_batch(self, number: int, counts: bool) -> "MicroBatch":
        """Returns a micro-batch of replay rows, whose teacher is the base alone."""
        assert self.inputs.replay is not None
        examples = self._examples(number)
        total = sum(example.trained_tokens for part in self.replayed for example in part)
        return MicroBatch(
            self,
            number,
            counts,
            self.inputs.replay.objective,
            AnswerBatch.without_reference(examples),
            total if counts else math.inf,
            Taught(self.inputs.base_as_teacher, examples),
        )

    def next_lengths(self) -> list[int]:
        """Counts the tokens of each example of the next micro-batch."""
        number, _ = self.assigned[0]
        return [used_length(example) for example in self._examples(number)]

    def add(self, micro_batch: "MicroBatch", result: ObjectiveLoss, batch: Batch) -> None:
        """Adds the result of a micro-batch, whose gradient is in the flat buffer."""
        self.sum.add()
        if micro_batch.counts:
            self._losses[micro_batch.number] = result.loss.detach()
            if result.figures is not None:
                self._figures.append(result.figures)
            is_own = micro_batch.number < len(self.micro_batches)
            trained = batch.trained_tokens if is_own else 0
            counts = batch.tokens, trained, batch.computed_tokens
            self._tokens = [sum(pair) for pair in zip(self._tokens, counts, strict=True)]

    def finish(self) -> StepTotals:
        """Adds up the gradients of all processes; returns the totals of the step.

        Raises DivergedError if a loss is not finite, and DoesNotFitError.
        """
        own_losses, norm, own_figures = self._read()
        # A loss is 0 at all processes but one, so these sums are exact.
        all_losses = [own_losses.get(number, 0.0) for number in range(self._num_micro_batches)]
        sums = self.world.summed([*all_losses, *self._tokens, *own_figures])
        all_losses, sums = sums[: len(all_losses)], sums[len(all_losses) :]
        tokens, trained_tokens, computed_tokens, *figures = sums
        norm = self.sum.norm(norm)
        for number, loss_value in enumerate(all_losses):
            if not math.isfinite(loss_value):
                examples = self._examples(number)
                raise diverged(self.inputs, "loss", loss_value, examples, step=self.step)
        own = len(self.micro_batches)
        return StepTotals(
            sum(all_losses[:own]),
            norm,
            round(tokens),
            round(trained_tokens),
            round(computed_tokens),
            self.inputs.objective.summary(figures),
            self._replay_mean(all_losses[own:]),
        )

    def _replay_mean(self, losses: Sequence[float]) -> float | None:
        """Returns the mean KL to the base from the weighted losses of replay rows."""
        replay = self.inputs.replay
        return None if replay is None or not losses else sum(losses) / replay.objective.weight

    def _read(self) -> tuple[dict[int, float], float, list[float]]:
        """Returns this process's losses, the measured norm, and sums of the objective's figures.

        Reads all numbers at once: nowhere else in a step does the host wait for a GPU.
        """
        with fits_memory(
            f"on the gradient of step {self.step + 1}",
            next_step=self.inputs.memory_advice(FEWER_VALUES),
        ):
            self.sum.finish()
            measured = self.sum.measured()
        losses, figures = self._losses, [0.0] * self.inputs.objective.num_figures
        own = [sum(self._figures[1:], start=self._figures[0])] if self._figures else []
        parts = [*(n.view(1) for n in (measured, *losses.values())), *own]
        norm, *values = torch.cat(parts).tolist()
        figures = values[len(losses) :] or figures
        return dict(zip(losses, values, strict=False)), norm, figures

    def batch_words(self) -> tuple[int, int, list[str]]:
        """Returns the number of rows and tokens of the step, and the places of some rows in
        their files."""
        rows, train = self.inputs.rows, self.inputs.train
        tokens = int(rows.lengths[self.rows].sum())
        places = [str(train[i].ref) for i in rows.examples(self.rows)[:8]]
        return len(self.rows), tokens, places


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of one step, for forward_backward.

    number: its place among the step's micro-batches. counts: False if another process counts it.
    total: number by which its loss is divided. taught: a teacher, and the examples that it reads.
    """

    gradient: GradientCollector
    number: int
    counts: bool
    objective: BatchLoss
    answers: AnswerBatch
    total: float
    taught: Taught | None = None

    @property
    def examples(self) -> Sequence[Example]:
        return self.answers.examples

    def batch(self) -> Batch:
        """Builds the batch that a forward of its own would compute."""
        return self.gradient.forward.batch(self.examples)

    def loss(self, predictions: Predictions, teacher: Predictions | None) -> ObjectiveLoss:
        """Computes its part of the step's loss from predictions of its targets."""
        return self.objective.loss(predictions, replace(self.answers, teacher=teacher), self.total)


def forward_backward(micro_batches: Sequence[MicroBatch]) -> None:
    """Runs one forward and backward of micro-batches, at most one of each step.

    Products with the base are computed once over all rows; each adapter acts on its own rows, so
    a loss that is not finite reaches no other trainee's gradient.
    """
    gradients = [micro_batch.gradient for micro_batch in micro_batches]
    inputs = gradients[0].forward
    teachers = predict_as_teachers([micro_batch.taught for micro_batch in micro_batches])
    parts = [micro_batch.batch() for micro_batch in micro_batches]
    batch, rows = join_batches(parts)
    shares = [
        BatchShare(
            m.gradient.forward.adapters, part.trained_tokens, partial(m.loss, teacher=teacher)
        )
        for m, part, teacher in zip(micro_batches, parts, teachers, strict=True)
    ]
    draws = [
        (count, gradient.step, gradient.forward.seed)
        for gradient, count in zip(gradients, rows, strict=True)
    ]
    acting = in_turn([(n, share.adapters) for n, share in zip(rows, shares, strict=True)])
    keys = TokenKeys.of_runs(batch.dropout_rows, draws)
    with inputs.routing.held(acting.drawing(keys)):
        with offloaded(gradients[0].offload):
            losses = batch_losses(inputs, batch, shares)
        with adding_gradients_in_place():
            sum((share.loss for share in losses[1:]), start=losses[0].loss).backward()
    for gradient, micro_batch, result, part in zip(
        gradients, micro_batches, losses, parts, strict=True
    ):
        gradient.add(micro_batch, result, part)


def out_of_memory(gradient: StepGradient) -> DoesNotFitError:
    """The error for a micro-batch of this step that does not fit, with some rows of the step."""
    rows, tokens, places = gradient.batch_words()
    return DoesNotFitError(
        f"out of memory on a batch of {rows} rows, {tokens} tokens",
        places,
        "Try --checkpointing, a smaller --set micro_batch=N, or a smaller --length.",
    )


def own_micro_batches(
    micro_batches: Iterable[Iterable[Example]], world: World, *, sharded: bool
) -> list[tuple[int, bool]]:
    """Lists the micro-batches that this process computes, and whether their result counts.

    All processes gather sharded layers together, so each computes in every round. A process without
    a micro-batch of its own computes that of another process, and its result does not count.
    """
    costs = [sum(map(used_length, part)) for part in micro_batches]
    if not sharded:
        owners = assign_by_cost(costs, world.size)
        return [(number, True) for number, owner in enumerate(owners) if owner == world.rank]
    return [
        (numbers[min(world.rank, len(numbers) - 1)], world.rank < len(numbers))
        for numbers in group_by_cost(costs, world.size)
    ]


def diverged(
    inputs: TrainingInputs, figure: str, value: float, examples: Sequence[Example], *, step: int
) -> DivergedError:
    """Drops the gradient and returns the error for a loss or norm that is not finite."""
    inputs.flat.gradient.zero_()
    rows = [str(example.ref) for example in examples]
    return DivergedError(
        f"T601 the {figure} is {value} at step {step + 1}; the weights are those of step {step}",
        [f"rows of this batch: {', '.join(rows)}"],
        f"Try a lower --learning-rate (now {inputs.learning_rate:g}), or look at these rows; "
        f"checkpoints up to here are in {inputs.out / 'checkpoints'}.",
    )
