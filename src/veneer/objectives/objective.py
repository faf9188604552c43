"""An objective: a function from a model's predictions of a batch's targets to a loss.

Targets are the trained tokens of the answers in a batch. A model gives their cross-entropy in one
pass, or the nats -log p of each of them. An adapter with a score head gives the head's outputs in
their place; a text has one target, the place after its last token. All carry a gradient. An
objective makes one number of them. Step, batch, resume, processes, joint training and plan take any
objective and ask for nothing else. Knows nothing of models, optimizers or records.
Shapes: T targets, E examples.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from veneer.data.examples import Example
from veneer.kernels.dense.divergence import Divergence

Values = NDArray[np.float64]


class Predictions(Protocol):
    """A model's predictions of the targets of a batch."""

    def cross_entropy(self, total: float) -> Tensor:
        """Returns the summed nats of all targets, divided by `total`."""

    def nats(self) -> Tensor:
        """Returns -log p of every target, (T)."""

    def divergence(self, teacher: "Predictions", divergence: Divergence) -> Tensor:
        """Returns how far the predictions of every target are from the teacher's, (T)."""

    def of_first_tokens(self, count: int) -> "Predictions":
        """Returns a teacher's predictions of the first tokens alone: a student compares no
        others."""

    def outputs(self) -> Tensor:
        """Returns the outputs of the adapter's score head in place of every target, (T, C)."""


@dataclass(frozen=True)
class AnswerBatch:
    """The answers of a batch, in the order of their targets.

    reference  (E) log p of each answer by the reference, summed over its targets; zeros where an
               objective compares with none
    teacher    the teacher's predictions of the same targets; None without a teacher
    """

    examples: Sequence[Example]
    reference: Values
    teacher: Predictions | None = None

    @classmethod
    def without_reference(cls, examples: Sequence[Example]) -> Self:
        return cls(examples, np.zeros(len(examples)))


@dataclass(frozen=True)
class ObjectiveLoss:
    """The loss of a batch, a scalar with its gradient.

    figures  sums without a gradient, which add up over the batches of a step; None if the objective
             shows nothing but its loss
    """

    loss: Tensor
    figures: Tensor | None = None


@dataclass(frozen=True)
class HeldOutFigures:
    """Figures of held-out answers by name.

    right, counted: of each row (R), the sum of its comparisons that are right, and of all; the
    figure `accuracy` is their share. None if nothing is right or wrong
    of_groups: figure -> (G, 2), what each group of rows adds to its sum and its count
    """

    figures: dict[str, float]
    right: Values | None = None
    counted: Values | None = None
    of_groups: Mapping[str, Values] = field(default_factory=dict)


class BatchLoss(Protocol):
    """Computes the loss of a batch, as an objective does."""

    def loss(self, predictions: Predictions, answers: AnswerBatch, total: float) -> ObjectiveLoss:
        """Computes a batch's part of a step's loss, which is divided by `total`."""


class Objective(ABC):
    """A run minimises this: the sum of the answers' losses, divided by the sum of their counts."""

    compares: bool = False
    """Whether it reads the reference."""
    has_teacher: bool = False
    """Whether it reads the predictions of a teacher."""
    num_figures: int = 0
    """Number of sums in the figures of a batch."""
    figures_name: str = "preference"
    """Name of the figures in a run's records."""
    row_facts: Mapping[str, Any] = MappingProxyType({})
    """Settings that the training rows decided, by name, for the records of a run."""
    num_outputs: int | None = None
    """Outputs of the score head that it reads; None: it reads nats."""

    @abstractmethod
    def counts(self, examples: Sequence[Example]) -> Values:
        """Returns what each example adds to the number that the loss is divided by, (E).

        It is known before a step, so a step is the same however it is divided into batches.
        """

    @abstractmethod
    def loss(self, predictions: Predictions, answers: AnswerBatch, total: float) -> ObjectiveLoss:
        """Computes a batch's part of a step's loss.

        total: counts of all examples of the step; infinity for a batch that another process counts
        """

    def target_values(self, predictions: Predictions, teacher: Predictions | None) -> Tensor:
        """Returns the value of every held-out target, (T); `answer_losses` reads their sums."""
        return predictions.nats()

    @abstractmethod
    def answer_losses(self, nats: Values, answers: AnswerBatch) -> Values:
        """Returns the loss of each example, (E), without a gradient.

        nats: the sum of its targets' values, (E); or the outputs of its score head, (E * C)
        answers: all of them, as one batch
        """

    def summary(self, figures: Sequence[float]) -> dict[str, float]:
        """Returns the figures of a step by name, from their sums; empty if there are none."""
        return {}

    def held_out(self, nats: Values, answers: AnswerBatch) -> HeldOutFigures | None:
        """Returns figures of held-out answers from what `answer_losses` reads; None without any."""
        return None
