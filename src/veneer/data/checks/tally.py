"""Counts examples as they come, one after another, without keeping their tokens.

Twenty-eight bytes an example are held, to find repeated rows and held-out prompts that are also
trained on.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from veneer.data.examples import Example, Row, RowRef, prompt_key

_STOP_REACH = 4
"""A stop token counts if it is among this many last tokens of an answer."""


@dataclass
class Tally:
    """Counts of examples, and the keys to find repeated rows.

    stop_ids                        ids that end an answer
    lengths, keys, prompts, lines   of each example: tokens, its key, its row's prompt, its line in
                                    file `files[n]`
    masked                          examples without a trained token
    """

    stop_ids: frozenset[int] = frozenset()
    rows: int = 0
    trained_tokens: int = 0
    answers: int = 0
    stopped: int = 0
    largest_id: int = -1
    roles: Counter[str] = field(default_factory=Counter)
    trained_roles: Counter[str] = field(default_factory=Counter)
    masked: list[RowRef] = field(default_factory=list)
    lengths: array[int] = field(default_factory=lambda: array("i"))
    keys: array[int] = field(default_factory=lambda: array("q"))
    prompts: array[int] = field(default_factory=lambda: array("q"))
    lines: array[int] = field(default_factory=lambda: array("i"))
    numbers: array[int] = field(default_factory=lambda: array("i"))
    files: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        rows: Sequence[Row],
        stop_ids: frozenset[int] = frozenset(),
    ) -> Tally:
        """Counts examples. rows: one for each row that the examples came from."""
        tally, remaining_rows, previous_row = cls(stop_ids), iter(rows), None
        prompt = 0
        for number, example in enumerate(examples):
            if number == 0 or example.row is None or example.row != previous_row:
                prompt = prompt_key(next(remaining_rows))
                tally.rows += 1
            previous_row = example.row
            tally._add(example, prompt)
        return tally

    def add(self, row: Row, examples: Sequence[Example]) -> None:
        """Counts a row and its examples."""
        prompt = prompt_key(row)
        self.rows += 1
        for example in examples:
            self._add(example, prompt)

    def _add(self, example: Example, prompt: int) -> None:
        trained = example.trained
        num_trained = int(np.count_nonzero(trained))
        self.trained_tokens += num_trained
        if not num_trained:
            self.masked.append(example.ref)
        self.lengths.append(len(example.ids))
        self.keys.append(example.key)
        self.prompts.append(prompt)
        self.numbers.append(self.files.setdefault(example.ref.file, len(self.files)))
        self.lines.append(example.ref.line)
        self.largest_id = max(self.largest_id, int(example.ids.max(initial=-1)))
        self._count_answers(example)
        self._count_roles(example)

    def _count_answers(self, example: Example) -> None:
        """Counts trained spans, and how many of them hold a stop token among their last few
        tokens. A text with a label has no answer."""
        if example.label:
            return
        padded = np.zeros(len(example.trained) + 2, dtype=np.int8)
        padded[1:-1] = example.trained
        edges = np.flatnonzero(padded[1:] != padded[:-1]).tolist()
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            self.answers += 1
            self.stopped += not self.stop_ids.isdisjoint(
                example.ids[max(start, end - _STOP_REACH) : end].tolist()
            )

    def _count_roles(self, example: Example) -> None:
        start = 0
        for role, end in example.roles:
            end = min(end, len(example.ids))  # the row may have been cut
            if end > start:
                self.roles[role] += end - start
                self.trained_roles[role] += int(np.count_nonzero(example.trained[start:end]))
                start = end

    def __len__(self) -> int:
        return len(self.keys)

    def repeated(self) -> NDArray[np.bool_]:
        """Marks the examples that repeat an earlier one."""
        keys = (
            np.frombuffer(self.keys, dtype=np.int64) if self.keys else np.zeros(0, dtype=np.int64)
        )
        repeats = np.ones(len(keys), dtype=np.bool_)
        repeats[np.unique(keys, return_index=True)[1]] = False
        return repeats

    def shares_prompt_with(self, other: Tally) -> NDArray[np.bool_]:
        """Marks the examples whose prompt also occurs in `other`."""
        mine, theirs = (np.array(tally.prompts, dtype=np.int64) for tally in (self, other))
        return np.isin(mine, theirs)

    def lines_by_file(self, chosen: NDArray[np.bool_]) -> dict[str, tuple[int, ...]]:
        """Returns file -> lines of the chosen examples, rising."""
        numbers, lines = np.array(self.numbers), np.array(self.lines)
        chosen_lines = {}
        for file, number in self.files.items():
            rows = np.unique(lines[chosen & (numbers == number)])
            if len(rows):
                chosen_lines[file] = tuple(rows.tolist())
        return chosen_lines
