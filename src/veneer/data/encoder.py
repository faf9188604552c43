"""Makes examples of the rows of a set: renders and tokenises them, and applies the length limit.

A row becomes one example, several if its template renders earlier answers differently, or one for
each answer that it compares. A text with a label becomes its tokens and one more, a placeholder for
the label: a score head reads the hidden state before it, which is that of the last real token.
Faults are collected. Knows nothing of splits' sizes or of runs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count

import numpy as np

from veneer.adapters.labels import HeadSettings
from veneer.adapters.preamble import NONE, Preamble
from veneer.data.checks.check import Findings
from veneer.data.collector import ExampleCollector
from veneer.data.config import DataConfig, SetConfig
from veneer.data.examples import (
    AnswerKind,
    Capacity,
    Example,
    Problem,
    Row,
    RowFault,
    RowKind,
    grouped,
    part_key,
    prompt_key,
    row_key,
)
from veneer.data.files.labels import label_reader
from veneer.data.files.layouts import RowLayouts
from veneer.data.files.places import ResolvedSets
from veneer.data.files.sources import iterate_rows
from veneer.data.split import BY_COUNT, BY_THRESHOLD, Holds, Split, by_threshold
from veneer.data.teacher import teacher_example, teacher_fault
from veneer.data.teacher_text import TeacherText
from veneer.data.template.encoded_row import EncodedRow
from veneer.data.template.template import ChatTemplate

PLACEHOLDER = 0
"""Token id behind a text with a label. It is never computed."""
_ROWS_AT_ONCE = 4096
"""Rows that are tokenised together. Their tokens are Python lists of forty bytes a token until they
become arrays."""


@dataclass(frozen=True)
class RowRules:
    """How rows become examples.

    length       longest row, tokens; data.long_rows says what happens to longer ones
    capacity     of the model: no row is longer than its positions, whatever `length` says
    preamble     variables of the template, and a system turn for conversations without one
    held_out_by  how rows are held out (split.py)
    kind         what the rows must hold
    teacher      text that a teacher reads besides each row; None without a teacher
    head         the score head of rows with labels; if it names no labels, those of the rows are
                 taken
    sets         remembers the files of each set
    """

    length: int
    capacity: Capacity
    preamble: Preamble = NONE
    held_out_by: str = BY_COUNT
    kind: RowKind = "answers"
    teacher: TeacherText | None = None
    head: HeadSettings | None = None
    sets: ResolvedSets = field(default_factory=ResolvedSets)

    @property
    def longest(self) -> int:
        """Tokens that a row may have."""
        return min(self.length, self.capacity.positions or self.length)


@dataclass(frozen=True)
class SetEncoder:
    """Reads sets and makes examples; faults go to `findings`."""

    data: DataConfig
    template: ChatTemplate
    rules: RowRules
    findings: Findings
    numbers: Iterator[int] = field(default_factory=count)
    """The next row's number. It tells rows apart; a hash of their content would merge equal
    neighbours."""

    def choose_held_out(self, data_set: SetConfig, split: Split) -> Holds:
        """Chooses the rows of the set to hold out."""
        share = self.data.validation_share
        if self.data.validation_sets or not share:
            return lambda row: False
        if self.rules.held_out_by == BY_THRESHOLD:
            return by_threshold(share)
        rows = self._rows(data_set)
        return split.hold_out((prompt_key(row) for row in rows if isinstance(row, Row)), share)

    def training_rows(self) -> Iterator[Row]:
        """Yields the readable rows of all training sets, without tokens."""
        for data_set in self.data.train_sets:
            yield from (row for row in self._rows(data_set) if isinstance(row, Row))

    def scan(self, data_set: SetConfig) -> Iterator[list[Row]]:
        """Yields the rows of a set, _ROWS_AT_ONCE at a time."""
        problems: list[Problem] = []
        rows: list[Row] = []
        layouts = RowLayouts()
        for row in self._rows(data_set):
            if isinstance(row, Problem):
                problems.append(row)
                continue
            rows.append(row)
            layouts.add(row)
            if len(rows) == _ROWS_AT_ONCE:
                yield rows
                rows = []
        yield rows
        self.findings.problems += grouped(problems + layouts.problems())
        self.findings.formats.update(layouts.counts)

    def _rows(self, data_set: SetConfig) -> Iterator[Row | Problem]:
        return iterate_rows(
            data_set.path,
            data_set.format or self.data.format,
            data_set.map or self.data.map,
            self.rules.sets,
            self.rules.kind,
        )

    def encode(self, rows: Sequence[Row], collector: ExampleCollector) -> None:
        """Tokenises rows and adds their examples to `collector`."""
        keys = [row_key(row) for row in rows]  # before the preamble is added
        conversations = [
            [self._with_preamble(answer) for answer in self._conversations(row)] for row in rows
        ]
        results = iter(
            self.template.encode_rows(list(chain(*conversations)), train_on=self.data.train_on)
        )
        read_label = None if self.rules.head is None else label_reader(self.rules.head)
        for row, key, answers in zip(rows, keys, conversations, strict=True):
            encodings: list[list[EncodedRow]] = []
            problems: list[Problem] = []
            for encoded in [next(results) for _ in answers]:
                if isinstance(encoded, Problem):
                    problems.append(encoded)
                else:
                    encodings.append(encoded)
            if problems:
                self.findings.problems.append(problems[0])
            elif read_label is not None:
                try:
                    label = read_label(row.label)
                except RowFault as fault:
                    self.findings.problems.append(fault.at(row.ref))
                else:
                    self._add_label(row, key, encodings[0][0], label, collector)
            elif row.others or row.liked is not None:
                self._add_preference(row, key, answers, encodings, collector)
            elif self.rules.teacher is not None:
                own, teacher = encodings
                self._add_taught(answers[0], key, own, teacher, collector)
            elif parts := self._answer_parts(answers[0], key, encodings[0]):
                collector.add(answers[0], parts)

    def _conversations(self, row: Row) -> list[Row]:
        """Returns a row for each answer, or one for the student and one for the teacher."""
        if self.rules.teacher is None:
            return conversations_of(row)
        return [row, self.rules.teacher.extend(row, has_template=bool(self.template.source))]

    def _with_preamble(self, row: Row) -> Row:
        if not row.messages:
            return row
        return replace(row, messages=self.rules.preamble.opening(row.messages))

    def _add_preference(
        self,
        row: Row,
        key: int,
        answers: Sequence[Row],
        encodings: Sequence[Sequence[EncodedRow]],
        collector: ExampleCollector,
    ) -> None:
        """Adds a row whose answers are compared or rated: one example for each answer."""
        fault = preference_fault(encodings)
        if self.data.train_on == "all":
            fault = "train_on all trains prompts too, and answers are compared: leave train_on out"
        if fault:
            self.findings.problems.append(row.ref.problem("D117", fault))
            return
        kinds: list[AnswerKind] = ["rejected"] * (1 + len(row.others))
        if row.liked is not False:
            kinds[0] = "chosen"
        texts = [encoding for (encoding,) in encodings]
        start = texts[0].trained.index(True)
        answer_ids = [text.ids[start:] for text in texts]
        self.findings.pairs.add(row.ref, texts[0].ids[:start], answer_ids)
        parts = self._parts(answers, key, texts, kinds)
        if len(parts) == len(texts):
            collector.add(answers[0], parts)

    def _add_label(
        self,
        row: Row,
        key: int,
        encoding: EncodedRow,
        label: tuple[float, ...],
        collector: ExampleCollector,
    ) -> None:
        """Adds a text with its label. A text that is cut ends with the placeholder, too."""
        whole = replace(
            encoding,
            ids=[*encoding.ids, PLACEHOLDER],
            trained=[False] * len(encoding.ids) + [True],
            reasons=(),
        )
        query = None if row.query is None else prompt_key(row)
        for part_row, example in self._parts([row], key, [whole], ["answer"]):
            example.ids[-1], example.trained[-1] = PLACEHOLDER, True
            collector.add(row, [(part_row, replace(example, label=label, query=query))])

    def _add_taught(
        self,
        row: Row,
        key: int,
        encodings: Sequence[EncodedRow],
        teacher: Sequence[EncodedRow],
        collector: ExampleCollector,
    ) -> None:
        """Adds a row's examples, and one more for each of them, which the teacher reads."""
        if fault := teacher_fault(row, encodings, teacher, self.rules.capacity.positions):
            self.findings.problems.append(row.ref.problem("D118", fault))
            return
        parts = self._answer_parts(row, key, encodings)
        if len(parts) < len(encodings):
            return  # too long
        number = next(self.numbers)
        parts = [(part, replace(example, row=number)) for part, example in parts]
        pairs = zip(parts, teacher, strict=True)
        collector.add(
            row, parts, [(part, teacher_example(own, text)) for (part, own), text in pairs]
        )

    def _answer_parts(
        self, row: Row, key: int, encodings: Sequence[EncodedRow]
    ) -> list[tuple[Row, Example]]:
        rows = [
            row
            if encoding.upto in (None, len(row.messages))
            # Cut after one of its answers. Further correct answers belong to the last answer.
            else replace(row, messages=row.messages[: encoding.upto], references=())
            for encoding in encodings
        ]
        return self._parts(rows, key, encodings, ["answer"] * len(rows))

    def _parts(
        self,
        rows: Sequence[Row],
        key: int,
        encodings: Sequence[EncodedRow],
        kinds: Sequence[AnswerKind],
    ) -> list[tuple[Row, Example]]:
        """Makes the examples of one row; leaves out those that are too long.

        rows, kinds: of each example
        """
        findings, length, long_rows = self.findings, self.rules.longest, self.data.long_rows
        whole = rows[-1]
        # All that findings need.
        reference = Row(whole.ref, [], text=None if whole.text is None else "")
        if encodings[-1].control:
            findings.control.append(reference)
        findings.record_row(reference, encodings, several=kinds[0] == "answer")
        parts: list[tuple[Row, Example]] = []
        row_number = None if len(encodings) == 1 else next(self.numbers)
        for number, (row, encoding, kind) in enumerate(zip(rows, encodings, kinds, strict=True)):
            size = len(encoding.ids)
            if size > length:
                findings.too_long.append((reference, size))
                if long_rows == "drop":
                    continue
                if (
                    long_rows == "cut"
                    and row.label is None
                    and any(encoding.trained)
                    and not any(encoding.trained[:length])
                ):
                    findings.lost.append(reference)
                    continue
            example_key = key if len(encodings) == 1 else part_key(key, number)
            example = _example(row, example_key, encoding, length if long_rows == "cut" else size)
            parts.append((row, replace(example, row=row_number, kind=kind)))
        return parts


def conversations_of(row: Row) -> list[Row]:
    """Returns a row for each answer, the best first."""
    if not row.others and row.liked is None:
        return [row]
    answers = (row.messages, *row.others)
    # A base without a chat template joins prompt and answer, as in this layout.
    return [
        replace(row, messages=messages, others=(), format="prompt_completion")
        for messages in answers
    ]


def preference_fault(encodings: Sequence[Sequence[EncodedRow]]) -> str | None:
    """Returns why the answers of a row cannot be compared, None if they can."""
    if any(len(texts) != 1 for texts in encodings):
        return "the chat template renders an earlier turn of an answer differently later"
    prompts = []
    for (text,) in encodings:
        if True not in text.trained:
            return "an answer has no token to train on"
        prompts.append(text.ids[: text.trained.index(True)])
    if any(prompt != prompts[0] for prompt in prompts):
        return "the chat template renders the prompt differently before each answer"
    return None


def _example(row: Row, key: int, encoding: EncodedRow, size: int) -> Example:
    return Example(
        np.array(encoding.ids[:size], dtype=np.int32),
        np.array(encoding.trained[:size], dtype=np.bool_),
        row.ref,
        key,
        encoding.roles,
    )
