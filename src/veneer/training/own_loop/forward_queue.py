"""Calls of `Trainer.forward_backward`, which wait until a number of theirs is needed.

The calls of all trainers of a base wait in one queue. Its forwards take the next micro-batch of
every trainer, so trainers that are called in turn share them: the products of the base are computed
once over all rows. If the rows do not fit into memory together, forwards get smaller, and the steps
of their trainers are computed again.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from weakref import WeakSet

import torch

from veneer.adapters.placement.acting import Acting
from veneer.adapters.placement.attachment import Attachment
from veneer.data.batching import Batch, used_length
from veneer.errors import (
    ConfigError,
    DivergedError,
    DoesNotFitError,
    VeneerError,
    first_line,
    is_out_of_memory,
)
from veneer.execution.proofs.model import acting_prefix_length
from veneer.execution.stand_in import StandIn
from veneer.execution.train_step import fused, one_node, replacements
from veneer.models.frozen_base import FrozenBase
from veneer.models.step import parts_of
from veneer.objectives.objective import ObjectiveLoss
from veneer.training.forward_room import ForwardRoom
from veneer.training.gradient import MicroBatch, forward_backward
from veneer.training.inputs import ForwardInputs
from veneer.training.optimizer.buffer import FlatParameters
from veneer.training.optimizer.heap import steady_heap
from veneer.training.optimizer.offload import Offload
from veneer.training.own_loop.losses import SummedLoss


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
            parts = list(parts_of(forward, examples, rows))
        if len(parts) > 1 and call.takes_all_rows:
            raise ConfigError(
                f"{call.name} takes all rows of a call, and this base computes them in"
                f" {len(parts)} forwards",
                next_step="Give fewer rows in a call: several calls add up.",
            )
        for number, part in enumerate(parts):
            place = len(self._of_micro_batch)
            self._of_micro_batch.append((call, number))
            self.waiting.append(
                MicroBatch(
                    self,
                    place,
                    True,
                    call.batch_loss(part),
                    call.answers(part),
                    total=1.0,
                    taught=call.taught(part),
                )
            )

    def next_lengths(self) -> list[int]:
        """Counts the tokens of each example of the next micro-batch, with those of a prefix."""
        with self.forward.routing.held(Acting.everywhere(self.forward.adapters)):
            prefix = acting_prefix_length(self.forward.model)
        return [prefix + used_length(example) for example in self.waiting[0].examples]

    def add(self, micro_batch: MicroBatch, result: ObjectiveLoss, batch: Batch) -> None:
        """Adds the loss of a micro-batch, whose gradient is in the buffer."""
        call, part = self._of_micro_batch[micro_batch.number]
        call.add(part, result)

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

    @contextmanager
    def ended(self) -> Iterator[list[SummedLoss]]:
        """Ends the step, and gives its calls to the block. Raises the error that ended it before.

        Any error drops the gradient, so the next step begins without one.
        """
        calls, fault = self.calls, self._fault
        self.calls, self._fault = [], None
        self._of_micro_batch.clear()
        try:
            if fault is not None:
                raise fault
            yield calls
        except BaseException:
            self.flat.gradient.zero_()
            raise

    def diverged(self, norm: float) -> DivergedError:
        """Returns the error for a norm that is not finite."""
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
        self._is_computing = False
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

    def detached(self, gradient: TrainerGradient) -> ConfigError | None:
        """Returns the error for an adapter that was taken off the base; None if it is there."""
        ((attachment, _),) = gradient.forward.adapters
        if self.base.attachments.get(attachment.name) is attachment:
            return None
        return ConfigError(
            f"adapter {attachment.name!r} was detached from the base",
            next_step="Close this trainer and make a new one.",
        )

    def compute(self) -> None:
        """Computes all calls that wait. An error is kept for the trainer that it concerns.

        Raises ConfigError within a loss_fn: the calls of its forward have no results yet.
        """
        if self._is_computing:
            raise ConfigError(
                "a loss_fn cannot read losses of this base's trainers, nor take their steps",
                next_step="Do that before the call or after it.",
            )
        self._is_computing = True
        try:
            self._compute_waiting()
        finally:
            self._is_computing = False

    def _compute_waiting(self) -> None:
        for gradient in self.gradients:
            if gradient.waiting and (fault := self.detached(gradient)):
                gradient.fail(fault)
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
            if not isinstance(fault, Exception):  # Ctrl-C concerns no trainer
                raise
            own_fault = _own_fault(fault, room.lengths)
            if len(chosen) == 1:
                chosen[0].fail(own_fault)
            elif isinstance(own_fault, DoesNotFitError) and own_fault is not fault:
                self.budget = sum(room.lengths) // 2
            else:
                self._single.update(chosen)  # one by one, only the cause fails


def _own_fault(fault: Exception, lengths: Sequence[int]) -> VeneerError:
    """Returns the error that a trainer keeps for what its forward raised."""
    if isinstance(fault, VeneerError):
        return fault
    if is_out_of_memory(fault):
        return _out_of_memory(lengths)
    error = VeneerError(
        "forward or backward of these rows failed",
        [first_line(fault)],
        "The traceback shows where. A loss_fn returns its loss, and does not call backward.",
    )
    error.__cause__ = fault
    return error


def _out_of_memory(lengths: Sequence[int]) -> DoesNotFitError:
    return DoesNotFitError(
        f"out of memory on a batch of {len(lengths)} rows, {sum(lengths)} tokens",
        next_step="Give forward_backward fewer rows at once: several calls add up.",
    )
