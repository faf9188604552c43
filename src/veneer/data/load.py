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
from veneer.data.check import CheckReport, Findings, check, refuse, unknown_tokens
from veneer.data.examples import Capacity, Example, LongRows, Problem, Row, TrainOn, part_key, row_key
from veneer.data.sources import scan_rows
from veneer.data.split import split
from veneer.data.template import ChatTemplate, Encoded


@dataclass(frozen=True)
class DataSet:
    """What a run trains on. `train_rows` and `validation_rows` are the rows of the examples, in the same order, as far
    as each goes.

    fingerprint   over ids and masks in order: equal only if a run would see the same tokens
    preamble      the system turn that all training rows begin with, and what their template was told
    """

    train: list[Example]
    validation: list[Example]
    train_rows: list[Row]
    validation_rows: list[Row]
    report: CheckReport
    fingerprint: str
    preamble: Preamble = NONE


def load_data(
    train: str,
    *,
    validation: str | None,
    validation_share: float,
    format: str,
    train_on: TrainOn,
    long_rows: LongRows,
    length: int,
    capacity: Capacity,
    tokenizer: Any,
    today: date | None = None,
    preamble: Preamble = NONE,
) -> DataSet:
    """The examples of a run. Raises DataError with everything that keeps it from starting.

    train, validation   files; without the second, `validation_share` of the first is held out
    format              a layout's name (formats.py), or auto
    length              longest row, tokens; long_rows says what happens to longer ones
    capacity            of the model: no row is longer than its positions, whatever `length` says
    today               the date that chat templates may write: the same date, the same tokens
    preamble            what the template is told, and a system turn for conversations that have none
    """
    data = examine_data(
        train,
        validation=validation,
        validation_share=validation_share,
        format=format,
        train_on=train_on,
        long_rows=long_rows,
        length=length,
        capacity=capacity,
        tokenizer=tokenizer,
        today=today,
        preamble=preamble,
    )
    refuse(data.report, train)
    return data


def examine_data(
    train: str,
    *,
    validation: str | None,
    validation_share: float,
    format: str,
    train_on: TrainOn,
    long_rows: LongRows,
    length: int,
    capacity: Capacity,
    tokenizer: Any,
    today: date | None = None,
    preamble: Preamble = NONE,
) -> DataSet:
    """As load_data, but what is wrong is only in the report, and the rest of the rows is there.

    Raises DataError only if nothing can be said at all: an unknown format, a tokenizer that cannot be used.
    """
    template = ChatTemplate(tokenizer, today=today, variables=preamble.variables)
    findings = Findings()
    asked, length = length, min(length, capacity.positions or length)
    rows = _scan(train, format, findings)
    if validation is None:
        rows, held_out = split(rows, validation_share)
        total = len(rows) + len(held_out)
        if len(held_out) > 2 * validation_share * total + 10:
            message = (
                f"{len(held_out):,} of {total:,} rows are held out, where {validation_share:.1%} was asked for: "
                "rows that answer the same prompt stay together"
            )
            findings.problems.append(Problem("D216", train, message, fatal=False))
    else:
        held_out = _scan(validation, format, findings)
    kept = _encode(rows, preamble, template, train_on, length, long_rows, findings)
    held = _encode(held_out, preamble, template, train_on, length, long_rows, findings)
    if template.writes_date and any(row.messages for row in rows):
        message = f"the chat template writes the date: rows are tokenised as on {template.today}"
        findings.problems.append(Problem("D213", train, message, fatal=False))
    findings.problems += unknown_tokens([*kept.examples, *held.examples], capacity, tokenizer)
    report = check(
        train,
        kept.examples,
        held.examples,
        train_rows=kept.whole,
        validation_rows=held.whole,
        findings=findings,
        length=length,
        by_model=length < asked,
        long_rows=long_rows,
        stop_ids=template.stop_ids,
        stop_tokens=[tokenizer.decode([number]) for number in template.stop_ids],
    )
    fingerprint = _fingerprint(kept.examples, held.examples)
    begun = Preamble(common_system(kept.rows), template.variables)
    return DataSet(kept.examples, held.examples, kept.rows, held.rows, report, fingerprint, begun)


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


def _scan(file: str, format: str, findings: Findings) -> list[Row]:
    rows, problems = scan_rows(file, format)
    findings.problems += problems
    findings.formats.update(row.format for row in rows)
    return rows


def _encode(
    rows: Sequence[Row],
    preamble: Preamble,
    template: ChatTemplate,
    train_on: TrainOn,
    length: int,
    long_rows: LongRows,
    findings: Findings,
) -> _Kept:
    kept = _Kept()
    keys = [row_key(row) for row in rows]  # of what stands in the file, whoever asks
    rows = [replace(row, messages=preamble.opening(row.messages)) if row.messages else row for row in rows]
    for row, key, found in zip(rows, keys, template.encode_rows(rows, train_on=train_on), strict=True):
        if isinstance(found, Problem):
            findings.problems.append(found)
            continue
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
    return kept


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


def _fingerprint(*parts: Sequence[Example]) -> str:
    """BLAKE2b over the ids and masks in order, hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    for examples in parts:
        digest.update(len(examples).to_bytes(8, "little"))
        for example in examples:
            digest.update(len(example.ids).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(example.ids, dtype="<i4").tobytes())
            digest.update(np.packbits(example.trained).tobytes())
    return digest.hexdigest()
