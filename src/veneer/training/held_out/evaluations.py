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
from veneer.evaluation.intervals import Counts, interval
from veneer.evaluation.metrics.metric import ratio
from veneer.models.score_heads import part_outputs
from veneer.models.step import part_nats, parts_of
from veneer.objectives.objective import HeldOutFigures, Objective
from veneer.training.gradient import own_micro_batches
from veneer.training.held_out.first_evaluation import EvaluationResult
from veneer.training.held_out.losses import LossCells, losses_by_set, mean_loss
from veneer.training.inputs import TrainingInputs
from veneer.training.processes.world import World
from veneer.training.state.progress import RunProgress
from veneer.training.teachers.teacher import taught_nats

FEWER_ROWS = "Take fewer rows at once, --set micro_batch=N, or a smaller --length."


def compute_evaluation(inputs: TrainingInputs, world: World, *, step: int) -> EvaluationResult:
    """Computes the values of each held-out example over all processes, and the sample answer."""
    sample, doing = inputs.sample, f"on the evaluation at step {step}"
    nats = compute_nats(inputs, world, inputs.validation, doing, _compute_of(inputs.objective))
    with _evaluating(inputs, world, doing):
        # Sharded layers are gathered by all processes, so all of them answer.
        answers = sample is not None and (world.leads or inputs.sharded)
        return EvaluationResult(nats, sample.new() if sample is not None and answers else None)


NatsOfParts = Callable[
    [TrainingInputs, Sequence[Example], Sequence[Sequence[int]]],
    list[list[float]] | list[list[list[float]]],
]
"""Computes the summed nats of examples, or the outputs of their head, part by part."""


def example_nats(
    inputs: TrainingInputs, examples: Sequence[Example], parts: Sequence[Sequence[int]]
) -> list[list[float]]:
    return part_nats(inputs, examples, parts)


def example_outputs(
    inputs: TrainingInputs, examples: Sequence[Example], parts: Sequence[Sequence[int]]
) -> list[list[list[float]]]:
    return part_outputs(inputs, examples, parts)


def _compute_of(objective: Objective) -> NatsOfParts:
    if objective.num_outputs is not None:
        return example_outputs
    return taught_nats if objective.has_teacher else example_nats


def compute_nats(
    inputs: TrainingInputs,
    world: World,
    examples: Sequence[Example],
    doing: str,
    compute: NatsOfParts = example_nats,
) -> list[float]:
    """Computes the summed nats of each example over all processes, or the outputs of its head.

    doing: as errors name it
    """
    order = by_length(examples, inputs.config.rows_at_once)
    parts = list(parts_of(inputs, examples, order))
    values = np.zeros((len(examples), inputs.objective.num_outputs or 1))
    with _evaluating(inputs, world, doing):
        examples_of_parts = ([examples[i] for i in part] for part in parts)
        assigned = own_micro_batches(examples_of_parts, world, sharded=inputs.sharded)
        own = [parts[number] for number, _ in assigned]
        computed = compute(inputs, examples, own)
        for part, (_, counts), part_values in zip(own, assigned, computed, strict=True):
            if counts:
                values[part] = np.asarray(part_values, dtype=np.float64).reshape(len(part), -1)
    return world.summed(values.ravel().tolist()) if parts else []


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
    figures = figures_of(objective.held_out(nats, answers), cells.prompts.tolist())
    sample = None
    if inputs.sample is not None and result.new is not None:
        sample = inputs.sample.record_of(result.new)
        if progress.step == 0:
            progress.sample = {"before": sample["answer"]}
        sample = {**sample, "before": progress.sample.get("before")}
    best = _enter_loss(progress, cells, loss, losses)
    if figures:
        progress.preference[str(progress.step)] = figures
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
        **({objective.figures_name: figures} if figures else {}),
    }


def figures_of(held_out: HeldOutFigures | None, prompts: Sequence[int]) -> dict[str, Any]:
    """Returns the objective's figures as a record holds them, shares with their intervals.

    prompts: a number for each row, equal for rows with the same prompt.
    """
    if held_out is None:
        return {}
    of_groups = {
        name: _with_interval(counts, None)
        for name, counts in held_out.of_groups.items()
        if counts[:, 1].any()
    }
    if held_out.right is None or held_out.counted is None:
        return {**held_out.figures, **of_groups}
    counts = np.stack([held_out.right, held_out.counted], axis=1)
    return {**held_out.figures, "accuracy": _with_interval(counts, prompts), **of_groups}


def _with_interval(counts: Counts, prompts: Sequence[int] | None) -> dict[str, float | None]:
    """Returns a share, the sum of counts[:, 0] over that of counts[:, 1], with its interval."""
    low, high = interval(counts, ratio, share=True, prompts=prompts) or (None, None)
    return {"value": ratio(counts.sum(axis=0)), "low": low, "high": high}


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
