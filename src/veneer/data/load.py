"""From files to what a run trains on: read, split, tokenise, keep to the length, check.

`load_data` refuses what must not be trained on; `examine_data` does the same work and only reports,
for `veneer data check`. Knows nothing of runs or batches.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import chain, count
from typing import Any

import numpy as np

from veneer.adapters.preamble import NONE, Preamble
from veneer.bounds import SET_WEIGHT
from veneer.data.checks.check import CheckReport, Findings, check, refuse, unknown_tokens
from veneer.data.checks.tally import Tally
from veneer.data.config import DataConfig, SetConfig
from veneer.data.examples import (
    Capacity,
    Example,
    Problem,
    Row,
    grouped,
    part_key,
    prompt_key,
    row_key,
)
from veneer.data.files.formats import Layouts
from veneer.data.files.places import ResolvedSets
from veneer.data.files.sources import rows_in
from veneer.data.mixture import Mixture, mixed
from veneer.data.split import BY_COUNT, BY_THRESHOLD, Holds, Split, by_threshold
from veneer.data.template.template import ChatTemplate, Encoded
from veneer.errors import ConfigError

_TOGETHER = 4096
"""Rows whose tokens are lists of Python's at once, forty bytes each; then they are arrays."""


@dataclass(frozen=True)
class SetSize:
    """One set of a run, as it is among the examples: so many of them, of so many rows."""

    name: str
    rows: int
    examples: int
    tokens: int


@dataclass(frozen=True)
class DataSet:
    """What a run trains on. `train_rows` and `validation_rows` are the rows of the examples, in the
    same order, as far as each goes.

    fingerprint   over ids, masks and what is mixed: equal only if a run would see the same tokens
    preamble      the system turn that all training rows begin with, and what their template was
                  told
    mixture       how many rows of each set an epoch takes; None: all of one
    sets, held    the sets that train and validation consist of, one behind the other
    in_files      a line that says so where its tokens are in files; of the rows there are a few
                  then
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    train_rows: list[Row]
    validation_rows: list[Row]
    report: CheckReport
    fingerprint: str
    preamble: Preamble = NONE
    mixture: Mixture | None = None
    sets: Sequence[SetSize] = ()
    held: Sequence[SetSize] = ()
    in_files: str | None = None


def load_data(
    data: DataConfig,
    *,
    length: int,
    capacity: Capacity,
    tokenizer: Any,
    today: date | None = None,
    preamble: Preamble = NONE,
    held_out_by: str = BY_COUNT,
    purpose: str = "trained on",
    resumes: bool = False,
    sets: ResolvedSets | None = None,
) -> DataSet:
    """The examples of a run. Raises DataError with everything that keeps it from starting.

    length     longest row, tokens; data.long_rows says what happens to longer ones
    capacity   of the model: no row is longer than its positions, whatever `length` says
    today      the date that chat templates may write: the same date, the same tokens
    preamble   what the template is told, and a system turn for conversations that have none
    held_out_by   how rows are split off (split.py)
    purpose    what the rows are for, as an error says it
    resumes    the run has begun with these rows
    sets       keeps the files of each set, where they were found before
    """
    found = examine_data(
        data,
        length=length,
        capacity=capacity,
        tokenizer=tokenizer,
        today=today,
        preamble=preamble,
        held_out_by=held_out_by,
        sets=sets,
    )
    refuse(found.report, data.called, purpose, resumes=resumes)
    return found


def examine_data(
    data: DataConfig,
    *,
    length: int,
    capacity: Capacity,
    tokenizer: Any,
    today: date | None = None,
    preamble: Preamble = NONE,
    held_out_by: str = BY_COUNT,
    sets: ResolvedSets | None = None,
) -> DataSet:
    """As load_data, but what is wrong is only in the report, and the rest of the rows is there.

    Raises DataError only if nothing can be said at all: a set that is not found, a tokenizer that
    cannot be used.
    """
    template = ChatTemplate(tokenizer, today=today, variables=preamble.variables)
    kept, held = (Kept(Tally(frozenset(template.stop_ids))) for _ in range(2))
    asked: dict[str, Any] = {
        "length": length,
        "capacity": capacity,
        "preamble": preamble,
        "held_out_by": held_out_by,
    }
    return read_data(data, template, kept, held, sets=sets or ResolvedSets(), **asked)


def read_data(
    data: DataConfig,
    template: ChatTemplate,
    kept: Kept,
    held: Kept,
    *,
    length: int,
    capacity: Capacity,
    preamble: Preamble,
    held_out_by: str,
    sets: ResolvedSets,
    say: Callable[[int], None] = lambda rows: None,
) -> DataSet:
    """The rows of all sets, one after another, into what is trained on and what is held out. say:
    is told how many rows there were so far.

    A set from which rows are held out is read twice: which ones depends on all of its prompts.
    """
    asked, length = length, min(length, capacity.positions or length)
    findings, total = Findings(), 0
    reading, division = _Reading(data, template, preamble, length, findings, sets), Split()
    with _collecting_between() as collect:
        for one in data.train_sets:
            read = out = 0
            holds = reading.held_out(one, division, held_out_by)
            for rows in reading.scan(one):
                read += len(rows)
                held_out = [row for row in rows if holds(row)]
                out += len(held_out)
                reading.encode(held_out, held)
                reading.encode([row for row in rows if not holds(row)] if held_out else rows, kept)
                say(total + read)
                collect()
            total += read
            if not data.validation_sets:
                _tell_share(one.path, out, read, data.validation_share, findings)
                held.end_set(one.called)
            kept.end_set(one.called)
        for one in data.validation_sets:
            for rows in reading.scan(one):
                reading.encode(rows, held)
                collect()
            held.end_set(one.called)
    if template.writes_date and kept.chats:
        message = f"the chat template writes the date: rows are tokenised as on {template.today}"
        findings.problems.append(Problem("D213", data.called, message, fatal=False))
    train, validation = kept.close(), held.close()
    if (
        capacity.tokens is not None
        and max(kept.tally.largest_id, held.tally.largest_id) >= capacity.tokens
    ):
        findings.problems += unknown_tokens(chain(train, validation), capacity, template.tokenizer)
    report = check(
        data.called,
        kept.tally,
        held.tally,
        findings=findings,
        length=length,
        by_model=length < asked,
        long_rows=data.long_rows,
        stop_tokens=[template.tokenizer.decode([number]) for number in template.stop_ids],
    )
    mixture = None if len(kept.sets) < 2 else _mixture(data, kept.sets)
    return DataSet(
        train,
        validation,
        kept.rows,
        held.rows,
        report,
        _fingerprint(train, validation, mixture=mixture),
        Preamble(kept.common_system, template.variables),
        mixture,
        kept.sets,
        held.sets,
    )


def _mixture(data: DataConfig, found: Sequence[SetSize]) -> Mixture | None:
    """None: every row once an epoch. ConfigError: a share that a set is too small for."""
    sets = data.train_sets
    sizes, tokens = [each.rows for each in found], [each.tokens for each in found]
    made = mixed(
        sizes, tokens, [s.weight for s in sets], [s.share for s in sets], by=data.shares_of
    )
    for of_it, there, draw in zip(sets, found, made.draws, strict=True):
        if draw > SET_WEIGHT.most * there.rows:
            raise ConfigError(
                f"an epoch would take each of the {there.rows:,} rows of {of_it.called}"
                f" {draw / there.rows:,.0f} times",
                [f"share {of_it.share} of an epoch; {SET_WEIGHT.most:,} times at most"],
                "Give it a smaller share, or more rows.",
            )
    return None if made.is_plain else made


def _tell_share(file: str, held_out: int, total: int, share: float, findings: Findings) -> None:
    if held_out > 2 * share * total + 10:
        message = (
            f"{held_out:,} of {total:,} rows are held out, where {share:.1%} was asked for: "
            "rows that answer the same prompt stay together"
        )
        findings.problems.append(Problem("D216", file, message, fatal=False))


def _system_of(row: Row) -> str | None:
    """The turn that it begins with."""
    found = row.messages[0] if row.messages else {}
    return found["content"] if found.get("role") == "system" else None


@dataclass
class Kept:
    """Rows that are trained on or evaluated, each as far as its example goes, with these in the
    same order."""

    tally: Tally
    rows: list[Row] = field(default_factory=list)
    sets: list[SetSize] = field(default_factory=list)
    chats: bool = False
    """Whether any row has messages, which a template writes."""
    _examples: list[Example] = field(default_factory=list)
    _systems: set[str | None] = field(default_factory=set)
    _counted: tuple[int, int, int] = (0, 0, 0)
    _tokens: int = 0

    def add(self, row: Row, parts: Sequence[tuple[Row, Example]]) -> None:
        """A row, and what it became, each example with the row as far as it goes."""
        self.tally.add(row, [example for _, example in parts])
        self._tokens += sum(len(example.ids) for _, example in parts)
        if row.messages and len(self._systems) < 2:
            self._systems |= {_system_of(part) for part, _ in parts}
        self.chats |= bool(row.messages)
        self.keep(parts)

    def keep(self, parts: Sequence[tuple[Row, Example]]) -> None:
        for row, example in parts:
            self.rows.append(row)
            self._examples.append(example)

    def end_set(self, name: str) -> None:
        """What came since the last one is a set."""
        now = self.tally.rows, len(self.tally), self._tokens
        self.sets.append(
            SetSize(name, *(here - before for here, before in zip(now, self._counted, strict=True)))
        )
        self._counted = now

    def close(self) -> Sequence[Example]:
        return self._examples

    @property
    def common_system(self) -> str | None:
        """The system turn that all conversations begin with."""
        return next(iter(self._systems)) if len(self._systems) == 1 else None


@contextmanager
def _collecting_between() -> Iterator[Callable[[], int]]:
    """Within the block Python looks for cyclic garbage only where it is asked to, and only among
    what is new.

    A row makes hundreds of objects, which live as long as the stretch of rows it is read with. Left
    to itself the collector goes over them again and again, and over all that the process holds: a
    third of the time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield lambda: gc.collect(1)
    finally:
        if was_on:
            gc.enable()


@dataclass(frozen=True)
class _Reading:
    """How sets become examples; what is found on the way goes to `findings`."""

    data: DataConfig
    template: ChatTemplate
    preamble: Preamble
    length: int
    findings: Findings
    sets: ResolvedSets
    numbers: Iterator[int] = field(default_factory=count)
    """Next row's number. Rows are told apart by it: a hash of their content would merge equal
    neighbours."""

    def held_out(self, one: SetConfig, division: Split, held_out_by: str) -> Holds:
        """Which rows of the set are held out."""
        share = self.data.validation_share
        if self.data.validation_sets or not share:
            return lambda row: False
        if held_out_by == BY_THRESHOLD:
            return by_threshold(share)
        rows = self._rows(one)
        return division.hold_out((prompt_key(row) for row in rows if isinstance(row, Row)), share)

    def scan(self, one: SetConfig) -> Iterator[list[Row]]:
        """The rows of a set, some at a time."""
        problems: list[Problem] = []
        some: list[Row] = []
        layouts = Layouts()
        for found in self._rows(one):
            if isinstance(found, Problem):
                problems.append(found)
                continue
            some.append(found)
            layouts.add(found)
            if len(some) == _TOGETHER:
                yield some
                some = []
        yield some
        self.findings.problems += grouped(problems + layouts.problems())
        self.findings.formats.update(layouts.counts)

    def _rows(self, one: SetConfig) -> Iterator[Row | Problem]:
        return rows_in(
            one.path, one.format or self.data.format, one.map or self.data.map, self.sets
        )

    def encode(self, rows: Sequence[Row], kept: Kept) -> None:
        """Adds them to what is kept."""
        keys = [row_key(row) for row in rows]  # of what stands in the file, whoever asks
        rows = [
            replace(row, messages=self.preamble.opening(row.messages)) if row.messages else row
            for row in rows
        ]
        coded = self.template.encode_rows(rows, train_on=self.data.train_on)
        for row, key, found in zip(rows, keys, coded, strict=True):
            if isinstance(found, Problem):
                self.findings.problems.append(found)
            else:
                self._keep(row, key, found, kept)

    def _keep(self, row: Row, key: int, found: Sequence[Encoded], kept: Kept) -> None:
        findings, length, long_rows = self.findings, self.length, self.data.long_rows
        named = Row(
            row.ref, [], text=None if row.text is None else ""
        )  # all that findings tell of it
        if found[-1].control:
            findings.control.append(named)
        findings.saw(named, found)
        parts: list[tuple[Row, Example]] = []
        of_several = None if len(found) == 1 else next(self.numbers)
        for number, each in enumerate(found):
            size = len(each.ids)
            if size > length:
                findings.too_long.append((named, size))
                if long_rows == "drop":
                    continue
                if long_rows == "cut" and any(each.trained) and not any(each.trained[:length]):
                    findings.lost.append(named)
                    continue
            part = row if each.upto in (None, len(row.messages)) else _beginning(row, each.upto)
            own = key if len(found) == 1 else part_key(key, number)
            example = _example(row, own, each, length if long_rows == "cut" else size)
            parts.append((part, replace(example, row=of_several)))
        if parts:
            kept.add(row, parts)


def _beginning(row: Row, count: int) -> Row:
    """Up to one of its answers; further right answers are for the last."""
    return replace(row, messages=row.messages[:count], references=())


def _example(row: Row, key: int, found: Encoded, size: int) -> Example:
    return Example(
        np.array(found.ids[:size], dtype=np.int32),
        np.array(found.trained[:size], dtype=np.bool_),
        row.ref,
        key,
        found.roles,
    )


def _fingerprint(*parts: Sequence[Example], mixture: Mixture | None) -> str:
    """BLAKE2b over the ids and masks in order, and what is mixed, hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    if mixture is not None:
        digest.update(repr(mixture).encode())
    for examples in parts:
        digest.update(len(examples).to_bytes(8, "little"))
        for example in examples:
            digest.update(len(example.ids).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(example.ids, dtype="<i4").tobytes())
            digest.update(np.packbits(example.trained).tobytes())
    return digest.hexdigest()
