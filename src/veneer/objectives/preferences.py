"""Objectives of preferences: pairs and lists of answers to one prompt, and rated answers.

    log p(y | x) = sum over the answer's tokens,    r(y) = log p(y | x) - log p_reference(y | x)

    dpo    -log sigmoid(beta (r(chosen) - r(rejected)))                        eq. 7
    ipo    (r(chosen) - r(rejected) - 1 / (2 beta))^2                          eq. 17
    orpo   -mean log p(chosen) - weight log sigmoid(log odds ratio)            eq. 6 and 7
    kto    weight (1 - sigmoid(+-beta (r(y) - z))), z the mean of r over       eq. 8
           answers to other prompts, at least 0 and without a gradient

A list of n answers counts as the mean over its n (n - 1) / 2 pairs. z of kto is taken over a
micro-batch, as in the paper. Sums of answers are float64. All gradients follow from those of the
nats of every target.
Sources: objectives/config.py. Shapes: E examples, P pairs.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.data.batching import RowSpans
from veneer.data.examples import AnswerKind, Example
from veneer.kernels.wide import wide
from veneer.objectives.config import DPO, IPO, KTO, ORPO
from veneer.objectives.objective import (
    AnswerBatch,
    HeldOutFigures,
    Objective,
    ObjectiveLoss,
    Predictions,
    Values,
)


@dataclass(frozen=True)
class AnswerLogProbs:
    """Log-probabilities of the answers of a batch.

    log_probs  (E) float64, summed over the targets of each, with their gradient
    reference  (E) float64, the same by the reference
    tokens     (E) float64, number of targets
    """

    examples: Sequence[Example]
    log_probs: Tensor
    reference: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, log_probs: Tensor, answers: AnswerBatch) -> "AnswerLogProbs":
        tokens = [example.trained_tokens for example in answers.examples]
        known = torch.tensor([answers.reference.tolist(), tokens], dtype=torch.float64)
        reference, counts = known.to(log_probs.device)
        return cls(answers.examples, log_probs, reference, counts)

    @property
    def ratios(self) -> Tensor:
        """Returns r of each answer."""
        return self.log_probs - self.reference

    def of_kind(self, *kinds: AnswerKind) -> Tensor:
        """Returns 1 for answers of these kinds, else 0, (E)."""
        chosen = [float(example.kind in kinds) for example in self.examples]
        return torch.tensor(chosen, dtype=torch.float64, device=self.log_probs.device)


@dataclass(frozen=True)
class AnswerScores:
    """Losses and scores of the answers of a batch, each (E).

    losses   with their gradient; 0 for an answer that does not count
    scores   the values that the objective compares
    right    1 if the scores are in the preferred order, one half if they are equal, else 0; 0 for
             an answer that does not count
    """

    losses: Tensor
    scores: Tensor
    right: Tensor


class PreferenceObjective(Objective):
    """Base class: sums nats by answer, and shows how far apart good and bad answers are."""

    num_figures = 8

    @abstractmethod
    def scores(self, answers: AnswerLogProbs) -> AnswerScores:
        """Returns the losses and scores of the answers of a batch."""

    def loss(self, predictions: Predictions, answers: AnswerBatch, total: float) -> ObjectiveLoss:
        counts = [example.trained_tokens for example in answers.examples]
        parts = wide(predictions.nats()).split(counts)
        log_probs = AnswerLogProbs.of(-torch.stack([part.sum() for part in parts]), answers)
        scores = self.scores(log_probs)
        figures = self._figures(log_probs, scores)
        return ObjectiveLoss(scores.losses.sum() / total, figures.detach().sum(dim=1))

    def answer_losses(self, nats: Values, answers: AnswerBatch) -> Values:
        scores = self.scores(AnswerLogProbs.of(-torch.from_numpy(nats), answers))
        return scores.losses.numpy()

    def _figures(self, answers: AnswerLogProbs, scores: AnswerScores) -> Tensor:
        """Returns terms (8, E), whose sums `summary` reads."""
        good, bad = answers.of_kind("chosen"), answers.of_kind("rejected")
        counted = torch.from_numpy(self.counts(answers.examples)).to(good.device)
        of_kind = [
            (kind * values) for kind in (good, bad) for values in (scores.scores, answers.tokens)
        ]
        return torch.stack([*of_kind, good, bad, scores.right, counted])

    def summary(self, figures: Sequence[float]) -> dict[str, float]:
        """Returns accuracy, mean scores and tokens of good and bad answers, and their margin."""
        good_score, good_tokens, bad_score, bad_tokens, good, bad, right, counted = figures
        summary = {"accuracy": right / counted} if counted else {}
        if good:
            summary |= {"chosen": good_score / good, "chosen_tokens": good_tokens / good}
        if bad:
            summary |= {"rejected": bad_score / bad, "rejected_tokens": bad_tokens / bad}
        if good and bad:
            summary["margin"] = summary["chosen"] - summary["rejected"]
        return summary

    def held_out(self, nats: Values, answers: AnswerBatch) -> HeldOutFigures | None:
        if not len(nats):
            return None
        log_probs = AnswerLogProbs.of(-torch.from_numpy(nats), answers)
        figures = self._figures(log_probs, self.scores(log_probs))
        right, counted = (
            np.add.reduceat(part.numpy(), np.asarray(RowSpans.of(answers.examples).starts[:-1]))
            for part in figures[6:]
        )
        return HeldOutFigures(self.summary(figures.sum(dim=1).tolist()), right, counted)


class PairObjective(PreferenceObjective):
    """Base class of objectives over answers to one prompt, each row's best first."""

    def counts(self, examples: Sequence[Example]) -> Values:
        return np.array([float(example.kind == "chosen") for example in examples])

    @abstractmethod
    def answer_scores(self, answers: AnswerLogProbs) -> Tensor:
        """Returns the values that pairs compare, (E)."""

    @abstractmethod
    def pair_losses(self, margins: Tensor) -> Tensor:
        """Returns the loss of each pair, (P). margins: better score minus the other"""

    def own_losses(self, answers: AnswerLogProbs) -> Tensor | None:
        """Returns what the best answers add to the loss, (E); None for nothing."""
        return None

    def scores(self, answers: AnswerLogProbs) -> AnswerScores:
        pairs, weights = _pairs(answers.examples)
        device = answers.log_probs.device
        better, worse = torch.tensor(pairs, device=device).t()
        shares = torch.tensor(weights, dtype=torch.float64, device=device)
        scores = self.answer_scores(answers)
        margins = scores[better] - scores[worse]
        # The best answer of a row stands for all its pairs.
        owners = torch.tensor(_best(answers.examples), device=device)[better]
        nothing = torch.zeros_like(scores)
        losses = nothing.index_add(0, owners, shares * self.pair_losses(margins))
        right = nothing.index_add(0, owners, shares * _in_order(margins))
        own = self.own_losses(answers)
        if own is not None:
            losses = losses + answers.of_kind("chosen") * own
        return AnswerScores(losses, scores, right)


def _in_order(margins: Tensor) -> Tensor:
    """Returns 1 for a positive margin, one half for none, 0 for a negative one."""
    return (margins.detach().sign() + 1) / 2


def _best(examples: Sequence[Example]) -> list[int]:
    """Returns for each example the number of the best one of its row."""
    best: list[int] = []
    for number, example in enumerate(examples):
        best.append(number if example.kind == "chosen" else best[-1])
    return best


def _pairs(examples: Sequence[Example]) -> tuple[list[tuple[int, int]], list[float]]:
    """Returns the pairs (better, worse) of all rows, and the share of each in its row."""
    starts = [number for number, example in enumerate(examples) if example.kind == "chosen"]
    pairs: list[tuple[int, int]] = []
    weights: list[float] = []
    for start, end in pairwise([*starts, len(examples)]):
        own = list(combinations(range(start, end), 2))
        pairs += own
        weights += [1 / len(own)] * len(own)
    return pairs, weights


class _ReferenceObjective(PairObjective):
    """Base class of objectives that compare r of two answers.

    per_token: whether means over tokens are compared. sft_weight: of the best answer's own loss.
    """

    compares = True

    def __init__(self, *, per_token: bool, sft_weight: float) -> None:
        self.per_token, self.sft_weight = per_token, sft_weight

    def answer_scores(self, answers: AnswerLogProbs) -> Tensor:
        return answers.ratios / answers.tokens if self.per_token else answers.ratios

    def own_losses(self, answers: AnswerLogProbs) -> Tensor | None:
        weight = self.sft_weight
        return -weight * answers.log_probs / answers.tokens if weight else None


class DPOObjective(_ReferenceObjective):
    def __init__(self, config: DPO) -> None:
        super().__init__(per_token=config.per_token, sft_weight=config.sft_weight)
        self.beta, self.swapped = config.beta, config.label_smoothing

    def pair_losses(self, margins: Tensor) -> Tensor:
        logits = self.beta * margins
        return -(1 - self.swapped) * F.logsigmoid(logits) - self.swapped * F.logsigmoid(-logits)


class IPOObjective(_ReferenceObjective):
    def __init__(self, config: IPO) -> None:
        super().__init__(per_token=config.per_token, sft_weight=config.sft_weight)
        self.beta = config.beta

    def pair_losses(self, margins: Tensor) -> Tensor:
        return (margins - 1 / (2 * self.beta)) ** 2


class ORPOObjective(PairObjective):
    def __init__(self, config: ORPO) -> None:
        self.config = config

    def answer_scores(self, answers: AnswerLogProbs) -> Tensor:
        """Returns the log of an answer's odds P / (1 - P); log P is the mean over its tokens."""
        mean = (answers.log_probs / answers.tokens).clamp(max=-1e-9)  # P = 1 has no odds
        return mean - torch.log(-torch.expm1(mean))

    def pair_losses(self, margins: Tensor) -> Tensor:
        return -self.config.weight * F.logsigmoid(margins)

    def own_losses(self, answers: AnswerLogProbs) -> Tensor:
        return -answers.log_probs / answers.tokens


class KTOObjective(PreferenceObjective):
    """Every answer counts by itself: good ones shall be above z, bad ones below."""

    compares = True

    def __init__(self, config: KTO) -> None:
        self.config = config

    def counts(self, examples: Sequence[Example]) -> Values:
        return np.array([float(example.kind != "mismatched") for example in examples])

    def scores(self, answers: AnswerLogProbs) -> AnswerScores:
        config, ratios = self.config, answers.ratios
        good, bad = answers.of_kind("chosen"), answers.of_kind("rejected")
        other = answers.of_kind("mismatched")
        z = ((other * ratios).sum() / other.sum()).clamp(min=0).detach()
        distance = (good - bad) * (ratios - z)
        weights = config.good_weight * good + config.bad_weight * bad
        losses = weights * torch.sigmoid(-config.beta * distance)
        return AnswerScores(losses, ratios, (good + bad) * _in_order(distance))
