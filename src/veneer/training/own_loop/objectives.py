"""Finds the objective that a trainer's call minimises, and checks the examples given for it."""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

from veneer.data.examples import AnswerKind, Example
from veneer.errors import ConfigError
from veneer.objectives.config import OBJECTIVES, Answers, AnyObjective, ObjectiveConfig
from veneer.wording import kind_of

Loss = str | ObjectiveConfig
"""`cross_entropy`, the name of an objective with its default settings, or its settings."""
CROSS_ENTROPY = "cross_entropy"


def find_objective(loss: Loss) -> AnyObjective:
    """Returns the settings of an objective. Raises ConfigError if a trainer cannot minimise it."""
    if isinstance(loss, str):
        classes: dict[str, type[ObjectiveConfig]] = {CROSS_ENTROPY: Answers, **OBJECTIVES}
        if loss not in classes:
            raise ConfigError(
                f"loss is {loss!r}, not one of {', '.join(classes)}",
                next_step="Give settings for others than the defaults: loss=veneer.DPO(beta=0.3).",
            )
        loss = classes[loss]()
    if not isinstance(loss, ObjectiveConfig):
        raise ConfigError(
            f"loss takes a name, such as cross_entropy, or settings, such as veneer.DPO(); this is"
            f" {kind_of(loss)}"
        )
    if loss.head is not None:
        raise ConfigError(
            f"objective {loss.name} trains a score head, and a trainer's adapter has none",
            next_step="Take veneer.train(..., objective=...), or a loss of your own.",
        )
    if loss.teacher_base is not None:
        raise ConfigError(
            "a trainer's teacher is its own base, alone or with an adapter, and no other base",
            next_step="Take veneer.train(..., objective=...) for this teacher.",
        )
    if loss.own_answers_config is not None:
        raise ConfigError(
            "own_answers needs a run: in a training loop of your own, sample the answers yourself",
            next_step="Leave own_answers out, and give rows with the answers of trainer.sample.",
        )
    return cast(AnyObjective, loss)


def check_examples(objective: ObjectiveConfig, examples: Sequence[Example]) -> None:
    """Raises ConfigError for examples that were encoded for another objective, and for rows of
    which some examples are missing."""
    kinds: set[AnswerKind] = {example.kind for example in examples}
    needed, optional = EXAMPLES[objective.rows]
    needed = needed | ({"teacher"} if objective.has_teacher else set())
    if not needed <= kinds <= needed | optional:
        raise ConfigError(
            f"these examples were not encoded for objective {objective.name}",
            [f"they are {', '.join(sorted(kinds))}; needed: {', '.join(sorted(needed))}"],
            f"Encode them with loss={objective.name!r}, or with the settings of the loss.",
        )
    if not _are_whole_rows(objective, examples):
        raise ConfigError(
            f"objective {objective.name} compares the answers of a row, and some are missing",
            next_step="Keep the examples of a row together and in their order.",
        )


EXAMPLES: dict[str, tuple[set[AnswerKind], set[AnswerKind]]] = {
    "answers": ({"answer"}, set()),
    "pairs": ({"chosen", "rejected"}, set()),
    "ratings": ({"mismatched"}, {"chosen", "rejected"}),
}
"""Kinds of examples by kind of rows: required kinds, and optional ones."""


def _are_whole_rows(objective: ObjectiveConfig, examples: Sequence[Example]) -> bool:
    """Returns whether each best answer of pairs has another one to the same prompt behind it, and
    each example of a teacher the same targets as the student's."""
    if objective.rows == "pairs":
        return _are_whole_pairs(examples)
    student_targets, teacher_targets = (
        [e.ids[e.trained].tolist() for e in examples if (e.kind == "teacher") is is_taught]
        for is_taught in (False, True)
    )
    return student_targets == teacher_targets or not objective.has_teacher


def _are_whole_pairs(examples: Sequence[Example]) -> bool:
    kinds = [example.kind for example in examples]
    if kinds[0] != "chosen" or ("chosen", "chosen") in pairwise([*kinds, "chosen"]):
        return False
    prompts = [example.ids[: example.trained.argmax()].tolist() for example in examples]
    return all(
        kind == "chosen" or prompt == previous
        for kind, prompt, previous in zip(kinds[1:], prompts[1:], prompts[:-1], strict=True)
    )
