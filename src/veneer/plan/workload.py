"""The rows that a run computes, and the micro-batches that its steps make of them."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from veneer.data.batching import (
    EpochPlan,
    RowSpans,
    by_length,
    packed_rows,
    plan_epoch,
    shared_prompt,
    used_length,
)
from veneer.data.examples import Example, RowRef
from veneer.data.files.on_disk import representative_examples
from veneer.data.longest import largest_micro_batches, plans_of_run
from veneer.data.mixture import Mixture
from veneer.data.own_answers import with_longest_answers
from veneer.data.teacher import taught_pairs, with_targets
from veneer.plan.choice import Choice
from veneer.plan.spread import Costs
from veneer.training.config import EPOCHS_UNSAID, RunConfig

if TYPE_CHECKING:
    from veneer.data.load import DataSet


@dataclass(frozen=True)
class Epoch:
    """Summarises the micro-batches of the first epoch.

    usual    the micro-batch of median size
    sizes    numbers of rows in the products of the run's steps
    taken    micro-batches of the run's steps
    costs    tokens of each micro-batch, by step of the run
    """

    usual: Sequence[Example]
    sizes: frozenset[int]
    taken: int
    costs: Costs


@dataclass
class Workload:
    """Holds the rows of a run and the order in which its steps take them.

    Without rows, a step computes synthetic rows of the choice's length. held_out: rows of
    evaluations. mixture: how many rows of each set an epoch takes. steps: optimizer steps of the
    run; None: those of `epochs`. known_largest: micro-batches that may be the largest, if known.
    """

    rows: Sequence[Example] = ()
    held_out: Sequence[Example] = ()
    mixture: Mixture | None = None
    seed: int = 0
    order: Literal["bucketed", "shuffled", "file"] = "bucketed"
    steps: int | None = None
    epochs: float = EPOCHS_UNSAID
    known_largest: Sequence[Sequence[Example]] = ()
    teacher_prompt: int = 0
    """Tokens that all examples of a teacher begin with; their keys and values stay in memory."""
    _epochs: dict[object, Epoch] = field(init=False, default_factory=dict, repr=False)
    _largest: dict[object, Sequence[Sequence[Example]]] = field(
        init=False, default_factory=dict, repr=False
    )

    @classmethod
    def of(
        cls,
        config: RunConfig,
        data: DataSet | None,
        known_largest: Sequence[Sequence[Example]] = (),
    ) -> Workload:
        """Takes the order from a run's settings. Rows in files are sampled, and the sample stands
        for all of them."""
        workload = cls(
            seed=config.seed,
            order=config.order,
            steps=config.steps,
            epochs=EPOCHS_UNSAID if config.epochs is None else config.epochs,
            known_largest=known_largest,
        )
        if data is None:
            return workload
        rows = representative_examples(data.train)
        if (own_answers := config.objective.own_answers_config) is not None:
            rows = with_longest_answers(
                rows,
                RowSpans.of(rows),
                own_answers.tokens,
                length=config.length,
                teacher_length=sys.maxsize,
            )
        taught = [row for row in rows if row.kind == "teacher"]
        return replace(
            workload,
            rows=rows,
            teacher_prompt=shared_prompt(taught) if taught else 0,
            held_out=representative_examples(data.validation),
            mixture=data.mixture if data.in_files is None else None,
        )

    @property
    def num_rows(self) -> int:
        """Number of rows; a row may have become several examples."""
        return len(RowSpans.of(self.rows).lengths) if self.rows else 0

    def without_rows(self) -> Workload:
        return replace(self, rows=(), mixture=None, known_largest=())

    def largest(self, choice: Choice, *, packed: bool) -> Sequence[Sequence[Example]]:
        """Returns the micro-batches of the run that may take the most memory (data/longest.py)."""
        key = choice.batch, choice.rows_at_once, choice.length, choice.share_prompt, packed
        if key not in self._largest:
            self._largest[key] = self._find_largest(choice, packed=packed)
        return self._largest[key]

    def _find_largest(self, choice: Choice, *, packed: bool) -> Sequence[Sequence[Example]]:
        examples, mixture = self._cut_rows(choice.length)
        rows = RowSpans.of(examples)
        batches = len(self._plan(rows, mixture, choice))
        plans = plans_of_run(
            examples,
            rows,
            batch=choice.batch,
            seed=self.seed,
            order=self.order,
            mixture=mixture,
            steps=self.steps or max(1, math.ceil(self.epochs * batches)),
        )
        size, share = choice.rows_at_once, choice.share_prompt
        micro_batches = largest_micro_batches(
            examples, rows, plans, micro_batch=size, packed=packed, share_prompt=share
        )
        return [[examples[i] for i in part] for part in micro_batches]

    def epoch(self, choice: Choice) -> Epoch:
        key = choice.batch, choice.rows_at_once, choice.length, choice.share_prompt
        if key not in self._epochs:
            steps = self.steps_of_epoch(choice)
            costs = [[sum(map(used_length, part)) for part in parts] for parts in steps]
            batches = [part for parts in steps for part in parts]
            computed = [packed_rows(part, share_prompt=choice.share_prompt) for part in batches]
            by_size = sorted(range(len(batches)), key=lambda n: (computed[n], n))
            taken = sum(len(parts) for parts in steps[: self.steps])
            usual = batches[by_size[len(by_size) // 2]]
            self._epochs[key] = Epoch(
                usual, frozenset(computed[:taken]), taken, costs[: self.steps]
            )
        return self._epochs[key]

    def steps_per_epoch(self, choice: Choice) -> int | None:
        if self.mixture is not None:
            return -(-len(self.mixture.rows(self.seed, 0)) // choice.batch)
        rows = [row for row in self.rows if len(row.ids) <= choice.length]
        return -(-len(RowSpans.of(rows).lengths) // choice.batch) if rows else None

    def total_steps(self, choice: Choice) -> int | None:
        """Returns the optimizer steps of the run; None if neither they nor rows are given."""
        per_epoch = self.steps_per_epoch(choice)
        return self.steps or (
            None if per_epoch is None else max(1, math.ceil(per_epoch * self.epochs))
        )

    def steps_of_epoch(self, choice: Choice) -> list[list[Sequence[Example]]]:
        """Returns the micro-batches of each step of the first epoch, in training order.

        Without data, one step of synthetic rows.
        """
        size = choice.rows_at_once
        if not self.rows:
            parts = [min(size, choice.batch - start) for start in range(0, choice.batch, size)]
            return [[synthetic_rows(rows, choice.length) for rows in parts]]
        rows, mixture = self._cut_rows(choice.length)
        row_table = RowSpans.of(rows)
        return [
            [
                [rows[i] for i in row_table.examples(step_rows[start : start + size])]
                for start in range(0, len(step_rows), size)
            ]
            for step_rows in self._plan(row_table, mixture, choice)
        ]

    def evaluated_sizes(self, batch: int) -> frozenset[int]:
        """Returns the numbers of rows in the products of evaluations (models/step.py)."""
        parts = [[self.held_out[i] for i in part] for part in by_length(self.held_out, batch)]
        return frozenset(packed_rows(part, share_prompt=True) for part in parts)

    def learns_at(self, length: int) -> bool:
        """Whether a row trains a token if rows are cut at this length; true without rows."""
        students = [row for row in self.rows if row.kind != "teacher"]
        return not students or any(row.trained[:length].any() for row in students)

    def _plan(self, rows: RowSpans, mixture: Mixture | None, choice: Choice) -> EpochPlan:
        """Returns the batches of the first epoch."""
        return plan_epoch(
            rows.lengths,
            batch=choice.batch,
            seed=self.seed,
            epoch=0,
            order=self.order,
            mixture=mixture,
        )

    def _cut_rows(self, length: int) -> tuple[list[Example], Mixture | None]:
        """Cuts rows to a length; returns those that still train a token, and their mixture.

        What a teacher reads ends with the same target as the student's row.
        """
        rows = [row if row.kind == "teacher" else _cut(row, length) for row in self.rows]
        if rows and rows[-1].kind == "teacher":
            for student, taught in taught_pairs(RowSpans.of(rows)):
                rows[taught] = with_targets(rows[taught], rows[student].trained_tokens)
        trained_rows = [number for number, row in enumerate(rows) if row.trained.any()]
        mixture = self.mixture
        if mixture is not None and len(trained_rows) < len(rows):
            row_ends = np.asarray(RowSpans.of(self.rows).starts[1:])
            mixture = mixture.among(
                np.unique(np.searchsorted(row_ends, trained_rows, side="right"))
            )
        return [rows[number] for number in trained_rows], mixture


def _cut(row: Example, length: int) -> Example:
    return (
        row
        if len(row.ids) <= length
        else replace(row, ids=row.ids[:length], trained=row.trained[:length])
    )


def synthetic_rows(batch: int, length: int) -> Sequence[Example]:
    """Makes rows of one length that begin differently; all tokens but the first are trained."""
    trained = np.zeros(length, dtype=np.bool_)
    trained[min(1, length - 1) :] = True
    rows = []
    for number in range(batch):
        ids = np.zeros(length, dtype=np.int32)
        ids[0] = number
        rows.append(Example(ids, trained, RowRef("planned", number + 1), number))
    return rows
