"""The activation of an adapter in texts and rows: its token ids, and where each row's begins.

The adapter acts from the last occurrence of the ids in a row's prompt on: in the tokens before the
row's last answer. So training reads a row as decoding reads its prompt. PEFT searches the whole
row, which is the same place unless the answer holds the ids too.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from veneer.adapters.activation import activation_start
from veneer.adapters.config import MethodConfig
from veneer.data.examples import Example, Problem, refusal
from veneer.errors import ConfigError


def invocation_tokens(method: MethodConfig, tokenizer: Any) -> tuple[int, ...]:
    """Returns the ids of the method's activation; empty if it has none. Raises ConfigError if the
    tokenizer makes no token of its text."""
    activation = method.acts_from
    return text_ids(activation, tokenizer) if isinstance(activation, str) else tuple(activation)


def text_ids(activation: str, tokenizer: Any) -> tuple[int, ...]:
    """Returns the ids of an activation's text by itself. Raises ConfigError if there are none."""
    ids = tuple(tokenizer(activation, add_special_tokens=False)["input_ids"]) if activation else ()
    if activation and not ids:
        raise ConfigError(
            f"activation {activation!r} has no tokens", next_step="Give a text of some tokens."
        )
    return ids


def example_start(example: Example, invocation: Sequence[int]) -> int:
    """Returns the first token of an example on which the adapter acts; the number of its ids if
    there is none."""
    if not invocation:
        return 0
    prompt = example.prompt_length
    start = activation_start(example.ids[:prompt], invocation)
    return start if start < prompt else len(example.ids)


def activation_problems(examples: Iterable[Example], invocation: Sequence[int]) -> list[Problem]:
    """Returns a problem for each example that would train nothing, in whole or in part."""
    problems: list[Problem] = []
    for example in examples if invocation else ():
        start = example_start(example, invocation)
        first = int(np.flatnonzero(example.trained)[0])
        if start >= len(example.ids):
            problems.append(_problem(example, "D230", _MISSING, _MISSING_STEP))
        elif first <= start:
            problems.append(_problem(example, "D231", _BEFORE, _BEFORE_STEP))
    return problems


def refuse_without_activation(examples: Iterable[Example], invocation: Sequence[int]) -> None:
    """Raises DataError if some examples would train nothing, in whole or in part."""
    if problems := activation_problems(examples, invocation):
        raise refusal("the adapter does not act on all trained tokens of these rows", problems)


_MISSING = "the prompt does not hold the activation: the row would train nothing"
_MISSING_STEP = (
    "Take an activation that is in every prompt, for instance the text with which the chat template"
    " begins an answer. Or leave out these rows."
)
_BEFORE = "answers before the activation are the base's: they would train nothing"
_BEFORE_STEP = "Train on the last answer only (data.train_on: last)."


def _problem(example: Example, code: str, message: str, step: str) -> Problem:
    return example.ref.problem(code, message, step)
