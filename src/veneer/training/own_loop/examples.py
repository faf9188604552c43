"""Checks the examples that a trainer is to learn from: its own, or others that a user hands it."""

from collections.abc import Sequence
from typing import TypeGuard

from veneer.adapters.placement.attachment import Attachment
from veneer.data.activation import refuse_without_activation
from veneer.data.checks.check import refuse_beyond
from veneer.data.examples import Example
from veneer.errors import ConfigError
from veneer.models.capacity import capacity_of
from veneer.models.frozen_base import FrozenBase
from veneer.wording import first_lines

_SHOWN = 20


def are_encoded(rows: object) -> TypeGuard[Sequence[Example]]:
    """Whether the rows are examples. Raises ConfigError if there are none."""
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        return False
    if not rows:
        raise ConfigError("there are no rows to train on")
    return all(isinstance(row, Example) for row in rows)


def refuse_unfit(base: FrozenBase, attachment: Attachment, examples: Sequence[Example]) -> None:
    """Raises DataError for examples that the acting adapter cannot learn: too long for the model,
    or without its activation."""
    refuse_beyond("these rows do not fit", examples, capacity_of(base), base.acting_tokenizer)
    refuse_without_activation(examples, attachment.invocation)


def refuse_foreign(base: FrozenBase, attachment: Attachment, examples: Sequence[Example]) -> None:
    """Raises ConfigError for tokens that neither the base nor the adapter has.

    New tokens of another adapter are such: the base's table may have rows for them that nobody
    trained.
    """
    known = len(base.tokenizer)
    foreign = {n for example in examples for n in example.ids[example.ids >= known].tolist()}
    foreign -= set(() if attachment.tokens is None else attachment.tokens.ids)
    if foreign:  # rarely: a vocabulary whose ids have gaps
        foreign -= set(base.tokenizer.get_vocab().values())
    if foreign:
        raise ConfigError(
            f"the base and adapter {attachment.name!r} do not have all tokens of these examples",
            first_lines([f"token {number:,} is unknown" for number in sorted(foreign)], _SHOWN),
            "Encode the rows by this trainer; examples of another one may hold its new tokens.",
        )
