"""From files to what a run trains on: read, split, tokenise, keep to the length, check.

`load_data` refuses what must not be trained on; `examine_data` does the same work and only reports, for
`veneer data check`. Knows nothing of runs or batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any

import numpy as np

from veneer.adapters.preamble import NONE, Preamble
from veneer.bounds import SET_WEIGHT
from veneer.data.check import CheckReport, Findings, check, refuse, unknown_tokens
from veneer.data.config import DataConfig, SetConfig
from veneer.data.examples import Capacity, Example, Problem, Row, part_key, row_key
from veneer.data.mixture import Mixture, mixed
from veneer.data.sources import scan_rows
from veneer.data.split import split
from veneer.data.template import ChatTemplate, Encoded
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
    """What a run trains on. `train_rows` and `validation_rows` are the rows of the examples, in the same order, as far
    as each goes.

    fingerprint   over ids, masks and what is mixed: equal only if a run would see the same tokens
    preamble      the system turn that all training rows begin with, and what their template was told
    mixture       how many rows of each set an epoch takes; None: all of one
    sets, held    the sets that train and validation consist of, one behind the other
    """

    train: list[Example]
    validation: list[Example]
    train_rows: list[Row]
    validation_rows: list[Row]
    report: CheckReport
    fingerprint: str
    preamble: Preamble = NONE
    mixture: Mixture | None = None
    sets: Sequence[SetSize] = ()
    held: Sequence[SetSize] = ()


def load_data(
    data: DataConfig,
    *,
    length: int,
    capacity: Capacity,
    tokenizer: Any,
    today: date | None = None,
    preamble: Preamble = NONE,
) -> DataSet:
    """The examples of a run. Raises DataError with everything that keeps it from starting.

    length     longest row, tokens; data.long_rows says what happens to longer ones
    capacity   of the model: no row is longer than its positions, whatever `length` says
    today      the date that chat templates may write: the same date, the same tokens
    preamble   what the template is told, and a system turn for conversations that have none
    """
    found = examine_data(data, length=length, capacity=capacity, tokenizer=tokenizer, today=today, preamble=preamble)
    refuse(found.report, data.called)
    return found


def examine_data(
    data: DataConfig,
    *,
    length: int,
    capacity: Capacity,
    tokenizer: Any,
    today: date | None = None,
    preamble: Preamble = NONE,
) -> DataSet:
    """As load_data, but what is wrong is only in the report, and the rest of the rows is there.

    Raises DataError only if nothing can be said at all: a set that is not found, a tokenizer that cannot be used.
    """
    template = ChatTemplate(tokenizer, today=today, variables=preamble.variables)
    findings = Findings()
    asked, length = length, min(length, capacity.positions or length)
    reading = _Reading(data, template, preamble, length, findings)
    kept, held = _Kept(), _Kept()
    for one in data.train_sets:
        rows = reading.scan(one)
        if not data.validation_sets:
            rows, held_out = split(rows, data.validation_share)
            _tell_share(one.path, len(held_out), len(rows) + len(held_out), data.validation_share, findings)
            reading.encode(held_out, held, one.called)
        reading.encode(rows, kept, one.called)
    for one in data.validation_sets:
        reading.encode(reading.scan(one), held, one.called)
    if template.writes_date and any(row.messages for row in kept.rows):
        message = f"the chat template writes the date: rows are tokenised as on {template.today}"
        findings.problems.append(Problem("D213", data.called, message, fatal=False))
    findings.problems += unknown_tokens([*kept.examples, *held.examples], capacity, tokenizer)
    report = check(
        data.called,
        kept.examples,
        held.examples,
        train_rows=kept.whole,
        validation_rows=held.whole,
        findings=findings,
        length=length,
        by_model=length < asked,
        long_rows=data.long_rows,
        stop_ids=template.stop_ids,
        stop_tokens=[tokenizer.decode([number]) for number in template.stop_ids],
    )
    mixture = None if len(kept.sets) < 2 else _mixture(data, kept.sets)
    return DataSet(
        kept.examples,
        held.examples,
        kept.rows,
        held.rows,
        report,
        _fingerprint(kept.examples, held.examples, mixture=mixture),
        Preamble(common_system(kept.rows), template.variables),
        mixture,
        kept.sets,
        held.sets,
    )


def _mixture(data: DataConfig, found: Sequence[SetSize]) -> Mixture | None:
    """None: every row once an epoch. ConfigError: a share that a set is too small for."""
    sets = data.train_sets
    sizes, tokens = [each.rows for each in found], [each.tokens for each in found]
    made = mixed(sizes, tokens, [s.weight for s in sets], [s.share for s in sets], by=data.shares_of)
    for of_it, there, draw in zip(sets, found, made.draws, strict=True):
        if draw > SET_WEIGHT.most * there.rows:
            raise ConfigError(
                f"an epoch would take each of the {there.rows:,} rows of {of_it.called} {draw / there.rows:,.0f} times",
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


def common_system(rows: Sequence[Row]) -> str | None:
    """The system turn that all of these begin with."""
    turns = {row.messages[0]["content"] if _has_system(row) else None for row in rows}
    return turns.pop() if len(turns) == 1 else None


def _has_system(row: Row) -> bool:
    return bool(row.messages) and row.messages[0]["role"] == "system"


@dataclass
class _Kept:
    """Rows that are trained on or evaluated, each as far as its example goes, with these in the same order; whole: as
    they stand in the file."""

    rows: list[Row] = field(default_factory=list)
    whole: list[Row] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    sets: list[SetSize] = field(default_factory=list)


@dataclass(frozen=True)
class _Reading:
    """How sets become examples; what is found on the way goes to `findings`."""

    data: DataConfig
    template: ChatTemplate
    preamble: Preamble
    length: int
    findings: Findings

    def scan(self, one: SetConfig) -> list[Row]:
        rows, problems = scan_rows(one.path, one.format or self.data.format, one.map or self.data.map)
        self.findings.problems += problems
        self.findings.formats.update(row.format for row in rows)
        return rows

    def encode(self, rows: Sequence[Row], kept: _Kept, name: str) -> None:
        """Adds them to what is kept, as a set of their own."""
        before, whole = len(kept.examples), len(kept.whole)
        keys = [row_key(row) for row in rows]  # of what stands in the file, whoever asks
        rows = [replace(row, messages=self.preamble.opening(row.messages)) if row.messages else row for row in rows]
        for at in range(0, len(rows), _TOGETHER):
            some = slice(at, at + _TOGETHER)
            coded = self.template.encode_rows(rows[some], train_on=self.data.train_on)
            for row, key, found in zip(rows[some], keys[some], coded, strict=True):
                if isinstance(found, Problem):
                    self.findings.problems.append(found)
                else:
                    self._keep(row, key, found, kept)
        added = kept.examples[before:]
        kept.sets.append(SetSize(name, len(kept.whole) - whole, len(added), sum(len(e.ids) for e in added)))

    def _keep(self, row: Row, key: int, found: Sequence[Encoded], kept: _Kept) -> None:
        findings, length, long_rows = self.findings, self.length, self.data.long_rows
        if found[-1].control:
            findings.control.append(row)
        findings.saw(row, found)
        examples = []
        for number, each in enumerate(found):
            size = len(each.ids)
            if size > length:
                findings.too_long.append((row, size))
                if long_rows == "drop":
                    continue
                if long_rows == "cut" and any(each.trained) and not any(each.trained[:length]):
                    findings.lost.append(row)
                    continue
            kept.rows.append(row if each.upto in (None, len(row.messages)) else _beginning(row, each.upto))
            own = key if len(found) == 1 else part_key(key, number)
            example = _example(row, own, each, length if long_rows == "cut" else size)
            examples.append(example if len(found) == 1 else replace(example, row=key))
        kept.whole += [row] if examples else []
        kept.examples += examples


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
