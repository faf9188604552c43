"""Plans runs over one base: dry-runs each choice once, estimates its memory, predicts its time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from veneer.bases.compute import Compute, choose
from veneer.bases.loading.blueprint import Blueprint
from veneer.data.examples import Example
from veneer.data.longest import Extent
from veneer.errors import ConfigError
from veneer.plan.choice import Choice
from veneer.plan.estimate import (
    KERNEL_BYTES,
    PROCESS_BYTES,
    Device,
    Estimate,
    compiled_kernels,
    estimate,
    scaled,
)
from veneer.plan.machine import AnswerWork, Machine
from veneer.plan.simulation.remembered import (
    ConfigFacts,
    config_facts,
    remember_attached_facts,
    remember_run,
    rows_digest,
)
from veneer.plan.simulation.step_counts import WEIGHTS, DryRun, Step
from veneer.plan.simulation.teacher_weights import PlannedTeachers, prompt_bytes
from veneer.plan.spread import StepTime, StepTraffic, longest_share, sent, step_time
from veneer.plan.workload import Workload
from veneer.quant.config import Quantize, weight_format
from veneer.training.config import trains_packed

if TYPE_CHECKING:
    from veneer.plan.simulation.dry_run import AttachedFacts, BaseFacts

SAMPLE_SIZES = 2
"""Batch sizes that a sample answer adds: the question, and one row per new token."""


@dataclass
class Planner:
    """Plans runs over one base. The largest micro-batch decides memory, the median one time.

    device: of the run. idle_bytes: memory before the base loads (CPU).
    """

    blueprint: Blueprint
    workload: Workload = field(default_factory=Workload)
    device: Device = "cpu"
    idle_bytes: int = PROCESS_BYTES
    _runs: dict[object, DryRun] = field(default_factory=dict, repr=False)
    _wholes: dict[object, AttachedFacts] = field(default_factory=dict, repr=False)
    _bares: dict[torch.dtype, BaseFacts] = field(default_factory=dict, repr=False)

    @cached_property
    def _teachers(self) -> PlannedTeachers:
        return PlannedTeachers(self.device)

    def without_rows(self) -> Planner:
        """Returns the same planner for synthetic rows; it shares what is counted."""
        return replace(self, workload=self.workload.without_rows())

    @cached_property
    def facts(self) -> ConfigFacts:
        return config_facts(self.blueprint)

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
        highest predicted memory, if that is higher (estimate.scaled).
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

    def is_counted(self, choice: Choice) -> bool:
        """Returns whether `least_estimate` needs no further dry run."""
        return self._run_key(choice, self.largest(choice)[0]) in self._runs

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
        if self.workload.known_largest:
            return self.workload.known_largest
        if not self.workload.rows:  # to find out how rows are packed would import transformers
            return [max(self.workload.steps_of_epoch(choice)[0], key=len)]
        packed = self._whole(self._base_key(choice), self._step(choice, ())).paths.packed
        return self.workload.largest(choice, packed=packed)

    def step_time(self, choice: Choice, machine: Machine) -> StepTime:
        """Predicts the seconds of a step by part."""
        epoch = self.workload.epoch(choice)
        run = self._run(choice, epoch.usual)
        single_seconds = machine.seconds(run.work) * choice.batch / choice.rows_at_once
        answers = 0.0
        if choice.own_answers is not None:
            prompts = [len(row.ids) - row.trained_tokens for row in epoch.usual]
            work = AnswerWork(
                answers=choice.own_answers.share * choice.batch,
                prompt_tokens=sum(prompts) / len(prompts),
                tokens=choice.own_answers.tokens,
                parameters=run.total_parameters,
                weight_bytes=run.static[WEIGHTS],
            )
            answers = machine.answer_seconds(work)
        if choice.processes == 1:
            return StepTime(single_seconds, answers=answers)
        share = longest_share(epoch.costs, choice.processes, together=choice.in_shards)
        traffic = self.sent(choice)
        time = step_time(single_seconds, share, choice.processes, traffic, machine.link)
        return replace(time, answers=answers)

    def sent(self, choice: Choice) -> StepTraffic:
        """Predicts what each process sends in a step."""
        if choice.processes == 1:
            return StepTraffic()
        epoch = self.workload.epoch(choice)
        rounds = sum(-(-len(step) // choice.processes) for step in epoch.costs) / len(epoch.costs)
        run = self._run(choice, epoch.usual)
        return sent(
            run, choice.processes, reduce=choice.reduce, shard=choice.in_shards, rounds=rounds
        )

    def step_run(self, choice: Choice) -> DryRun:
        """Returns the dry run of the usual micro-batch."""
        return self._run(choice, self.workload.epoch(choice).usual)

    def _kernels(self, run: DryRun, choice: Choice) -> int:
        """Counts the products that are compiled: shapes of the step times batch sizes, and of
        evaluations.
        """
        epoch = self.workload.epoch(choice)
        sizes = epoch.sizes
        evaluation_sizes = self.workload.evaluated_sizes(choice.rows_at_once) - sizes
        answer_sizes = SAMPLE_SIZES if self.workload.held_out else 0
        draws = (epoch.taken + 1) * self.facts.layers * run.experts
        return compiled_kernels(run, len(sizes), draws) + run.forward_shapes * (
            len(evaluation_sizes) + answer_sizes
        )

    def _run(self, choice: Choice, rows: Sequence[Example]) -> DryRun:
        """Dry-runs a micro-batch.

        Over 4 bits, and sharded, a step is the dense step minus what is not held, so one dry run
        serves all.
        """
        quantize = self.quantize(choice)
        key = self._run_key(choice, rows)
        if key not in self._runs:
            step = self._step(choice, rows)
            self._runs[key] = remember_run(step, lambda: self._whole(self._base_key(choice), step))
        run = self._runs[key]
        if self.blueprint.packed:
            run = run.over(self.blueprint.packed, self.dtype(choice))
        elif quantize is not None:
            run = run.in_four_bits()
        if self.compute(choice).narrow and not (choice.method.trains_base or choice.in_shards):
            run = run.with_narrow_weights(in_four_bits=quantize is not None)
        if choice.teacher is not None:
            run = run.with_teacher(self._teachers.weights(choice.teacher))
        if tokens := self.workload.teacher_prompt:
            base = self.blueprint if choice.teacher is None else self._teachers.base(choice.teacher)
            run = run.with_prompt(prompt_bytes(base, tokens))
        if choice.reduce == "exact":
            run = run.with_exact_sums()
        return run.in_shards(choice.processes) if choice.in_shards else run

    def _run_key(self, choice: Choice, rows: Sequence[Example]) -> tuple[object, ...]:
        """Returns the key of the dry run of a micro-batch."""
        return (
            *self._base_key(choice),
            choice.checkpointing,
            choice.offload,
            choice.share_prompt,
            choice.teacher,
            rows_digest(rows),
        )

    def _base_key(self, choice: Choice) -> tuple[object, ...]:
        """Returns the key of the AttachedFacts of a choice."""
        return (
            choice.method.model_dump_json(),
            self.dtype(choice),
            choice.optimizer,
            choice.new_tokens,
            choice.head,
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
            teacher=None if choice.teacher is None else self._teachers.model(choice.teacher),
            head=choice.head,
            on_cpu=self.device == "cpu",
        )

    def _whole(self, base_key: object, step: Step) -> AttachedFacts:
        if base_key not in self._wholes:
            self._wholes[base_key] = remember_attached_facts(step, self._bares)
        return self._wholes[base_key]
