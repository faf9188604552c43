"""An objective: a function from what a model says of a batch's targets to a loss.

Targets are the trained tokens of the answers in a batch. A model gives their cross-entropy in one
pass, or the nats -log p of each of them; both carry a gradient. An objective makes one number of
them. Step, batch, resume, processes, joint training and plan take any objective and ask for
nothing else. Knows nothing of models, optimizers or records.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from veneer.data.examples import Example


class Predictions(Protocol):
    """A model's predictions of the targets of a batch; T targets."""

    def cross_entropy(self, total: float) -> Tensor:
        """Returns the summed nats of all targets, divided by `total`."""

    def nats(self) -> Tensor:
        """Returns -log p of every target, (T)."""


@dataclass(frozen=True)
class ObjectiveLoss:
    """The loss of a batch, a scalar with its gradient."""

    loss: Tensor


class Objective(ABC):
    """What a run minimises."""

    @abstractmethod
    def total(self, examples: Sequence[Example]) -> int:
        """Counts what the loss of a step over these examples is divided by.

        It is known before the step, so a step is the same however it is divided into batches.
        """

    @abstractmethod
    def loss(
        self, predictions: Predictions, examples: Sequence[Example], total: float
    ) -> ObjectiveLoss:
        """Computes a batch's part of a step's loss.

        examples: of the batch, in the order of their targets. total: of all examples of the step;
        infinity for a batch that does not count.
        """
