"""Classification by likelihood: of given labels, the one that the model finds likeliest as the
row's answer.

Nothing is generated, so the answer is always one of the labels. All labels of a row are
continuations of one prompt, which is computed once for all of them. A label's score is the
log-probability of everything that would be trained if it were the answer, its end of turn included:
without it "card" could never lose to "card_lost".
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
"""Distinct answers that are taken for labels where none are given: more look like free text."""
LONGEST_LABEL = 60
"""Characters of such an answer."""

Nats = Callable[[Sequence[Example]], Counts]
"""Examples -> (N, 2): the nats of the trained tokens of each, and their number."""


def read_labels(named: str) -> list[str]:
    """The labels in a file, one a line, or those that stand here, divided by commas. Raises
    ConfigError."""
    path = labels_file(named)
    if path is None:
        return checked_labels([label.strip() for label in named.split(",") if label.strip()])
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as fault:
        raise ConfigError(
            f"{path} cannot be read: {fault}", [], "Give a UTF-8 text file."
        ) from None
    return checked_labels([line.strip() for line in text.splitlines() if line.strip()])


def labels_file(named: str) -> Path | None:
    """The file that `named` is; None where it is the labels themselves, which may be longer than
    any file's name."""
    try:
        return path if (path := Path(named)).is_file() else None
    except (OSError, ValueError):
        return None


def checked_labels(labels: Sequence[str]) -> list[str]:
    """The labels, each once. Raises ConfigError unless there are two."""
    distinct = list(dict.fromkeys(labels))
    if half := [ascii(label[:40]) for label in distinct if not is_text(label)]:
        raise ConfigError("labels that are not UTF-8", half)
    if len(distinct) < 2:
        raise ConfigError(
            f"{len(distinct)} labels: there is nothing to choose from",
            next_step="Give --labels A,B,C or a file with one label a line.",
        )
    return distinct


def labels_of(references: Sequence[Sequence[str]]) -> list[str]:
    """The distinct answers of the rows, sorted. Raises ConfigError where they look like free text:
    one that is chosen among the rows' own answers then says little of what the model would
    write."""
    distinct = sorted({reference for row in references for reference in row})
    longest = max(map(len, distinct), default=0)
    faults = [f"{len(distinct):,} different answers of {len(references):,} rows"]
    if len(distinct) > 2 and (len(distinct) > MOST_LABELS or 2 * len(distinct) > len(references)):
        faults.append("labels stand in two rows each, on average, at least")
    elif longest > LONGEST_LABEL:
        faults.append(f"the longest has {longest:,} characters, {LONGEST_LABEL} are taken")
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
    """For each row the label with the highest log-probability, or with the highest one per token.

    nats   gets all labels of one row in one call. Raises DataError for rows that cannot be encoded,
           DivergedError for
    a row whose labels have no finite log-probability.
    """
    from veneer.evaluation.answers import finite  # loads torch

    template = ChatTemplate(tokenizer, variables=variables)
    chosen = []
    for done, row in enumerate(rows, 1):
        examples = label_examples(template, row, labels)
        found = finite(nats(examples), examples)
        scores = found[:, 0] / found[:, 1] if length_normalised else found[:, 0]
        chosen.append(labels[int(np.argmin(scores))])
        if progress is not None:
            progress(done, len(rows))
    return chosen


def label_examples(template: ChatTemplate, row: Row, labels: Sequence[str]) -> list[Example]:
    """The row once for each label as its answer, trained on that alone."""
    variants = [
        replace(row, messages=[*row.messages[:-1], {"role": "assistant", "content": label}])
        for label in labels
    ]
    encoded = template.encode_rows(variants, train_on="last")
    if problems := [each for each in encoded if isinstance(each, Problem)]:
        raise refusal("labels cannot be tried as answers", problems)
    examples = []
    for variant, each in zip(variants, encoded, strict=True):
        assert not isinstance(each, Problem)
        ids, trained = (
            np.array(each[-1].ids, dtype=np.int32),
            np.array(each[-1].trained, dtype=np.bool_),
        )
        examples.append(Example(ids, trained, row.ref, row_key(variant)))
    if empty := [label for label, e in zip(labels, examples, strict=True) if not e.trained.any()]:
        raise DataError("labels without a token", empty)
    return examples
