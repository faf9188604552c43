"""A teacher that is another base, usually a larger one: loads it and compares its tokenizer.

The student's tokenizer makes the ids that both read. Therefore both must have the same vocabulary;
rows that a model has beyond it are compared with nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from veneer.bases.identity.vocabulary import vocabulary_differences, vocabulary_size
from veneer.bases.names.named import NAMED
from veneer.data.checks.check import refuse_beyond
from veneer.data.examples import Example
from veneer.data.load import DataSet
from veneer.errors import ConfigError, RefusedError
from veneer.files.home import absolute_if_exists
from veneer.formats.adapter import StoredAdapter
from veneer.models.capacity import capacity_of
from veneer.models.frozen_base import FrozenBase
from veneer.objectives.config import TeacherBase, TeacherWeights
from veneer.training.config import RunConfig
from veneer.training.coordination import load_on_all_processes
from veneer.training.inputs import ForwardInputs, Teacher
from veneer.training.processes.world import World
from veneer.training.teachers.teacher import attach_prompt, attach_teacher, teacher_examples


@dataclass(frozen=True)
class LoadedTeacherBase:
    """Holds the loaded base of a teacher, and its settings with what loading found."""

    base: FrozenBase
    settings: TeacherBase


TeacherBases = dict[TeacherWeights, FrozenBase]
"""Loaded bases of teachers; jobs share them."""


def load_teacher_base(
    config: RunConfig, student: FrozenBase, world: World, loaded: TeacherBases
) -> LoadedTeacherBase | None:
    """Loads the base of the teacher, frozen; returns None if the student's base is the teacher's.

    loaded: bases that other jobs have loaded; extended. Raises the errors of loading a base, and
    ConfigError if its tokenizer has another vocabulary than the student's.
    """
    settings = config.objective.teacher_base
    if settings is None:
        return None
    if settings.weights not in loaded:
        of_teacher: dict[str, object] = {"base": settings.base, "quantize": settings.quantize}
        loaded[settings.weights] = load_on_all_processes(
            config.model_copy(update=of_teacher | {"keep_dense": []}), settings.dtype, world
        )
    base = loaded[settings.weights]
    if faults := vocabulary_differences(student.tokenizer, base.tokenizer):
        raise ConfigError(
            f"{settings.base} cannot teach {config.base}: their tokenizers differ",
            faults,
            "Take a teacher of the same family, with the same tokenizer.",
        )
    fields = {
        "base": settings.base if settings.base in NAMED else absolute_if_exists(settings.base),
        "dtype": base.compute.name,
        "digest": base.fingerprint().digest,
    }
    return LoadedTeacherBase(base, settings.model_copy(update=fields))


def make_teacher(
    config: RunConfig,
    student: FrozenBase,
    loaded: LoadedTeacherBase | None,
    stored: StoredAdapter | None,
    data: DataSet,
) -> Teacher | None:
    """Attaches the teacher's adapter and its prompt, and returns the teacher; None without one.

    loaded: the teacher's own base. stored: its adapter. Raises DataError if a row is too long for
    its base, and RefusedError if its base cannot compute the rows of a batch in one forward.
    """
    if not config.objective.has_teacher:
        return None
    base = student if loaded is None else loaded.base
    examples = teacher_examples([*data.train, *data.validation])
    if loaded is not None:
        _refuse_unreadable(loaded, examples)
    adapters = attach_teacher(base, stored)
    prompt = attach_prompt(base, adapters, examples)
    forward = ForwardInputs(
        base.model,
        base.paths,
        base.routing,
        (*adapters, *prompt.adapters),
        config.share_prompt,
        config.seed,
    )
    vocabulary = None if loaded is None else vocabulary_size(base.tokenizer)
    return Teacher(forward, vocabulary, prompt.tokens, prompt.line)


def _refuse_unreadable(loaded: LoadedTeacherBase, examples: Sequence[Example]) -> None:
    base = loaded.base
    refuse_beyond("the teacher cannot read these rows", examples, capacity_of(base), base.tokenizer)
    if len(base.paths.together(examples, 0)) > 1:
        raise RefusedError(
            f"{loaded.settings.base} cannot teach: it computes each row of a batch separately",
            [base.paths.padded_reason or base.paths.switches.words or ""],
            "Take another base as teacher, or a smaller length.",
        )
