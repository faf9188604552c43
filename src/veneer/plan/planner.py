"""Plans runs over one base: each choice is dry-run once, its memory estimated, its time predicted.

A Choice holds the settings of a run that decide its cost. Rows are those of the data if there are
any (the largest micro-batch decides memory, the median one time), else rows of one length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from veneer.adapters.config import MethodConfig
from veneer.bases.compute import Compute, DtypeName, choose
from veneer.bases.loading.blueprint import Blueprint
from veneer.data.batching import (
    EpochPlan,
    RowSpans,
    by_length,
    packed_rows,
    plan_epoch,
    used_length,
)
from veneer.data.examples import Example
from veneer.data.longest import Extent, largest_micro_batches, plans_of_run
from veneer.data.mixture import Mixture
from veneer.errors import ConfigError
from veneer.plan.counted import DryRun, Step
from veneer.plan.estimate import (
    KERNEL_BYTES,
    PROCESS_BYTES,
    Device,
    Estimate,
    compiled_kernels,
    estimate,
    synthetic_rows,
)
from veneer.plan.kept import ConfigFacts, kept_attached_facts, kept_facts, kept_run, rows_digest
from veneer.plan.machine import Machine
from veneer.plan.ranking import scaled
from veneer.plan.spread import Costs, StepTime, StepTraffic, longest_share, sent, step_time
from veneer.quant.config import Quantize, weight_format
from veneer.training.config import (
    EPOCHS_UNSAID,
    OptimizerName,
    RunConfig,
    rows_at_once,
    trains_packed,
)
from veneer.training.processes.reduce import ReduceKind

if TYPE_CHECKING:
    from veneer.plan.dry_run import AttachedFacts, BaseFacts

SAMPLE_SIZES = 2
"""Batch sizes that a sample answer adds: the question, and one row per new token."""


@dataclass(frozen=True)
class Choice:
    """Holds what decides a run's cost: fields of RunConfig, and the numbers of processes and new
    tokens.
    """

    method: MethodConfig
    quantize: Quantize | None = None
    dtype: DtypeName = "auto"
    batch: int = 8
    micro_batch: int | None = None
    length: int = 2048
    checkpointing: bool = False
    share_prompt: bool = True
    optimizer: OptimizerName = "adamw"
    offload: bool = False
    shard: bool = False
    reduce: ReduceKind = "plain"
    new_tokens: int = 0
    processes: int = 1

    @property
    def rows_at_once(self) -> int:
        """Returns the rows of a micro-batch, as training/together.py divides the batch."""
        return rows_at_once(self.batch, self.micro_batch, self.reduce, self.processes)

    @property
    def in_shards(self) -> bool:
        """Returns whether layers are sharded: a single process holds everything."""
        return self.shard and self.processes > 1

    def with_dtype(self, dtype: DtypeName) -> Choice:
        return replace(self, dtype=dtype)

    @property
    def label(self) -> str:
        """Returns the name on the command line: qlora for lora over 4 bits."""
        return weight_format(self.quantize).before_method + self.method.name


def choice_of(config: RunConfig, processes: int = 1) -> Choice:
    return Choice(
        method=config.method,
        quantize=config.quantize,
        dtype=config.dtype,
        batch=config.batch,
        micro_batch=config.micro_batch,
        length=config.length,
        checkpointing=config.checkpointing,
        share_prompt=config.share_prompt,
        optimizer=config.optimizer,
        offload=config.offload,
        shard=config.shard,
        reduce=config.reduce,
        new_tokens=len(config.new_tokens),
        processes=processes,
    )


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
class Planner:
    """Plans runs over one base. device: of the run. idle_bytes: memory before the base loads (CPU).

    rows: of the data, if any. mixture: how many rows of each set an epoch takes. held_out: rows of
    evaluations. steps: optimizer steps of the run; None: those of `epochs`. known_largest:
    micro-batches that may be the largest, if known.
    """

    blueprint: Blueprint
    device: Device = "cpu"
    idle_bytes: int = PROCESS_BYTES
    rows: Sequence[Example] = ()
    held_out: Sequence[Example] = ()
    mixture: Mixture | None = None
    seed: int = 0
    order: str = "bucketed"
    trained_share: float = 1.0
    steps: int | None = None
    epochs: float = EPOCHS_UNSAID
    known_largest: Sequence[Sequence[Example]] = ()
    _runs: dict[object, DryRun] = field(default_factory=dict, repr=False)
    _wholes: dict[object, AttachedFacts] = field(default_factory=dict, repr=False)
    _bares: dict[torch.dtype, BaseFacts] = field(default_factory=dict, repr=False)
    _epochs: dict[object, Epoch] = field(init=False, default_factory=dict, repr=False)
    _largest: dict[object, Sequence[Sequence[Example]]] = field(
        init=False, default_factory=dict, repr=False
    )

    @cached_property
    def facts(self) -> ConfigFacts:
        return kept_facts(self.blueprint)

    def compute(self, choice: Choice) -> Compute:
        """Returns the type that loading would choose for the base."""
        return choose(self.blueprint.dtype, choice.dtype, torch.device(self.device))

    def dtype(self, choice: Choice) -> torch.dtype:
        return self.compute(choice).held

    def quantize(self, choice: Choice) -> Quantize | None:
        """Returns the base's weight format. Raises ConfigError as loading does."""
        base_format = self.blueprint.quantize
        if base_format is None:
            return choice.quantize
        if choice.quantize not in (None, base_format):
            raise ConfigError(
                f"{self.blueprint.source} holds its weights as {base_format}, not as"
                f" {choice.quantize}",
                next_step="Leave quantize out: such a folder is read as it is.",
            )
        if weight_format(base_format).from_folder and not self.blueprint.packed:
            raise ConfigError(
                f"{self.blueprint.source} holds its weights as {base_format}, and only its files"
                " say how large they are",
                next_step="Download the model, then plan its folder.",
            )
        if choice.method.trains_base:
            raise ConfigError(
                trains_packed(choice.method, base_format), next_step="Take method lora."
            )
        return base_format

    def takes(self, choice: Choice) -> bool:
        """Returns whether the base's weights allow such a run."""
        try:
            self.quantize(choice)
        except ConfigError:
            return False
        return True

    def estimate(self, choice: Choice) -> Estimate:
        """Estimates the step with the largest micro-batch. ConfigError if the method does not fit
        the base.
        """
        return self.largest_estimate(choice)[1]

    def largest_estimate(self, choice: Choice) -> tuple[int, Estimate]:
        """Returns the index in `largest` of the micro-batch that needs most memory, and its
        estimate.

        At most two are dry-run: the one with most computed rows, and the one of the others with the
        highest predicted memory, if that is higher (ranking.py).
        """
        candidates = self.largest(choice)
        first = self._estimate_of(choice, self._run(choice, candidates[0]))
        if len(candidates) == 1:
            return 0, first
        packed, share = first.run.packed, choice.share_prompt
        extents = [Extent.of(rows, packed=packed, share_prompt=share) for rows in candidates]
        peaks = [
            self._estimate_of(choice, scaled(first.run, extents[0], extent)).peak_bytes
            for extent in extents[1:]
        ]
        number = 1 + peaks.index(max(peaks))
        if max(peaks) <= first.peak_bytes:
            return 0, first
        second = self._estimate_of(choice, self._run(choice, candidates[number]))
        return (number, second) if second.peak_bytes > first.peak_bytes else (0, first)

    def least_estimate(self, choice: Choice) -> Estimate:
        """Estimates the step with the most computed rows by one dry run: a run needs at least this
        much."""
        return self._estimate_of(choice, self._run(choice, self.largest(choice)[0]))

    def _estimate_of(self, choice: Choice, run: DryRun) -> Estimate:
        return estimate(
            run,
            device=self.device,
            idle_bytes=self.idle_bytes,
            kernel_bytes=KERNEL_BYTES.get(self.dtype(choice), 0) * self._kernels(run, choice),
            checkpointing=choice.checkpointing,
        )

    def largest(self, choice: Choice) -> Sequence[Sequence[Example]]:
        """Returns the micro-batches of the run that may take the most memory (data/longest.py)."""
        if self.known_largest:
            return self.known_largest
        if not self.rows:  # finding out how rows are packed would import transformers
            return [max(self._steps(choice)[0], key=len)]
        packed = self._whole(self._base_key(choice), self._step(choice, ())).paths.packed
        key = choice.batch, choice.rows_at_once, choice.length, choice.share_prompt, packed
        if key not in self._largest:
            self._largest[key] = self._find_largest(choice, packed=packed)
        return self._largest[key]

    def _find_largest(self, choice: Choice, *, packed: bool) -> Sequence[Sequence[Example]]:
        examples, mixture = self._cut_rows(choice.length)
        rows = RowSpans.of(examples)
        batches = len(self._plan(rows, mixture, choice))
        plans = plans_of_run(
            rows,
            batch=choice.batch,
            seed=self.seed,
            order=self.order,  # type: ignore[arg-type]
            mixture=mixture,
            steps=self.steps or max(1, math.ceil(self.epochs * batches)),
        )
        size, share = choice.rows_at_once, choice.share_prompt
        micro_batches = largest_micro_batches(
            examples, rows, plans, micro_batch=size, packed=packed, share_prompt=share
        )
        return [[examples[i] for i in part] for part in micro_batches]

    def seconds_per_step(self, choice: Choice, machine: Machine) -> float:
        """Predicts the seconds of a step with a batch of median length."""
        return self.step_time(choice, machine).seconds

    def step_time(self, choice: Choice, machine: Machine) -> StepTime:
        """Predicts the seconds of a step by part."""
        epoch = self.epoch(choice)
        single_seconds = (
            machine.seconds(self._run(choice, epoch.usual).work)
            * choice.batch
            / choice.rows_at_once
        )
        if choice.processes == 1:
            return StepTime(single_seconds)
        share = longest_share(epoch.costs, choice.processes, together=choice.in_shards)
        return step_time(single_seconds, share, choice.processes, self.sent(choice), machine.link)

    def sent(self, choice: Choice) -> StepTraffic:
        """Predicts what each process sends in a step."""
        if choice.processes == 1:
            return StepTraffic()
        epoch = self.epoch(choice)
        rounds = sum(-(-len(step) // choice.processes) for step in epoch.costs) / len(epoch.costs)
        run = self._run(choice, epoch.usual)
        return sent(
            run, choice.processes, reduce=choice.reduce, shard=choice.in_shards, rounds=rounds
        )

    def step_run(self, choice: Choice) -> DryRun:
        """Returns the dry run of the usual micro-batch."""
        return self._run(choice, self.epoch(choice).usual)

    def epoch(self, choice: Choice) -> Epoch:
        key = choice.batch, choice.rows_at_once, choice.length, choice.share_prompt
        if key not in self._epochs:
            steps = self._steps(choice)
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

    def _kernels(self, run: DryRun, choice: Choice) -> int:
        """Counts the products that are compiled: shapes of the step times batch sizes, and of
        evaluations.
        """
        epoch = self.epoch(choice)
        sizes = epoch.sizes
        evaluation_sizes = evaluated_sizes(self.held_out, choice.rows_at_once) - sizes
        answer_sizes = SAMPLE_SIZES if self.held_out else 0
        draws = (epoch.taken + 1) * self.facts.layers * run.experts
        return compiled_kernels(run, len(sizes), draws) + run.forward_shapes * (
            len(evaluation_sizes) + answer_sizes
        )

    def steps_per_epoch(self, choice: Choice) -> int | None:
        if self.mixture is not None:
            return -(-len(self.mixture.rows(self.seed, 0)) // choice.batch)
        rows = [row for row in self.rows if len(row.ids) <= choice.length]
        return -(-len(RowSpans.of(rows).lengths) // choice.batch) if rows else None

    def _steps(self, choice: Choice) -> list[list[Sequence[Example]]]:
        """Returns the micro-batches of each step of the first epoch, in training order.

        Without data, one step of synthetic rows.
        """
        size = choice.rows_at_once
        if not self.rows:
            parts = [min(size, choice.batch - start) for start in range(0, choice.batch, size)]
            return [
                [
                    synthetic_rows(rows, choice.length, trained_share=self.trained_share)
                    for rows in parts
                ]
            ]
        rows, mixture = self._cut_rows(choice.length)
        row_table = RowSpans.of(rows)
        return [
            [
                [rows[i] for i in row_table.examples(step_rows[start : start + size])]
                for start in range(0, len(step_rows), size)
            ]
            for step_rows in self._plan(row_table, mixture, choice)
        ]

    def _plan(self, rows: RowSpans, mixture: Mixture | None, choice: Choice) -> EpochPlan:
        """Returns the batches of the first epoch."""
        return plan_epoch(
            rows.lengths,
            batch=choice.batch,
            seed=self.seed,
            epoch=0,
            order=self.order,  # type: ignore[arg-type]
            mixture=mixture,
        )

    def _cut_rows(self, length: int) -> tuple[list[Example], Mixture | None]:
        """Cuts rows to a length; returns those that still train a token, and their mixture."""
        rows = [_cut(row, length) for row in self.rows]
        trained_rows = [number for number, row in enumerate(rows) if row.trained.any()]
        mixture = self.mixture
        if mixture is not None and len(trained_rows) < len(rows):
            row_ends = np.asarray(RowSpans.of(self.rows).starts[1:])
            mixture = mixture.among(
                np.unique(np.searchsorted(row_ends, trained_rows, side="right"))
            )
        return [rows[number] for number in trained_rows], mixture

    def _run(self, choice: Choice, rows: Sequence[Example]) -> DryRun:
        """Dry-runs a micro-batch.

        Over 4 bits, and sharded, a step is the dense step minus what is not held, so one dry run
        serves all.
        """
        quantize = self.quantize(choice)
        base_key = self._base_key(choice)
        key = (
            *base_key,
            choice.checkpointing,
            choice.offload,
            choice.share_prompt,
            rows_digest(rows),
        )
        if key not in self._runs:
            step = self._step(choice, rows)
            self._runs[key] = kept_run(step, lambda: self._whole(base_key, step))
        run = self._runs[key]
        if self.blueprint.packed:
            run = run.over(self.blueprint.packed, self.dtype(choice))
        elif quantize is not None:
            run = run.in_four_bits()
        if choice.reduce == "exact":
            run = run.with_exact_sums()
        return run.in_shards(choice.processes) if choice.in_shards else run

    def _base_key(self, choice: Choice) -> tuple[object, ...]:
        """Key of the AttachedFacts of a choice."""
        return (
            choice.method.model_dump_json(),
            self.dtype(choice),
            choice.optimizer,
            choice.new_tokens,
        )

    def _step(self, choice: Choice, rows: Sequence[Example]) -> Step:
        return Step(
            self.blueprint,
            self.dtype(choice),
            choice.method,
            rows,
            checkpointing=choice.checkpointing,
            share_prompt=choice.share_prompt,
            optimizer=choice.optimizer,
            offload=choice.offload,
            new_tokens=choice.new_tokens,
            on_cpu=self.device == "cpu",
        )

    def _whole(self, base_key: object, step: Step) -> AttachedFacts:
        if base_key not in self._wholes:
            self._wholes[base_key] = kept_attached_facts(step, self._bares)
        return self._wholes[base_key]


def evaluated_sizes(rows: Sequence[Example], batch: int) -> frozenset[int]:
    """Returns the numbers of rows in an evaluation's products (models/step.py)."""
    parts = by_length(rows, batch)
    return frozenset(packed_rows([rows[i] for i in part], share_prompt=True) for part in parts)


def _cut(row: Example, length: int) -> Example:
    return (
        row
        if len(row.ids) <= length
        else replace(row, ids=row.ids[:length], trained=row.trained[:length])
    )
