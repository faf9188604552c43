"""Measures how near a question is to each adapter, from mean hidden states.

Every text (a training prompt, a description, a question) is the mean of the base's last hidden
states over its tokens. In every dimension the mean over all adapters is subtracted, and the rest is
divided by the spread within them. Then

    nearness = cos(question, adapter) / cos(a text of the adapter, its other texts)

is about 1 for a question like those that the adapter was trained on. Some general questions stand
for the base, which answers where no adapter is near. benchmarks/choose_adapter.py measures this.
Shapes: K texts of an adapter, A adapters, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

States = NDArray[np.float32]

LEAST_NEARNESS = 0.65
"""Nearness below which the base answers."""
LEAST_LIKENESS = 0.4
"""Lower bound of the cosine between texts of an adapter: a few unlike texts say little."""
LIKENESS_OF_ONE = 0.5
"""Stands for that cosine if there is one text alone."""

GENERAL_QUESTIONS = (
    "What is the capital of France?",
    "Who wrote Romeo and Juliet?",
    "Give me three ideas for a birthday present for my sister.",
    "How do I cook rice?",
    "Can you recommend a good book for a long flight?",
    "What is photosynthesis?",
    "Write a haiku about the sea.",
    "Summarise the plot of Cinderella.",
    "How does a car engine work?",
    "What is machine learning?",
    "Why is the sky blue?",
    "Explain the theory of relativity to a child.",
    "What is the tallest mountain in the world?",
    "How do I tie a tie?",
    "Write a Python function that reverses a string.",
    "How do vaccines work?",
    "What is inflation?",
    "How do I train my dog to sit?",
    "Explain what an API is.",
    "What is the largest ocean?",
    "How do bees make honey?",
    "What is a black hole?",
    "Which languages are spoken in Switzerland?",
    "What is a healthy breakfast?",
    "What is the plot of Moby Dick?",
    "Hello, how are you today?",
    "I feel sad today.",
    "Is it going to rain tomorrow?",
    "Rewrite this sentence politely: Give me the report now.",
    "What are the planets of the solar system?",
    "Why do cats purr?",
    "How long does it take to learn French?",
)
"""Questions that stand for the base."""


class Nearest(NamedTuple):
    """The adapter that is nearest to a question. margin: its nearness minus the nearness that it
    needs; the base answers below 0."""

    number: int
    margin: float


@dataclass(frozen=True)
class _Scale:
    """Centre and spread of each dimension, (D)."""

    centre: States
    spread: States

    def __call__(self, states: States) -> States:
        """Returns unit vectors, (..., D)."""
        return _unit((states - self.centre) / self.spread)


class NearnessSpace:
    """Compares questions with adapters. adapters: (K, D) of each. general: (K, D) of the general
    questions."""

    def __init__(self, adapters: Sequence[States], general: States) -> None:
        groups = [*adapters, general]
        spread = np.sqrt(np.mean([group.var(0) for group in groups if len(group) > 1], axis=0))
        centre = np.mean([group.mean(0) for group in groups], axis=0)
        self._scale = _Scale(centre, spread + 1e-6)
        scaled = [self._scale(group) for group in groups]
        self._centroids = np.stack([_unit(group.mean(0)) for group in scaled])
        self._likeness = np.array([_likeness(group) for group in scaled], dtype=np.float32)

    def nearest(self, question: States) -> Nearest:
        """Finds the adapter that is nearest to a question, (D). Needs at least one adapter."""
        *nearness, base = (self._centroids @ self._scale(question) / self._likeness).tolist()
        number = int(np.argmax(nearness))
        return Nearest(number, nearness[number] - max(base, LEAST_NEARNESS))


def _unit(states: States) -> States:
    length: States = np.linalg.norm(states, axis=-1, keepdims=True)
    return (states / np.maximum(length, 1e-12)).astype(np.float32)


def _likeness(scaled: States) -> float:
    """Returns the mean cosine between each text, (K, D), and the mean of the others."""
    if len(scaled) == 1:
        return LIKENESS_OF_ONE
    means_of_others = _unit(scaled.sum(0) - scaled)
    return max(LEAST_LIKENESS, float((scaled * means_of_others).sum(1).mean()))
