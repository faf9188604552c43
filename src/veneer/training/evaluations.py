"""Evaluations during a run: losses on the held-out rows, a sample answer, and whether they are the
best so far."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from veneer.data.batching import by_length
from veneer.data.examples import Example
from veneer.errors import fits_memory
from veneer.evaluation.intervals import interval
from veneer.evaluation.metrics.metric import ratio
from veneer.models.step import part_nats, parts_of
from veneer.objectives.objective import HeldOutFigures
from veneer.training.first_evaluation import EvaluationResult
from veneer.training.gradient import own_micro_batches
from veneer.training.held_out import LossCells, losses_by_set, mean_loss
from veneer.training.inputs import TrainingInputs
from veneer.training.processes.world import World
from veneer.training.state.progress import RunProgress
from veneer.training.teacher import taught_nats

FEWER_ROWS = "Take fewer rows at once, --set micro_batch=N, or a smaller --length."


def compute_evaluation(inputs: TrainingInputs, world: World, *, step: int) -> EvaluationResult:
    """Computes the nats of each held-out example over all processes, and the sample answer."""
    sample, doing = inputs.sample, f"on the evaluation at step {step}"
    compute = taught_nats if inputs.objective.has_teacher else example_nats
    nats = compute_nats(inputs, world, inputs.validation, doing, compute)
    with _evaluating(inputs, world, doing):
        # Sharded layers are gathered by all processes, so all of them answer.
        answers = sample is not None and (world.leads or inputs.sharded)
        return EvaluationResult(nats, sample.new() if sample is not None and answers else None)


NatsOfParts = Callable[
    [TrainingInputs, Sequence[Example], Sequence[Sequence[int]]], list[list[float]]
]
"""Computes the summed nats of examples, part by part."""


def example_nats(
    inputs: TrainingInputs, examples: Sequence[Example], parts: Sequence[Sequence[int]]
) -> list[list[float]]:
    return part_nats(inputs.model, inputs.paths, inputs.routing, examples, parts)


def compute_nats(
    inputs: TrainingInputs,
    world: World,
    examples: Sequence[Example],
    doing: str,
    compute: NatsOfParts = example_nats,
) -> list[float]:
    """Computes the summed nats of each example over all processes. doing: as errors name it"""
    order = by_length(examples, inputs.config.rows_at_once)
    parts = list(parts_of(inputs.model, inputs.paths, examples, order))
    nats = [0.0] * len(examples)
    with _evaluating(inputs, world, doing):
        assigned = own_micro_batches(parts, examples, world, sharded=inputs.sharded)
        computed = compute(inputs, examples, [parts[number] for number, _ in assigned])
        for (number, counts), values in zip(assigned, computed, strict=True):
            if counts:
                for example, value in zip(parts[number], values, strict=True):
                    nats[example] = value
    return world.summed(nats) if parts else []


@contextmanager
def _evaluating(inputs: TrainingInputs, world: World, doing: str) -> Iterator[None]:
    with world.fail_together(doing), fits_memory(doing, next_step=inputs.memory_advice(FEWER_ROWS)):
        yield


def evaluation_record(
    inputs: TrainingInputs,
    progress: RunProgress,
    cells: LossCells,
    result: EvaluationResult,
    *,
    start: float,
) -> dict[str, Any] | None:
    """Enters an evaluation into the progress; returns its record, None if nothing is held out.

    start: time.perf_counter() when the evaluation began.
    """
    nats, answers, objective = np.array(result.nats), inputs.held_out_answers(), inputs.objective
    losses = objective.answer_losses(nats, answers).tolist() if result.nats else []
    counts = objective.counts(inputs.validation).tolist()
    loss = mean_loss(losses, counts)
    sets = losses_by_set(inputs.validation, inputs.validation_sets, losses, counts)
    preference = _preference(objective.held_out(nats, answers), cells.prompts.tolist())
    sample = None
    if inputs.sample is not None and result.new is not None:
        sample = inputs.sample.record_of(result.new)
        if progress.step == 0:
            progress.sample = {"before": sample["answer"]}
        sample = {**sample, "before": progress.sample.get("before")}
    best = _enter_loss(progress, cells, loss, losses)
    if preference:
        progress.preference[str(progress.step)] = preference
    if loss is None and sample is None:
        return None
    return {
        "kind": "evaluation",
        "step": progress.step,
        "loss": loss,
        "best": best,
        "seconds": time.perf_counter() - start,
        "sample": sample,
        **({"sets": sets} if sets else {}),
        **({"preference": preference} if preference else {}),
    }


def _preference(held_out: HeldOutFigures | None, prompts: Sequence[int]) -> dict[str, Any]:
    """Returns figures of preferences as a record holds them, the accuracy with its interval.

    prompts: a number for each row, equal for rows with the same prompt.
    """
    if held_out is None:
        return {}
    counts = np.stack([held_out.right, held_out.counted], axis=1)
    low, high = interval(counts, ratio, share=True, prompts=prompts) or (None, None)
    accuracy = {"value": held_out.figures["accuracy"], "low": low, "high": high}
    return {**held_out.figures, "accuracy": accuracy}


def _enter_loss(
    progress: RunProgress, cells: LossCells, loss: float | None, losses: list[float]
) -> bool:
    """Enters a held-out loss into the progress; returns whether it is the best of the run.

    The untrained base has no checkpoint, so its loss is never the best. Nor is a loss that is not
    finite: nothing would compare as better than NaN.
    """
    step = progress.step
    finite = loss is not None and math.isfinite(loss)
    if loss is not None and finite:
        progress.nats[str(step)] = cells.sums(losses)
    if step == 0 or loss is None:
        return False
    if finite:
        progress.losses[str(step)] = loss
    if finite and (progress.best_loss is None or loss < progress.best_loss):
        progress.best_loss, progress.best_step = loss, step
        progress.evaluations_without_better = 0
        return True
    progress.evaluations_without_better += 1
    return False
