"""The teacher of runs: the base alone, or with a stored adapter; it reads its own prompt.

Its predictions are computed beside each micro-batch, in one forward without a gradient for all
runs whose micro-batches share a forward. Rows know their adapters, so the same base serves student
and teacher, and nothing of the teacher is kept from step to step. It drops nothing out.

Without a gradient its rows cost a third of a student's and store nothing, so they do not stand in
the student's own forward.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import count

import torch

from veneer.adapters.combinations import refuse_answers
from veneer.adapters.placement.acting import Acting, Applied, in_turn
from veneer.data.examples import Example
from veneer.data.joint_batch import join_batches
from veneer.formats.adapter import StoredAdapter, read_adapter
from veneer.formats.loading import load_adapter
from veneer.library.library import Library
from veneer.models.frozen_base import FrozenBase
from veneer.models.step import predictions_of_runs
from veneer.objectives.objective import Predictions
from veneer.training.config import RunConfig
from veneer.training.inputs import ForwardInputs, TrainingInputs


def locate_teacher(config: RunConfig) -> tuple[RunConfig, StoredAdapter | None]:
    """Returns the settings with absolute paths of the teacher's files, and its stored adapter.

    Raises ConfigError if a run is resumed with another adapter, and the errors of reading it.
    """
    objective, stored = config.objective, None
    if objective.teacher_adapter is None:
        located = objective.located(None, None)
    else:
        folder = Library().locate(objective.teacher_adapter)
        stored = read_adapter(folder)
        located = objective.located(str(folder.absolute()), stored.content_hash)
    return config.model_copy(update={"objective": located}), stored


def attach_teacher(base: FrozenBase, stored: StoredAdapter | None) -> Applied:
    """Attaches the teacher's adapter; returns the adapters of the teacher's rows.

    Raises RefusedError for an adapter that predicts no tokens.
    """
    if stored is None:
        return ()
    refuse_answers([(str(stored.folder), stored.contents)])
    names = (f"teacher {number}" for number in count(1))
    name = next(name for name in names if name not in base.attachments)
    return ((load_adapter(base, stored, name=name), 1.0),)


def teacher_examples(examples: Iterable[Example]) -> list[Example]:
    return [example for example in examples if example.kind == "teacher"]


@torch.no_grad()
def predict_as_teachers(
    runs: Sequence[tuple[ForwardInputs, Applied, Sequence[Example]]],
) -> list[Predictions | None]:
    """Returns the predictions of each run's teacher, None for a run without a teacher's examples.

    One forward computes all of them. runs: each with its teacher's adapters, and the examples that
    the teacher reads
    """
    taught = [run for run in runs if run[2]]
    if not taught:
        return [None] * len(runs)
    parts = [forward.batch(examples) for forward, _, examples in taught]
    batch, rows = join_batches(parts)
    first = taught[0][0]
    readers = [
        (adapters, part.trained_tokens)
        for (_, adapters, _), part in zip(taught, parts, strict=True)
    ]
    acting = in_turn([(n, adapters) for n, (adapters, _) in zip(rows, readers, strict=True)])
    with first.routing.held(acting):
        computed = list(
            predictions_of_runs(first.model, first.paths, first.routing, batch, readers)
        )
    predictions = iter(computed)
    return [next(predictions) if examples else None for _, _, examples in runs]


def taught_nats(
    inputs: TrainingInputs, examples: Sequence[Example], parts: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Returns the objective's summed values of each example's targets, part by part, for the run's
    own adapters; 0 for examples that the teacher reads."""
    return [list(_part_values(inputs, [examples[i] for i in part])) for part in parts]


def _part_values(inputs: TrainingInputs, examples: Sequence[Example]) -> Iterator[float]:
    forward = inputs.forward
    taught = forward, inputs.teacher_adapters, teacher_examples(examples)
    (teacher,) = predict_as_teachers([taught])
    own = [example for example in examples if example.kind != "teacher"]
    batch = forward.batch(own)
    readers = [(forward.adapters, batch.trained_tokens)]
    acting = Acting.everywhere(forward.adapters)
    with forward.routing.held(acting), torch.no_grad():
        (student,) = predictions_of_runs(
            forward.model, forward.paths, forward.routing, batch, readers
        )
        values = inputs.objective.target_values(student, teacher).cpu().double()
    sums = iter(values.split([example.trained_tokens for example in own]))
    for example in examples:
        yield 0.0 if example.kind == "teacher" else next(sums).sum().item()
