"""The objective of labels: the loss of a score head's outputs for each text.

    label       -w(y) log softmax(z)[y]
    labels      mean over c of -(w_c y_c log sigmoid(z_c) + (1 - y_c) log sigmoid(-z_c))
    regression  (z - y)^2
    rerank      -(y log sigmoid(z) + (1 - y) log sigmoid(-z)),   y from 0 to 1

w are class weights. A step's loss is divided by the sum of w(y) over its rows (label), or by the
number of its rows, as PyTorch's losses with weights are.
Shapes: E examples, C outputs.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.adapters.labels import HeadSettings, probabilities
from veneer.data.examples import Example
from veneer.errors import ConfigError
from veneer.kernels.wide import wide
from veneer.objectives.config import AnyObjective, Classify
from veneer.objectives.objective import (
    AnswerBatch,
    HeldOutFigures,
    Objective,
    ObjectiveLoss,
    Predictions,
    Values,
)
from veneer.objectives.ranking import ranking_counts


class ClassifyObjective(Objective):
    """Reads the outputs of a score head; `config` names all its labels."""

    figures_name = "labels"
    num_figures = 2

    def __init__(self, config: Classify) -> None:
        self.head = config.head
        self.num_outputs = self.head.num_outputs
        weights = [config.class_weights.get(name, 1.0) for name in self.head.output_names]
        self.weights = np.array(weights)
        if config.balanced:
            self.row_facts = {"class_weights": config.class_weights}

    def counts(self, examples: Sequence[Example]) -> Values:
        if self.head.kind != "label":
            return np.ones(len(examples))
        return self.weights[[int(example.label[0]) for example in examples]]

    def loss(self, predictions: Predictions, answers: AnswerBatch, total: float) -> ObjectiveLoss:
        outputs = wide(predictions.outputs())
        losses = self._losses(outputs, answers.examples)
        right = self.right(outputs.detach().cpu().numpy(), answers.examples)
        figures = torch.tensor([right.sum(), len(right)], dtype=torch.float64)
        return ObjectiveLoss(losses.sum() / total, figures.to(outputs.device))

    def answer_losses(self, nats: Values, answers: AnswerBatch) -> Values:
        outputs = torch.from_numpy(nats.reshape(-1, self.head.num_outputs))
        return self._losses(outputs, answers.examples).numpy()

    def _losses(self, outputs: Tensor, examples: Sequence[Example]) -> Tensor:
        """Returns the loss of each example, (E)."""
        targets = torch.from_numpy(targets_of(examples)).to(outputs.device)
        weights = torch.from_numpy(self.weights).to(outputs)
        match self.head.kind:
            case "label":
                numbers = targets[:, 0].long()
                return F.cross_entropy(outputs, numbers, weight=weights, reduction="none")
            case "regression":
                return (outputs - targets).square().sum(dim=1)
            case _:
                losses = F.binary_cross_entropy_with_logits(
                    outputs, targets, pos_weight=weights, reduction="none"
                )
                return losses.mean(dim=1)

    def right(self, outputs: Values, examples: Sequence[Example]) -> Values:
        """Returns 1 for each example whose labels are chosen, else 0, (E); empty for regression."""
        if self.head.kind == "regression":
            return np.zeros(0)
        is_right: Values = (chosen(self.head, outputs) == marked(self.head, examples)).all(axis=1)
        return is_right.astype(np.float64)

    def summary(self, figures: Sequence[float]) -> dict[str, float]:
        right, counted = figures
        return {"accuracy": right / counted} if counted else {}

    def held_out(self, nats: Values, answers: AnswerBatch) -> HeldOutFigures | None:
        examples = answers.examples
        if not len(examples):
            return None
        outputs = nats.reshape(-1, self.head.num_outputs)
        if self.head.kind == "regression":
            errors = outputs - targets_of(examples)
            return HeldOutFigures({"mean_error": float(np.abs(errors).mean())})
        right, wanted = self.right(outputs, examples), marked(self.head, examples)
        accuracy, ones = {"accuracy": float(right.mean())}, np.ones(len(right))
        if self.head.kind == "rerank":
            return HeldOutFigures(accuracy, right, ones, ranking_of(outputs, examples))
        scores = label_scores(chosen(self.head, outputs), wanted)
        return HeldOutFigures({**accuracy, "macro_f1": macro_f1(scores)}, right, ones)


def targets_of(examples: Sequence[Example]) -> Values:
    """Returns the labels of examples as numbers: (E, 1), of kind labels (E, C)."""
    return np.array([example.label for example in examples], dtype=np.float64)


def ranking_of(outputs: Values, examples: Sequence[Example]) -> dict[str, Values]:
    """Returns the ranking figures of each query (ranking.py) from the outputs of its documents."""
    queries = [example.query or 0 for example in examples]
    return ranking_counts(outputs[:, 0], targets_of(examples)[:, 0], queries)


def marked(head: HeadSettings, examples: Sequence[Example]) -> np.ndarray[Any, Any]:
    """Returns which outputs are right for each example, (E, C) bool; rerank: above one half."""
    targets = targets_of(examples)
    if head.kind == "label":
        wanted: np.ndarray[Any, Any] = targets == np.arange(head.num_outputs)
        return wanted
    return targets > 0.5


def chosen(head: HeadSettings, outputs: Values) -> np.ndarray[Any, Any]:
    """Returns which outputs are chosen, (E, C) bool: the largest, or all above their thresholds."""
    if head.kind == "label":
        largest: np.ndarray[Any, Any] = outputs.argmax(axis=1)[:, None] == np.arange(
            head.num_outputs
        )
        return largest
    thresholds = np.array([head.threshold(name) for name in head.output_names])
    return probabilities(head.kind, outputs) >= thresholds


def label_scores(chosen_EC: Any, wanted_EC: Any) -> Values:
    """Returns rows that have and get each label, that get it, and that have it, (3, C)."""
    both = (chosen_EC & wanted_EC).sum(axis=0)
    return np.stack([both, chosen_EC.sum(axis=0), wanted_EC.sum(axis=0)]).astype(np.float64)


def f1_of(scores: Values) -> Values:
    """Returns F1 of each label, (C): 2 both / (chosen + wanted); NaN for a label of no row."""
    both, num_chosen, num_wanted = scores
    with np.errstate(invalid="ignore", divide="ignore"):
        f1: Values = 2 * both / (num_chosen + num_wanted)
    return f1


def macro_f1(scores: Values) -> float:
    """Returns the mean F1 of the labels that rows have or get."""
    f1 = f1_of(scores)
    return float(np.nanmean(f1)) if not np.isnan(f1).all() else 0.0


def resolved(config: AnyObjective, head: HeadSettings | None) -> AnyObjective:
    """Returns the objective with the labels of the rows.

    head: settings with these labels. Raises ConfigError for weights and thresholds of unknown
    labels.
    """
    if not isinstance(config, Classify) or head is None:
        return config
    if unknown := sorted({*config.thresholds, *config.class_weights} - set(head.labels)):
        raise ConfigError(
            "weights and thresholds of labels that the rows do not have",
            unknown,
            f"Labels: {', '.join(head.labels[:20])}{', …' if len(head.labels) > 20 else ''}.",
        )
    if config.thresholds and head.kind != "labels":
        raise ConfigError(
            f"kind {head.kind} has no thresholds",
            next_step="Leave objective.thresholds out, or take kind labels.",
        )
    return config.model_copy(update={"labels": list(head.labels)})


def balanced(config: AnyObjective, train: Sequence[Example]) -> AnyObjective:
    """Returns the objective with the weights of its labels in these rows, if it asks for them.

    Weights that are set stay. A run computes them from its rows whenever it starts or resumes.
    """
    if not isinstance(config, Classify) or not config.balanced:
        return config
    weights = _balanced(config.head, train) | config.class_weights
    return config.model_copy(update={"class_weights": weights})


def _balanced(head: HeadSettings, train: Sequence[Example]) -> dict[str, float]:
    """Returns weights by which all labels count the same.

    label: rows / (labels * rows of the label). labels: rows without it / rows with it.
    """
    rows_of: Counter[int] = Counter()
    for example in train:
        numbers = [example.label[0]] if head.kind == "label" else np.flatnonzero(example.label)
        rows_of.update(int(number) for number in numbers)
    weights = {}
    for number, name in enumerate(head.labels):
        if rows := rows_of[number]:
            others = len(train) - rows
            even = len(train) / (len(rows_of) * rows)
            weights[name] = even if head.kind == "label" else max(others, 1) / rows
    return weights
