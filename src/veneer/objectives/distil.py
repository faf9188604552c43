"""The objective of a teacher: the divergence between its next tokens and the student's.

It is the mean over the targets of a step, in nats per target. The teacher reads the same answers
behind a prompt of its own (data/teacher.py), and is not trained.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from veneer.data.examples import Example
from veneer.kernels.dense.divergence import Divergence
from veneer.objectives.config import Distil
from veneer.objectives.objective import AnswerBatch, Objective, ObjectiveLoss, Predictions, Values


class DistilObjective(Objective):
    has_teacher = True

    def __init__(self, config: Distil) -> None:
        self.divergence = Divergence(config.divergence, config.temperature, config.teacher_share)

    def counts(self, examples: Sequence[Example]) -> Values:
        counts = [
            0 if example.kind == "teacher" else example.trained_tokens for example in examples
        ]
        return np.array(counts, dtype=np.float64)

    def loss(self, predictions: Predictions, answers: AnswerBatch, total: float) -> ObjectiveLoss:
        return ObjectiveLoss(self.target_values(predictions, answers.teacher).sum() / total)

    def target_values(self, predictions: Predictions, teacher: Predictions | None) -> Tensor:
        assert teacher is not None
        return predictions.divergence(teacher, self.divergence)

    def answer_losses(self, nats: Values, answers: AnswerBatch) -> Values:
        return nats
