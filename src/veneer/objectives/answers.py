"""The objective of given answers: cross-entropy, in nats per trained token."""

from collections.abc import Sequence

from veneer.data.examples import Example
from veneer.objectives.objective import Objective, ObjectiveLoss, Predictions


class AnswersObjective(Objective):
    """Minimises the mean of -log p over the trained tokens of a step."""

    def total(self, examples: Sequence[Example]) -> int:
        return sum(int(example.trained.sum()) for example in examples)

    def loss(
        self, predictions: Predictions, examples: Sequence[Example], total: float
    ) -> ObjectiveLoss:
        return ObjectiveLoss(predictions.cross_entropy(total))
