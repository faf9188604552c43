"""The objective of replay rows: KL(base || adapter), in nats per target, times a weight."""

from veneer.objectives.config import Distil
from veneer.objectives.distil import DistilObjective
from veneer.objectives.objective import AnswerBatch, ObjectiveLoss, Predictions


class ReplayObjective(DistilObjective):
    def __init__(self, weight: float) -> None:
        super().__init__(Distil())
        self.weight = weight

    def loss(self, predictions: Predictions, answers: AnswerBatch, total: float) -> ObjectiveLoss:
        return ObjectiveLoss(self.weight * super().loss(predictions, answers, total).loss)
