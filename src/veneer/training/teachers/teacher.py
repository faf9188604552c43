"""The teacher of runs: a base alone, or with a stored adapter; it reads its own prompt.

Its predictions are computed beside each micro-batch, in one forward of each base without a gradient
for all runs whose micro-batches share a forward. Rows know their adapters, so the same base serves
student and teacher, unless the teacher is another base (teacher_base.py). The keys and values of
the prompt in front of all its examples are kept from step to step, because a teacher does not
change. It drops nothing out.

Without a gradient its rows cost a third of a student's and store nothing, so they do not stand in
the student's own forward.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from veneer.adapters.combinations import ACTIVATION, PREFIX, refuse_answers
from veneer.adapters.placement.acting import Acting, Applied, in_turn
from veneer.adapters.placement.names import free_name
from veneer.bounds import PLACES
from veneer.data.batching import shared_prompt
from veneer.data.examples import Example
from veneer.data.joint_batch import join_batches
from veneer.errors import ConfigError
from veneer.formats.adapter import StoredAdapter, read_adapter
from veneer.formats.loading import load_adapter
from veneer.library.library import Library
from veneer.models.frozen_base import FrozenBase
from veneer.models.starts.prefix import attach_text
from veneer.models.step import predictions_of_runs
from veneer.objectives.config import TeacherBase
from veneer.objectives.objective import Predictions
from veneer.training.config import RunConfig
from veneer.training.inputs import Teacher, TrainingInputs

LEAST_PROMPT_TOKENS = 16
"""Shorter prompts are computed again: a template's markers cost less than a prefix."""
MOST_PROMPT_TOKENS = int(PLACES.most)
"""Longest prefix; what follows is computed in every micro-batch."""


@dataclass(frozen=True)
class Taught:
    """Holds a teacher, and the examples of a micro-batch that it reads."""

    teacher: Teacher
    examples: Sequence[Example]


def locate_teacher(
    config: RunConfig, base: TeacherBase | None
) -> tuple[RunConfig, StoredAdapter | None]:
    """Returns the settings with absolute paths of the teacher's files, and its stored adapter.

    base: the teacher's own base as it was loaded. Raises ConfigError if a run is resumed with
    another adapter or base, and the errors of reading the adapter.
    """
    objective, stored = config.objective, None
    if objective.teacher_adapter is None:
        located = objective.located(None, None, base)
    else:
        folder = Library().locate(objective.teacher_adapter)
        stored = read_adapter(folder)
        located = objective.located(str(folder.absolute()), stored.content_hash, base)
    return config.model_copy(update={"objective": located}), stored


def attach_teacher(base: FrozenBase, stored: StoredAdapter | None) -> Applied:
    """Attaches the teacher's adapter; returns the adapters of the teacher's rows.

    Raises RefusedError for an adapter that predicts no tokens.
    """
    if stored is None:
        return ()
    refuse_answers([(str(stored.folder), stored.contents)])
    return ((load_adapter(base, stored, name=free_name("teacher", base.attachments)), 1.0),)


@dataclass(frozen=True)
class KnownPrompt:
    """Holds the prompt in front of all examples of a teacher, as a prefix of keys and values.

    tokens: its length; 0 if it is computed in every micro-batch. line: the same in words
    """

    adapters: Applied = ()
    tokens: int = 0
    line: str | None = None


def attach_prompt(base: FrozenBase, adapters: Applied, examples: Sequence[Example]) -> KnownPrompt:
    """Computes the prompt that all examples begin with once, and attaches its keys and values.

    Where the base takes no prefix, the prompt is computed in every micro-batch. adapters: the
    teacher's. examples: all that it reads
    """
    tokens = min(shared_prompt(examples) if len(examples) > 1 else 0, MOST_PROMPT_TOKENS)
    if tokens < LEAST_PROMPT_TOKENS:
        return KnownPrompt()
    reason = _refusal(base, adapters)
    if reason is None:
        ids = examples[0].ids[:tokens].tolist()
        try:
            prompt = attach_text(
                base, ids, name=free_name("teacher", base.attachments), adapters=adapters
            )
        except ConfigError as fault:
            reason = fault.headline
        else:
            line = f"the teacher's prompt of {tokens:,} tokens is computed once"
            return KnownPrompt(((prompt, 1.0),), tokens, line)
    return KnownPrompt(line=f"the teacher's prompt is computed in every micro-batch: {reason}")


def _refusal(base: FrozenBase, adapters: Applied) -> str | None:
    """Returns why a prompt cannot be a prefix of this base, None if it may be one."""
    if any(PREFIX in adapter.contents for adapter, _ in adapters):
        return "the teacher's adapter is a prefix itself"
    if any(ACTIVATION in adapter.contents for adapter, _ in adapters):
        return "the teacher's adapter has an activation, and acts alone"
    return base.paths.packed_reason or base.paths.switches.words


def teacher_examples(examples: Iterable[Example]) -> list[Example]:
    return [example for example in examples if example.kind == "teacher"]


def predict_as_teachers(taught: Sequence[Taught | None]) -> list[Predictions | None]:
    """Returns the predictions of each micro-batch's teacher; None without examples for one.

    One forward of each base computes all that it has to predict.
    """
    predictions: list[Predictions | None] = [None] * len(taught)
    by_model: dict[int, dict[int, Taught]] = {}
    for number, part in enumerate(taught):
        if part is not None and part.examples:
            by_model.setdefault(id(part.teacher.forward.model), {})[number] = part
    for parts in by_model.values():
        computed = _predict_on_one_base(list(parts.values()))
        for number, of_part in zip(parts, computed, strict=True):
            predictions[number] = of_part
    return predictions


@torch.no_grad()
def _predict_on_one_base(taught: Sequence[Taught]) -> list[Predictions]:
    forwards = [part.teacher.forward for part in taught]
    parts = [part.teacher.batch(part.examples) for part in taught]
    batch, rows = join_batches(parts)
    readers = [
        (forward.adapters, part.trained_tokens)
        for forward, part in zip(forwards, parts, strict=True)
    ]
    acting = in_turn([(n, adapters) for n, (adapters, _) in zip(rows, readers, strict=True)])
    first = forwards[0]
    with first.routing.held(acting):
        computed = list(predictions_of_runs(first, batch, readers))
    sizes = [part.teacher.vocabulary for part in taught]
    return [
        predictions if size is None else predictions.of_first_tokens(size)
        for predictions, size in zip(computed, sizes, strict=True)
    ]


def taught_nats(
    inputs: TrainingInputs, examples: Sequence[Example], parts: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Returns the objective's summed values of each example's targets, part by part, for the run's
    own adapters; 0 for examples that the teacher reads."""
    return [list(_part_values(inputs, [examples[i] for i in part])) for part in parts]


def _part_values(inputs: TrainingInputs, examples: Sequence[Example]) -> Iterator[float]:
    forward = inputs.forward
    (teacher,) = predict_as_teachers([Taught(inputs.teacher, teacher_examples(examples))])
    own = [example for example in examples if example.kind != "teacher"]
    batch = forward.batch(own)
    readers = [(forward.adapters, batch.trained_tokens)]
    acting = Acting.everywhere(forward.adapters)
    with forward.routing.held(acting), torch.no_grad():
        (student,) = predictions_of_runs(forward, batch, readers)
        values = inputs.objective.target_values(student, teacher).cpu().double()
    sums = iter(values.split([example.trained_tokens for example in own]))
    for example in examples:
        yield 0.0 if example.kind == "teacher" else next(sums).sum().item()
