"""Predictions of the targets of a batch, in the form that objectives read
(objectives/objective.py)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.adapters.placement.score_head import ScoreHead
from veneer.kernels.dense.divergence import (
    Divergence,
    Teacher,
    TeacherLogits,
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

    adapted: whether an adapter acts on the head. columns: tokens that a student compares with,
    None: all
    """

    states: Tensor
    targets: Tensor
    head: Head
    adapted: bool
    columns: int | None = None

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
        values = trained_head_divergence if self._trains else frozen_head_divergence
        return values(self.states, self.head, _teacher_rows(teacher), divergence)

    def of_first_tokens(self, count: int) -> "HeadPredictions":
        return replace(self, columns=count)

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
        expected = _teacher_rows(teacher).logits(slice(None))
        return logit_divergence(self.logits, expected, divergence)

    def of_first_tokens(self, count: int) -> "LogitPredictions":
        return replace(self, logits=self.logits[:, :count])

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

    def of_first_tokens(self, count: int) -> Predictions:
        raise TypeError(ONLY_OUTPUTS)


def _teacher_rows(teacher: Predictions) -> Teacher:
    """Returns a teacher's predictions in the form that a divergence reads."""
    if isinstance(teacher, LogitPredictions):
        return TeacherLogits(teacher.logits.detach())
    assert isinstance(teacher, HeadPredictions)
    return TeacherRows(teacher.states.detach(), teacher.head, teacher.columns)
