"""Calls of `Trainer.forward_backward`, which wait until a number of theirs is needed.

The calls of all trainers of a base wait in one queue. Its forwards take the next micro-batch of
every trainer, so trainers that are called in turn share them: the products of the base are computed
once over all rows. If the rows do not fit into memory together, forwards get smaller, and the steps
of their trainers are computed again.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import Tensor

from veneer.adapters.placement.acting import Acting
from veneer.adapters.placement.attachment import Attachment
from veneer.data.batching import Batch, used_length
from veneer.data.examples import Example
from veneer.errors import ConfigError, DivergedError, DoesNotFitError, VeneerError, is_out_of_memory
from veneer.execution.proofs.model import acting_prefix_length
from veneer.execution.stand_in import StandIn
from veneer.execution.train_step import fused, one_node, replacements
from veneer.models.frozen_base import FrozenBase
from veneer.models.step import parts_of
from veneer.objectives.answers import AnswersObjective
from veneer.objectives.objective import AnswerBatch, BatchLoss, ObjectiveLoss, Predictions
from veneer.training.forward_room import ForwardRoom
from veneer.training.gradient import MicroBatch, forward_backward
from veneer.training.inputs import ForwardInputs
from veneer.training.optimizer.buffer import FlatParameters
from veneer.training.optimizer.heap import steady_heap
from veneer.training.optimizer.offload import Offload

_SUM = AnswersObjective()
"""Divided by 1 it is the sum of -log p over the trained tokens."""


class SummedLoss:
    """The loss of one `forward_backward` call; it is computed when `loss_sum` is first read.

    rows    number of rows of the call
    tokens  number of trained tokens of the call
    """

    def __init__(self, examples: Sequence[Example], compute: Callable[[], None]) -> None:
        self.examples, self._compute = examples, compute
        self.rows = len(examples)
        self.tokens = sum(example.trained_tokens for example in examples)
        self._losses: dict[int, Tensor] = {}
        self._sum: float | None = None
        self._fault: VeneerError | None = None

    @property
    def loss_sum(self) -> float:
        """Returns the sum of -log p (nats) over the trained tokens of the call.

        Raises the error that ended the computation of this step.
        """
        if self._sum is None and self._fault is None:
            self._compute()
        if self._fault is not None:
            raise self._fault
        if self._sum is None:
            self._sum = float(torch.stack(list(self._losses.values())).sum())
        return self._sum

    def objective(self, part: Sequence[int]) -> BatchLoss:
        """Returns what computes the loss of a micro-batch. part: numbers of its examples"""
        return _SUM

    def add(self, part: int, loss: Tensor) -> None:
        """Adds the loss of one of the call's micro-batches; a later one of this number replaces
        it."""
        self._losses[part] = loss.detach()

    def fail(self, fault: VeneerError) -> None:
        """Keeps the error, unless the loss was read already."""
        if self._sum is None:
            self._fault = fault

    def __repr__(self) -> str:
        loss = "not computed yet" if self._sum is None else f"{self._sum:.6g}"
        return f"SummedLoss(loss_sum={loss}, tokens={self.tokens}, rows={self.rows})"


LossFunction = Callable[
    [Sequence[Example], list[Tensor]], Tensor | tuple[Tensor, Mapping[str, float]]
]
"""Takes the examples of a call, and for each the log p of its trained tokens, with a gradient.
Returns a loss, or a loss and figures by name."""


class CustomLoss(SummedLoss):
    """The loss of one `forward_backward_custom` call. `loss_sum` is what the function returned."""

    def __init__(
        self, examples: Sequence[Example], compute: Callable[[], None], function: LossFunction
    ) -> None:
        super().__init__(examples, compute)
        self._function = function
        self._metrics: dict[str, float] = {}

    @property
    def metrics(self) -> dict[str, float]:
        """Returns the figures that the function returned."""
        _ = self.loss_sum
        return self._metrics

    def objective(self, part: Sequence[int]) -> BatchLoss:
        return FunctionLoss(self, part)

    def call(self, log_probs: list[Tensor]) -> Tensor:
        """Calls the function, and keeps its figures. log_probs: of each example of the call"""
        try:
            result = self._function(self.examples, log_probs)
        except Exception as fault:
            raise ConfigError(f"loss_fn raised {type(fault).__name__}: {fault}") from fault
        loss, metrics = result if isinstance(result, tuple) else (result, {})
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ConfigError(
                "loss_fn returned no loss that depends on the log-probabilities",
                next_step="Return one number as a tensor, or that and a dict of figures.",
            )
        self._metrics = {name: float(value) for name, value in metrics.items()}
        return loss.reshape(())


@dataclass(frozen=True)
class FunctionLoss:
    """The loss of the only micro-batch of a custom call. part: numbers of its examples"""

    custom: CustomLoss
    part: Sequence[int]

    def loss(self, predictions: Predictions, answers: AnswerBatch, total: float) -> ObjectiveLoss:
        counts = [example.trained_tokens for example in answers.examples]
        log_probs = dict(zip(self.part, (-predictions.nats()).split(counts), strict=True))
        return ObjectiveLoss(self.custom.call([log_probs[i] for i in range(len(counts))]))


class TrainerGradient:
    """The gradient of a trainer's next step: of the calls since its last one.

    step: number of steps before this one
    """

    offload: Offload | None = None

    def __init__(self, forward: ForwardInputs, flat: FlatParameters) -> None:
        self.forward, self.flat = forward, flat
        self.step = 0
        self.calls: list[SummedLoss] = []
        self.waiting: deque[MicroBatch] = deque()
        self._of_micro_batch: list[tuple[SummedLoss, int]] = []
        self._fault: VeneerError | None = None

    def add_call(self, call: SummedLoss) -> None:
        self._divide(call)
        self.calls.append(call)

    def _divide(self, call: SummedLoss) -> None:
        """Divides a call into the micro-batches that the model requires, one for most models."""
        forward, examples = self.forward, call.examples
        with forward.routing.held(Acting.everywhere(forward.adapters)):
            rows = [list(range(len(examples)))]
            parts = list(parts_of(forward.model, forward.paths, examples, rows))
        if len(parts) > 1 and isinstance(call, CustomLoss):
            raise ConfigError(
                f"loss_fn takes all rows of a call, and this base computes them in {len(parts)}"
                " forwards",
                next_step="Give fewer rows in a call: several calls add up.",
            )
        for number, part in enumerate(parts):
            place = len(self._of_micro_batch)
            self._of_micro_batch.append((call, number))
            answers = AnswerBatch.without_reference([examples[i] for i in part])
            objective = call.objective(part)
            self.waiting.append(MicroBatch(self, place, True, objective, answers, total=1.0))

    def next_lengths(self) -> list[int]:
        """Counts the tokens of each example of the next micro-batch, with those of a prefix."""
        with self.forward.routing.held(Acting.everywhere(self.forward.adapters)):
            prefix = acting_prefix_length(self.forward.model)
        return [prefix + used_length(example) for example in self.waiting[0].examples]

    def add(self, micro_batch: MicroBatch, result: ObjectiveLoss, batch: Batch) -> None:
        """Adds the loss of a micro-batch, whose gradient is in the buffer."""
        call, part = self._of_micro_batch[micro_batch.number]
        call.add(part, result.loss)

    def begin_again(self) -> None:
        """Drops what was computed of the step; all of its calls wait again."""
        self._drop()
        for call in self.calls:
            self._divide(call)

    def fail(self, fault: VeneerError) -> None:
        """Drops the step. Its calls that were not read keep the error, and so does the step."""
        self._drop()
        for call in self.calls:
            call.fail(fault)
        self._fault = fault

    def _drop(self) -> None:
        self.flat.gradient.zero_()
        self.waiting.clear()
        self._of_micro_batch.clear()

    def end(self) -> list[SummedLoss]:
        """Ends the step and returns its calls. Raises the error that ended it before, and drops the
        gradient of calls that came after the error."""
        calls, fault = self.calls, self._fault
        self.calls, self._fault = [], None
        self._of_micro_batch.clear()
        if fault is not None:
            self.flat.gradient.zero_()
            raise fault
        return calls

    def diverged(self, norm: float) -> DivergedError:
        """Drops the gradient and returns the error for a norm that is not finite."""
        self.flat.gradient.zero_()
        return DivergedError(
            f"the gradient norm is {norm} at step {self.step + 1}; the weights are those of step"
            f" {self.step}",
            next_step="Take a lower learning_rate, or look at the rows of this step.",
        )


class ForwardQueue:
    """The calls of all trainers of one base that are not computed yet.

    budget: most tokens in a forward of several trainers; None: no limit
    """

    def __init__(self, base: FrozenBase) -> None:
        self.base = base
        self.gradients: list[TrainerGradient] = []
        self.budget: int | None = None
        self._single: WeakSet[TrainerGradient] = WeakSet()
        self._heap = ExitStack()
        self._stand_ins: tuple[list[Attachment], Mapping[str, StandIn]] | None = None

    def enter(self, gradient: TrainerGradient) -> None:
        """Adds a trainer."""
        if not self.gradients and self.base.device.type == "cpu":
            self._heap.enter_context(steady_heap(0))
        self.gradients.append(gradient)

    def leave(self, gradient: TrainerGradient) -> None:
        """Removes a trainer and the calls of it that wait."""
        self.gradients.remove(gradient)
        if not self.gradients:
            self._heap.close()
            self._stand_ins = None

    def compute(self) -> None:
        """Computes all calls that wait. An error is kept for the trainer that it concerns."""
        if not any(gradient.waiting for gradient in self.gradients):
            return
        with torch.enable_grad(), fused(self.base.model, self._fused_modules()):
            while waiting := [gradient for gradient in self.gradients if gradient.waiting]:
                self._forward_backward(waiting)

    def _fused_modules(self) -> Mapping[str, StandIn]:
        """Returns what computes modules while training; found again when adapters change."""
        attachments = list(self.base.attachments.values())
        if self._stand_ins is None or self._stand_ins[0] != attachments:
            self._stand_ins = attachments, replacements(self.base.model)
        return self._stand_ins[1]

    def _forward_backward(self, waiting: Sequence[TrainerGradient]) -> None:
        """Computes the next micro-batches of as many trainers as may share a forward."""
        if any(gradient in self._single for gradient in waiting):
            waiting = waiting[:1]
        room = ForwardRoom(self.budget, one_node=one_node(self._fused_modules()))
        chosen = [g for g in waiting if room.admit(g.forward, g.next_lengths())]
        try:
            forward_backward([gradient.waiting.popleft() for gradient in chosen])
        except BaseException as fault:
            for gradient in chosen:
                gradient.begin_again()  # a part of this forward may be in the buffers
            if isinstance(fault, VeneerError):
                own_fault = fault
            elif isinstance(fault, Exception) and is_out_of_memory(fault):
                own_fault = _out_of_memory(room.lengths)
            else:
                raise
            if len(chosen) == 1:
                chosen[0].fail(own_fault)
            elif own_fault is fault:
                self._single.update(chosen)  # one by one, only the cause fails
            else:
                self.budget = sum(room.lengths) // 2


def _out_of_memory(lengths: Sequence[int]) -> DoesNotFitError:
    return DoesNotFitError(
        f"out of memory on a batch of {len(lengths)} rows, {sum(lengths)} tokens",
        next_step="Give forward_backward fewer rows at once: several calls add up.",
    )
