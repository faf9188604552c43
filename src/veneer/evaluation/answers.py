"""Answers of a base, with the adapters active on it, to each row's last prompt."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from veneer.data.examples import Example, Row, RowRef
from veneer.data.template.template import ChatTemplate
from veneer.decoding.generate import generate, limits_of
from veneer.decoding.schedule.lookup import LookupMode
from veneer.decoding.text import text_of
from veneer.errors import DataError, DivergedError, VeneerError
from veneer.evaluation.intervals import Counts
from veneer.models.frozen_base import FrozenBase

NAMED_ROWS = 10
"""Most rows that an error names."""


@dataclass(frozen=True)
class RowAnswer:
    """Holds a row's last turn, from the data and from the model (greedy). cut: at
    max_new_tokens.
    """

    row: Row
    expected: str
    answer: str
    cut: bool


def evaluate_answers(
    base: FrozenBase,
    rows: Sequence[Row],
    *,
    max_new_tokens: int,
    variables: Mapping[str, Any] | None = None,
    lookup: LookupMode = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> list[RowAnswer]:
    """Generates the answer to every row's prompt (all but its last turn), greedily, in the rows'
    order.

    max_new_tokens  longer answers are cut
    variables       of the chat template
    lookup          as in Base.generate
    progress        receives (rows done, rows in all)

    Raises DataError, naming the rows, if a row does not end with an assistant turn to compare with.
    """
    expected = expected_answers(base, rows, variables)
    template = ChatTemplate(base.acting_tokenizer, variables=variables)
    prompts = [template.encode_prompt(row.messages[:-1], tools=row.tools) for row in rows]

    def done(count: int) -> None:
        if progress is not None:
            progress(count, len(rows))

    generated = generate(base, prompts, max_new_tokens=max_new_tokens, lookup=lookup, on_done=done)
    answers = [_text(base, ids) for ids in generated]
    limits = limits_of(base, prompts, max_new_tokens)
    cut = [len(ids) >= limit for ids, limit in zip(generated, limits, strict=True)]
    return [RowAnswer(*fields) for fields in zip(rows, expected, answers, cut, strict=True)]


def expected_answers(
    base: FrozenBase, rows: Sequence[Row], variables: Mapping[str, Any] | None = None
) -> list[str]:
    """Returns the text of each row's last turn. DataError names rows whose last turn is no
    assistant's.
    """
    refuse_rows(
        "answers can only be compared with an assistant turn at the end of each row",
        [row.ref for row in rows if not row.messages or row.messages[-1]["role"] != "assistant"],
        "Give rows that end with the expected answer, or ask for the loss alone.",
    )
    template = ChatTemplate(base.acting_tokenizer, variables=variables)
    return [_expected(base, template, row) for row in rows]


def references_of(
    base: FrozenBase, rows: Sequence[Row], variables: Mapping[str, Any] | None = None
) -> list[list[str]]:
    """Returns every right answer of each row: its last turn first, then its `references`."""
    return [
        [expected, *(text.strip() for text in row.references)]
        for expected, row in zip(expected_answers(base, rows, variables), rows, strict=True)
    ]


def _expected(base: FrozenBase, template: ChatTemplate, row: Row) -> str:
    last: dict[str, Any] = row.messages[-1]
    if not last.get("tool_calls"):
        return str(last["content"]).strip()
    # The template decides how a tool call is written: take the tokens that would be trained.
    ids, trained = template.encode_row(row, train_on="last")
    return _text(base, [token for token, learnt in zip(ids, trained, strict=True) if learnt])


def _text(base: FrozenBase, ids: list[int]) -> str:
    return text_of(base.acting_tokenizer, ids).strip()


def refuse_rows(
    headline: str, refs: Sequence[RowRef], next_step: str, *, error: type[VeneerError] = DataError
) -> None:
    """Raises the error naming the rows, unless there are none."""
    if refs:
        faults = [str(ref) for ref in refs[:NAMED_ROWS]]
        faults += [f"and {len(refs) - NAMED_ROWS} more"] if len(refs) > NAMED_ROWS else []
        raise error(headline, faults, next_step)


def finite(counts: Counts, examples: Sequence[Example]) -> Counts:
    """Returns the (N, 2) nats and tokens. Raises DivergedError naming rows whose nats are not
    finite.

    Their mean, the likeliest label and every comparison with them would be meaningless.
    """
    refs = [
        example.ref
        for example, (nats, _) in zip(examples, counts, strict=True)
        if not math.isfinite(nats)
    ]
    refuse_rows(
        f"the loss of {len(refs)} of {len(examples)} texts is not finite",
        list(dict.fromkeys(refs)),
        "Evaluate the base without the adapter, or with --dtype float32, to see which of them"
        " overflows.",
        error=DivergedError,
    )
    return counts
