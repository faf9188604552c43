"""The student's own answers: before a step, it answers some of the step's rows as it stands.

The teacher then says what it would have expected at each token of such an answer. So the student
learns from the texts that it writes itself, mistakes included, not only from given ones.

Rows and answers follow from (seed, epoch, step), so a resumed run draws the same. Answers are
sampled at temperature 1 from all tokens. Rank 0 draws for all processes; with sharded layers every
process has to compute.
Source: Agarwal et al. 2023, arXiv:2306.13649, algorithm 1; `share` is its lambda, per row.
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from veneer.bases.stop_tokens import stop_token_ids
from veneer.data.batching import RowSpans
from veneer.data.examples import Example
from veneer.data.load import DataSet
from veneer.data.own_answers import TaughtPair, pairs_of, with_longest_answers
from veneer.decoding.generate import generate, limits_of
from veneer.execution.stand_in import put_aside
from veneer.models.capacity import capacity_of
from veneer.models.frozen_base import FrozenBase
from veneer.objectives.config import OwnAnswersConfig
from veneer.training.config import RunConfig
from veneer.training.processes.world import World

_STREAM = 0x0A
"""Keeps the choice of rows apart from other random numbers of the same seed."""

Overrides = dict[int, Example]
"""Examples that replace those of the rows, by number."""


@dataclass(frozen=True)
class OwnAnswers:
    """Draws the own answers of a run.

    length, teacher_length: most tokens that student and teacher read
    """

    base: FrozenBase
    config: OwnAnswersConfig
    train: Sequence[Example]
    rows: RowSpans
    length: int
    teacher_length: int
    seed: int
    sharded: bool

    def draw(self, rows: Sequence[int], *, epoch: int, index: int, world: World) -> Overrides:
        """Answers some of these rows with the adapters that act now.

        index: of the step in its epoch. Returns the examples with those answers.
        """
        pairs = [pair for row in self._chosen(rows, epoch, index) for pair in self._pairs(row)]
        if not pairs:
            return {}
        answers: list[list[int]] = []
        with world.fail_together("on the student's own answers"):
            if world.leads or self.sharded:
                answers = self._answer([pair for _, _, pair in pairs], epoch, index)
        answers = world.broadcast_value(answers)
        overrides: Overrides = {}
        for (student, teacher, pair), answer in zip(pairs, answers, strict=True):
            overrides[student], overrides[teacher] = pair.with_answer(answer)
        return overrides

    def _chosen(self, rows: Sequence[int], epoch: int, index: int) -> list[int]:
        draws = np.random.default_rng([self.seed, epoch, index, _STREAM]).random(len(rows))
        return [row for row, draw in zip(rows, draws, strict=True) if draw < self.config.share]

    def _answer(self, pairs: Sequence[TaughtPair], epoch: int, index: int) -> list[list[int]]:
        """Returns the ids of each answer, with an end token unless it was cut."""
        prompts = [pair.prompt for pair in pairs]
        seed = random.Random(f"{self.seed} own answers {epoch} {index}").getrandbits(32)
        most = self.config.tokens
        # Modules fused for training are slow for single rows. Guessed tokens would make the shapes
        # of products, and with them the last bits, depend on earlier answers.
        with put_aside(self.base.model):
            answers = generate(
                self.base, prompts, max_new_tokens=most, temperature=1.0, seed=seed, lookup="off"
            )
        end = stop_token_ids(self.base.tokenizer, self.base.model.generation_config)[:1]
        limits = limits_of(self.base, prompts, most)
        return [
            [*ids, *(end if len(ids) < limit else ())]
            for ids, limit in zip(answers, limits, strict=True)
        ]

    def _pairs(self, row: int) -> list[tuple[int, int, TaughtPair]]:
        return pairs_of(
            self.train,
            self.rows.examples([row]),
            length=self.length,
            teacher_length=self.teacher_length,
        )

    @cached_property
    def longest(self) -> list[Example]:
        """Returns the training examples with answers as long as own answers may become."""
        return with_longest_answers(
            self.train,
            self.rows,
            self.config.tokens,
            length=self.length,
            teacher_length=self.teacher_length,
        )


def own_answers_of(
    config: RunConfig, base: FrozenBase, data: DataSet, teacher: FrozenBase
) -> OwnAnswers | None:
    """Prepares the drawing of own answers; returns None if the student learns from the rows' alone.

    teacher: the base of the teacher
    """
    own_answers = config.objective.own_answers_config
    if own_answers is None:
        return None
    return OwnAnswers(
        base,
        own_answers,
        data.train,
        RowSpans.of(data.train),
        length=config.length,
        teacher_length=capacity_of(teacher).positions or sys.maxsize,
        seed=config.seed,
        sharded=base.sharding is not None,
    )
