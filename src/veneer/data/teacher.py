"""Makes the examples that a teacher reads: the same conversations, behind a prompt of its own.

The answers are the same tokens for teacher and student, so the teacher's example of a row has the
same targets in the same order, at other positions. A row with other targets is refused.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import compress

import numpy as np

from veneer.data.batching import RowSpans
from veneer.data.examples import Example, Row, part_key
from veneer.data.template.encoded_row import EncodedRow


def teacher_fault(
    row: Row, own: Sequence[EncodedRow], teacher: Sequence[EncodedRow], positions: int | None
) -> str | None:
    """Returns why the teacher cannot read the row, None if it can.

    own, teacher: the row as the student and as the teacher read it. positions: of the base
    """
    if not row.messages:
        return "plain text has no prompt for a teacher to stand before"
    longest = max(len(encoding.ids) for encoding in teacher)
    if positions is not None and longest > positions:
        return (
            f"the teacher's text has {longest:,} tokens, and the base has {positions:,} positions"
        )
    if [_targets(encoding) for encoding in own] != [_targets(encoding) for encoding in teacher]:
        return "the chat template renders the answers differently behind the teacher's prompt"
    return None


def _targets(encoding: EncodedRow) -> list[int]:
    return list(compress(encoding.ids, encoding.trained))


def teacher_example(example: Example, encoding: EncodedRow) -> Example:
    """Returns the teacher's example for one of the student's. It ends with the same target, because
    the student's may have been cut."""
    targets = np.flatnonzero(encoding.trained)[: example.trained_tokens]
    end = int(targets[-1]) + 1 if len(targets) else len(encoding.ids)
    return replace(
        example,
        ids=np.array(encoding.ids[:end], dtype=np.int32),
        trained=np.array(encoding.trained[:end], dtype=np.bool_),
        key=part_key(example.key, -1),
        roles=(),
        kind="teacher",
    )


def without_beginning(example: Example, count: int) -> Example:
    """Returns the example without its first tokens, which are known to the model already."""
    if not count:
        return example
    return replace(example, ids=example.ids[count:], trained=example.trained[count:])


def with_targets(example: Example, count: int) -> Example:
    """Returns the example up to its target of this number; without any for 0."""
    end = int(np.flatnonzero(example.trained)[count - 1]) + 1 if count else 0
    return replace(example, ids=example.ids[:end], trained=example.trained[:end])


def taught_pairs(rows: RowSpans) -> Iterator[tuple[int, int]]:
    """Yields the number of each example of a student, and of what its teacher reads instead."""
    for row in range(len(rows.lengths)):
        yield from pairs_of_row(rows.examples([row]))


def pairs_of_row(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs the examples of one row with those that its teacher reads, which follow in the same
    order. numbers: of all of them"""
    half = len(numbers) // 2
    return list(zip(numbers[:half], numbers[half:], strict=True))
