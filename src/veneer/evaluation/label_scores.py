"""Classification by likelihood: the log-probability of every label as a row's answer.

Nothing is generated, so the answer is always one of the labels. All labels of a row are
continuations of one prompt, which is computed once for all of them; several rows share a forward. A
label's score is the log-probability of everything that would be trained if it were the answer, its
end of turn included: without it "card" could never lose to "card_lost".
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from veneer.data.batching import shared_prompt, used_length
from veneer.data.examples import Example, Problem, Row, refusal, row_key
from veneer.data.template.template import ChatTemplate
from veneer.errors import DataError
from veneer.evaluation.answers import finite
from veneer.evaluation.intervals import Counts

FORWARD_TOKENS = 8192
"""Tokens of the rows whose labels are computed at once; a row with more is computed alone."""

Nats = Callable[[Sequence[Example]], Counts]
"""Computes (N, 2): the nats of each example's trained tokens, and their number."""


def label_scores(
    tokenizer: Any,
    rows: Sequence[Row],
    labels: Sequence[str],
    *,
    nats: Nats,
    length_normalised: bool = False,
    variables: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Counts:
    """Returns the log-probability of each label as each row's answer, (N, labels).

    nats               gets all labels of some rows in one call
    length_normalised  log-probabilities per token
    Raises DataError for rows that cannot be encoded, DivergedError for rows with a score that is
    not finite.
    """
    template = ChatTemplate(tokenizer, variables=variables)
    scores = []
    done = 0
    for chunk in _chunks(template, rows, labels):
        examples = [example for of_row in chunk for example in of_row]
        counts = finite(nats(examples), examples)
        values = -counts[:, 0] / counts[:, 1] if length_normalised else -counts[:, 0]
        scores.append(values.reshape(len(chunk), len(labels)))
        done += len(chunk)
        if progress is not None:
            progress(done, len(rows))
    return np.concatenate(scores) if scores else np.zeros((0, len(labels)))


def _chunks(
    template: ChatTemplate, rows: Sequence[Row], labels: Sequence[str]
) -> Iterator[list[list[Example]]]:
    """Yields the examples of some rows, all labels of each, up to FORWARD_TOKENS."""
    chunk: list[list[Example]] = []
    tokens = 0
    for number, row in enumerate(rows):
        examples = label_examples(template, row, labels, number=number)
        prompt = shared_prompt(examples)
        own_tokens = prompt + sum(used_length(example) - prompt for example in examples)
        if chunk and tokens + own_tokens > FORWARD_TOKENS:
            yield chunk
            chunk, tokens = [], 0
        chunk.append(examples)
        tokens += own_tokens
    if chunk:
        yield chunk


def label_examples(
    template: ChatTemplate, row: Row, labels: Sequence[str], *, number: int | None = None
) -> list[Example]:
    """Returns the row once for each label, with the label as its answer; only that is trained.

    number: of the row, if its labels are computed beside those of other rows
    """
    variants = [
        replace(row, messages=[*row.messages[:-1], {"role": "assistant", "content": label}])
        for label in labels
    ]
    encoded = template.encode_rows(variants, train_on="last")
    if problems := [result for result in encoded if isinstance(result, Problem)]:
        raise refusal("labels cannot be tried as answers", problems)
    examples = []
    for variant, result in zip(variants, encoded, strict=True):
        assert not isinstance(result, Problem)
        ids = np.array(result[-1].ids, dtype=np.int32)
        trained = np.array(result[-1].trained, dtype=np.bool_)
        examples.append(Example(ids, trained, row.ref, row_key(variant), row=number))
    if empty := [label for label, e in zip(labels, examples, strict=True) if not e.trained.any()]:
        raise DataError("labels without a token", empty)
    return examples
