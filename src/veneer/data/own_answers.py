"""Replaces the given answer of a row by one that the student wrote itself.

The last answer of a row is replaced, for the student and for the teacher alike: both read the same
new tokens, each behind its own prompt. An answer that was cut has no end token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from veneer.data.batching import RowSpans
from veneer.data.examples import Example
from veneer.data.teacher import pairs_of_row, taught_pairs


@dataclass(frozen=True)
class TaughtPair:
    """Holds one conversation of a row as the student and as the teacher read it.

    length, teacher_length: most tokens of each
    """

    student: Example
    teacher: Example
    length: int
    teacher_length: int

    @property
    def prompt(self) -> list[int]:
        """Returns the ids in front of the last answer."""
        return self.student.ids[: self.student.prompt_length].tolist()

    @property
    def room(self) -> int:
        """Counts the tokens that fit behind both prompts."""
        return min(
            self.length - self.student.prompt_length,
            self.teacher_length - self.teacher.prompt_length,
        )

    def with_answer(self, answer: Sequence[int]) -> tuple[Example, Example]:
        """Returns both examples with another last answer, cut to the room behind the prompts.

        answer: its ids, with the token that ends it unless it was cut
        """
        ids = [*answer][: self.room]
        return _with_ending(self.student, ids), _with_ending(self.teacher, ids)

    def with_longest(self, tokens: int) -> tuple[Example, Example]:
        """Returns both examples with an answer of this many tokens, if that is longer than the
        given one; its ids mean nothing."""
        size = min(tokens, self.room)
        if size <= len(self.student.ids) - self.student.prompt_length:
            return self.student, self.teacher
        ids = [int(self.student.ids[0])] * size
        return _with_ending(self.student, ids), _with_ending(self.teacher, ids)


def pairs_of(
    examples: Sequence[Example], numbers: Sequence[int], *, length: int, teacher_length: int
) -> list[tuple[int, int, TaughtPair]]:
    """Pairs the examples of one row with those that its teacher reads.

    numbers: of all of them. Returns the number of the student's example, that of the teacher's, and
    the pair. Leaves out pairs without room for an answer
    """
    pairs = [
        (student, teacher, TaughtPair(examples[student], examples[teacher], length, teacher_length))
        for student, teacher in pairs_of_row(numbers)
    ]
    return [(student, teacher, pair) for student, teacher, pair in pairs if pair.room > 0]


def with_longest_answers(
    examples: Sequence[Example], rows: RowSpans, tokens: int, *, length: int, teacher_length: int
) -> list[Example]:
    """Returns the examples with answers as long as own answers of at most `tokens` may become."""
    longest = list(examples)
    for student, teacher in taught_pairs(rows):
        pair = TaughtPair(examples[student], examples[teacher], length, teacher_length)
        longest[student], longest[teacher] = pair.with_longest(tokens)
    return longest


def _with_ending(example: Example, answer: Sequence[int]) -> Example:
    start = example.prompt_length
    return replace(
        example,
        ids=np.concatenate([example.ids[:start], np.array(answer, dtype=np.int32)]),
        trained=np.concatenate([example.trained[:start], np.ones(len(answer), dtype=np.bool_)]),
        roles=(),
    )
