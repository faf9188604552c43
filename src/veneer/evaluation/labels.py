"""Classifies rows by likelihood: chooses the label that the model finds most probable as a row's
answer.

Nothing is generated, so the answer is always one of the labels. All labels of a row continue one
prompt, which is computed once for all of them. A label's score is the log-probability of all tokens
that would be trained if it were the answer, including the end of the turn: without that "card"
could never lose to "card_lost".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from veneer.data.examples import Example, Problem, Row, refusal, row_key
from veneer.data.template.template import ChatTemplate
from veneer.errors import ConfigError, DataError
from veneer.evaluation.intervals import Counts
from veneer.files.nesting import is_text

MOST_LABELS = 200
"""Most distinct answers that are used as labels if none are given; more look like free text."""
LONGEST_LABEL = 60
"""Most characters of an answer that is used as a label."""

Nats = Callable[[Sequence[Example]], Counts]
"""Computes (N, 2): the nats of each example's trained tokens, and their number."""


def read_labels(value: str) -> list[str]:
    """Reads labels from a file, one a line, or from text with commas. Raises ConfigError."""
    path = labels_file(value)
    if path is None:
        return checked_labels([label.strip() for label in value.split(",") if label.strip()])
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as fault:
        raise ConfigError(
            f"{path} cannot be read: {fault}", [], "Give a UTF-8 text file."
        ) from None
    return checked_labels([line.strip() for line in text.splitlines() if line.strip()])


def labels_file(value: str) -> Path | None:
    """Returns the file of this name; None if there is none, as for labels themselves."""
    try:
        return path if (path := Path(value)).is_file() else None
    except (OSError, ValueError):  # labels may be longer than any file name
        return None


def checked_labels(labels: Sequence[str]) -> list[str]:
    """Returns the distinct labels. Raises ConfigError if there are fewer than two."""
    distinct = list(dict.fromkeys(labels))
    if invalid := [ascii(label[:40]) for label in distinct if not is_text(label)]:
        raise ConfigError("labels that are not UTF-8", invalid)
    if len(distinct) < 2:
        raise ConfigError(
            f"{len(distinct)} labels: there is nothing to choose from",
            next_step="Give --labels A,B,C or a file with one label a line.",
        )
    return distinct


def labels_of(references: Sequence[Sequence[str]]) -> list[str]:
    """Returns the distinct answers of the rows, sorted. Raises ConfigError if they look like free
    text: a choice among the rows' own answers then says little about what the model would write."""
    distinct = sorted({reference for row in references for reference in row})
    longest = max(map(len, distinct), default=0)
    faults = [f"{len(distinct):,} different answers of {len(references):,} rows"]
    if len(distinct) > 2 and (len(distinct) > MOST_LABELS or 2 * len(distinct) > len(references)):
        faults.append("a label has to occur in two rows on average")
    elif longest > LONGEST_LABEL:
        faults.append(
            f"the longest has {longest:,} characters, at most {LONGEST_LABEL} are allowed"
        )
    else:
        faults = []
    if faults:
        raise ConfigError(
            "accuracy chooses among labels, and the rows' own answers look like free text",
            faults,
            "Name them: --labels A,B,C or a file; or ask for exact_match, which compares what the"
            " model writes.",
        )
    return checked_labels(distinct)


def likeliest_labels(
    tokenizer: Any,
    rows: Sequence[Row],
    labels: Sequence[str],
    *,
    nats: Nats,
    length_normalised: bool = False,
    variables: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Returns for each row the label with the highest log-probability, in total or per token.

    nats: gets all labels of one row in one call. Raises DataError for rows that cannot be encoded,
    DivergedError for a row whose labels have no finite log-probability.
    """
    from veneer.evaluation.answers import finite  # loads torch

    template = ChatTemplate(tokenizer, variables=variables)
    chosen = []
    for done, row in enumerate(rows, 1):
        examples = label_examples(template, row, labels)
        counts = finite(nats(examples), examples)
        scores = counts[:, 0] / counts[:, 1] if length_normalised else counts[:, 0]
        chosen.append(labels[int(np.argmin(scores))])
        if progress is not None:
            progress(done, len(rows))
    return chosen


def label_examples(template: ChatTemplate, row: Row, labels: Sequence[str]) -> list[Example]:
    """Returns the row once for each label, with the label as its answer; only that is trained."""
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
        examples.append(Example(ids, trained, row.ref, row_key(variant)))
    if empty := [label for label, e in zip(labels, examples, strict=True) if not e.trained.any()]:
        raise DataError("labels without a token", empty)
    return examples
