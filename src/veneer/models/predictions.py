"""Predictions of the targets of a batch, in the form that objectives read
(objectives/objective.py)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.adapters.placement.score_head import ScoreHead
from veneer.kernels.dense.divergence import (
    Divergence,
    TeacherRows,
    frozen_head_divergence,
    logit_divergence,
    trained_head_divergence,
)
from veneer.kernels.dense.loss import (
    Head,
    frozen_head_loss,
    frozen_head_nats,
    trained_head_loss,
    trained_head_nats,
)
from veneer.objectives.objective import Predictions

NO_SCORE_HEAD = "the adapters that act have no score head"
ONLY_OUTPUTS = "an adapter with a score head predicts no tokens"


@dataclass(frozen=True)
class HeadPredictions:
    """Predictions from hidden states (T, D), by the head and a few rows at a time.

    adapted: whether an adapter acts on the head
    """

    states: Tensor
    targets: Tensor
    head: Head
    adapted: bool

    @property
    def _trains(self) -> bool:
        """Whether backward must reach the head, which then computes its logits twice."""
        head = self.head
        trained = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
        return self.adapted or (trained and torch.is_grad_enabled())

    def cross_entropy(self, total: float) -> Tensor:
        loss = trained_head_loss if self._trains else frozen_head_loss
        return loss(self.states, self.targets, self.head, total)

    def nats(self) -> Tensor:
        nats = trained_head_nats if self._trains else frozen_head_nats
        return nats(self.states, self.targets, self.head)

    def divergence(self, teacher: Predictions, divergence: Divergence) -> Tensor:
        assert isinstance(teacher, HeadPredictions)  # the same model computes both
        values = trained_head_divergence if self._trains else frozen_head_divergence
        rows = TeacherRows(teacher.states.detach(), teacher.head)
        return values(self.states, self.head, rows, divergence)

    def outputs(self) -> Tensor:
        raise TypeError(NO_SCORE_HEAD)


@dataclass(frozen=True)
class LogitPredictions:
    """Predictions as whole logits (T, V), by the model's own head."""

    logits: Tensor
    targets: Tensor

    def cross_entropy(self, total: float) -> Tensor:
        return F.cross_entropy(self.logits.float(), self.targets, reduction="sum") / total

    def nats(self) -> Tensor:
        return F.cross_entropy(self.logits.float(), self.targets, reduction="none")

    def divergence(self, teacher: Predictions, divergence: Divergence) -> Tensor:
        assert isinstance(teacher, LogitPredictions)
        return logit_divergence(self.logits, teacher.logits.detach(), divergence)

    def outputs(self) -> Tensor:
        raise TypeError(NO_SCORE_HEAD)


@dataclass(frozen=True)
class ScorePredictions:
    """Outputs of an adapter's own head over hidden states (T, D), in place of tokens."""

    states: Tensor
    score: ScoreHead

    def outputs(self) -> Tensor:
        return self.score.outputs(self.states)

    def cross_entropy(self, total: float) -> Tensor:
        raise TypeError(ONLY_OUTPUTS)

    def nats(self) -> Tensor:
        raise TypeError(ONLY_OUTPUTS)

    def divergence(self, teacher: Predictions, divergence: Divergence) -> Tensor:
        raise TypeError(ONLY_OUTPUTS)
