"""The objective of given answers: cross-entropy, in nats per trained token."""

from collections.abc import Sequence

import numpy as np

from veneer.data.examples import Example
from veneer.objectives.objective import AnswerBatch, Objective, ObjectiveLoss, Predictions, Values


class AnswersObjective(Objective):
    """Minimises the mean of -log p over the trained tokens of a step."""

    def counts(self, examples: Sequence[Example]) -> Values:
        return np.array([example.trained_tokens for example in examples], dtype=np.float64)

    def loss(self, predictions: Predictions, answers: AnswerBatch, total: float) -> ObjectiveLoss:
        return ObjectiveLoss(predictions.cross_entropy(total))

    def answer_losses(self, nats: Values, answers: AnswerBatch) -> Values:
        return nats
