"""The losses of preferences as their papers write them, one answer after the other in float64.

DPO   Rafailov et al. 2023, arXiv:2305.18290, eq. 7; with label smoothing: TRL's `sigmoid`
IPO   Azar et al. 2023, arXiv:2310.12036, eq. 17; means over tokens: TRL's `ipo`
ORPO  Hong et al. 2024, arXiv:2403.07691, eq. 3, 4, 6 and 7
KTO   Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7 and 8, z of section 4.1
"""

import itertools
from dataclasses import dataclass

import torch

from veneer.objectives.config import DPO, IPO, KTO, ORPO


@dataclass
class Answer:
    """log_prob: log p(y | x), summed over `tokens`. reference: the same by the reference."""

    log_prob: torch.Tensor
    reference: float
    tokens: int
    kind: str


def loss_of_row(config, answers, z=None):
    """The loss of one row: answers to one prompt, the best first."""
    if isinstance(config, KTO):
        return sum(_kto(config, answer, z) for answer in answers if answer.kind != "mismatched")
    pairs = list(itertools.combinations(answers, 2))
    loss = sum(_pair(config, better, worse) for better, worse in pairs) / len(pairs)
    mean = answers[0].log_prob / answers[0].tokens
    if isinstance(config, ORPO):
        return loss - mean
    return loss - config.sft_weight * mean


def _pair(config, better, worse):
    if isinstance(config, ORPO):
        odds = [_odds(torch.exp(a.log_prob / a.tokens)) for a in (better, worse)]
        return -config.weight * torch.log(_sigmoid(torch.log(odds[0] / odds[1])))
    h = [
        (a.log_prob - a.reference) / (a.tokens if config.per_token else 1) for a in (better, worse)
    ]
    margin = h[0] - h[1]
    if isinstance(config, IPO):
        return (margin - 1 / (2 * config.beta)) ** 2
    assert isinstance(config, DPO)
    smoothing = config.label_smoothing
    right, wrong = _sigmoid(config.beta * margin), _sigmoid(-config.beta * margin)
    return -(1 - smoothing) * torch.log(right) - smoothing * torch.log(wrong)


def _odds(p):
    return p / (1 - p)


def _sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def kto_z(answers):
    """z of a micro-batch: from its answers to other prompts, without a gradient."""
    ratios = [a.log_prob.item() - a.reference for a in answers if a.kind == "mismatched"]
    return max(0.0, sum(ratios) / len(ratios))


def _kto(config, answer, z):
    ratio = answer.log_prob - answer.reference
    if answer.kind == "chosen":
        value = config.good_weight * _sigmoid(config.beta * (ratio - z))
        return config.good_weight - value
    value = config.bad_weight * _sigmoid(config.beta * (z - ratio))
    return config.bad_weight - value
