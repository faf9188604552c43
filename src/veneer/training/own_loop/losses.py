"""Defines the losses of a trainer's calls: of an objective, or of a function of the user's.

Loss and gradient are sums over the rows of a call, not means. Nothing is computed here: the queue
(forward_queue.py) computes calls, and adds the result of each micro-batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from veneer.data.batching import RowSpans
from veneer.data.examples import Example
from veneer.errors import ConfigError, VeneerError
from veneer.objectives.answers import AnswersObjective
from veneer.objectives.objective import (
    AnswerBatch,
    BatchLoss,
    Objective,
    ObjectiveLoss,
    Predictions,
    Values,
)
from veneer.training.inputs import Teacher
from veneer.training.teachers.teacher import Taught, teacher_examples
from veneer.wording import kind_of


class SummedLoss:
    """The loss of one `forward_backward` call; it is computed when `loss_sum` is first read.

    rows    number of rows of the call
    tokens  number of trained tokens of the call
    count   number that a run divides the loss by: of trained tokens, or of pairs
    """

    def __init__(
        self,
        examples: Sequence[Example],
        compute: Callable[[], None],
        objective: Objective | None = None,
        *,
        name: str = "cross_entropy",
        takes_all_rows: bool = False,
        reference: Values | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.examples, self._compute = examples, compute
        self.name, self.takes_all_rows = name, takes_all_rows
        self._teacher, self._reference = teacher, reference
        self._objective = objective or AnswersObjective()
        self.rows = len(RowSpans.of(examples).lengths)
        students = [example for example in examples if example.kind != "teacher"]
        self.tokens = sum(example.trained_tokens for example in students)
        self.count = float(self._objective.counts(students).sum())
        self._results: dict[int, ObjectiveLoss] = {}
        self._sum: float | None = None
        self._fault: VeneerError | None = None

    @property
    def loss_sum(self) -> float:
        """Returns the sum of the objective's losses over the rows of the call: of cross-entropy,
        the sum of -log p (nats) over the trained tokens.

        Raises the error that ended the computation of this step.
        """
        if self._sum is None and self._fault is None:
            self._compute()
        if self._fault is not None:
            raise self._fault
        if self._sum is None:
            losses = [result.loss for result in self._results.values()]
            self._sum = float(torch.stack(losses).sum())
        return self._sum

    @property
    def metrics(self) -> Mapping[str, float]:
        """Returns the figures of the objective by name, such as the accuracy of pairs."""
        _ = self.loss_sum
        figures = [result.figures for result in self._results.values()]
        sums = torch.stack([figure for figure in figures if figure is not None] or [torch.empty(0)])
        return self._objective.summary(sums.sum(dim=0).tolist())

    def batch_loss(self, part: Sequence[int]) -> BatchLoss:
        """Returns what computes the loss of a micro-batch. part: numbers of its examples"""
        return self._objective

    def answers(self, part: Sequence[int]) -> AnswerBatch:
        """Returns the answers of a micro-batch, without the examples that a teacher reads."""
        numbers = [number for number in part if self.examples[number].kind != "teacher"]
        examples = [self.examples[number] for number in numbers]
        if self._reference is None:
            return AnswerBatch.without_reference(examples)
        return AnswerBatch(examples, self._reference[numbers])

    def taught(self, part: Sequence[int]) -> Taught | None:
        """Returns the teacher of a micro-batch with the examples that it reads; None without."""
        if self._teacher is None:
            return None
        return Taught(self._teacher, teacher_examples(self.examples[number] for number in part))

    def add(self, part: int, result: ObjectiveLoss) -> None:
        """Adds the result of one of the call's micro-batches; a later one of this number replaces
        it."""
        self._results[part] = ObjectiveLoss(result.loss.detach(), result.figures)

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
        super().__init__(examples, compute, name="loss_fn", takes_all_rows=True)
        self._function = function
        self._metrics: Mapping[str, float] = {}

    @property
    def metrics(self) -> Mapping[str, float]:
        """Returns the figures that the function returned."""
        _ = self.loss_sum
        return self._metrics

    def batch_loss(self, part: Sequence[int]) -> BatchLoss:
        return FunctionLoss(self, part)

    def call(self, log_probs: list[Tensor]) -> Tensor:
        """Calls the function, and keeps its figures. log_probs: of each example of the call"""
        try:
            result = self._function(self.examples, log_probs)
        except (Exception, SystemExit) as fault:  # sys.exit() in it ends this step, not all
            raise ConfigError(f"loss_fn raised {type(fault).__name__}: {fault}") from fault
        loss, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        if not _is_loss(loss):
            raise ConfigError(
                "loss_fn returned no loss that depends on the log-probabilities",
                [f"the loss is {_described(loss)}"],
                _RETURNS,
            )
        self._metrics = _figures(metrics)
        return loss.reshape(())


_RETURNS = "Return one real number as a tensor, or that and a dict of figures."


def _is_loss(value: object) -> TypeGuard[Tensor]:
    """Whether this is one real number with a gradient."""
    return (
        isinstance(value, Tensor)
        and value.numel() == 1
        and value.requires_grad
        and not value.is_complex()
    )


def _figures(metrics: object) -> dict[str, float]:
    """Returns the figures of a loss as numbers. Raises ConfigError with all that are none."""
    if not isinstance(metrics, Mapping):
        raise ConfigError(
            f"the figures of loss_fn are a dict, and these are {kind_of(metrics)}",
            next_step=_RETURNS,
        )
    figures: dict[str, float] = {}
    faults = []
    for name, value in metrics.items():
        number = _number(value)
        if number is None:
            faults.append(f"{name} is {_described(value)}")
        else:
            figures[name] = number
    if faults:
        raise ConfigError(
            "loss_fn returned figures that are not numbers",
            faults,
            "Each figure is one number, for instance that of tensor.item().",
        )
    return figures


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        with_gradient = "with" if value.requires_grad else "without"
        return f"a {kind} tensor of shape {tuple(value.shape)} {with_gradient} a gradient"
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else kind_of(value)


@dataclass(frozen=True)
class FunctionLoss:
    """Computes the loss of the only micro-batch of a custom call. part: numbers of its examples"""

    custom: CustomLoss
    part: Sequence[int]

    def loss(self, predictions: Predictions, answers: AnswerBatch, total: float) -> ObjectiveLoss:
        counts = [example.trained_tokens for example in answers.examples]
        log_probs = dict(zip(self.part, (-predictions.nats()).split(counts), strict=True))
        return ObjectiveLoss(self.custom.call([log_probs[i] for i in range(len(counts))]))
