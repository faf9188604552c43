"""Shows uploaded rows: their columns, how they will read, findings, and which tokens train.

Findings are those of `veneer data check`. Texts of the file are returned as they are: the page
shows them as text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from veneer.data.config import DataConfig
from veneer.data.encoder import RowRules
from veneer.data.examples import Capacity, Example, Format, Problem, Row, RowFault, RowRef
from veneer.data.files.columns import ColumnRenames, KtoLabels
from veneer.data.files.labels import make_row
from veneer.data.files.layouts import NEEDS, detect, likely_columns, same_rows
from veneer.data.files.places import RowFile
from veneer.data.files.sources import iterate_records
from veneer.data.load import DataSet, examine_closely, examine_data
from veneer.errors import DataError
from veneer.files.strict_json import read_yaml
from veneer.objectives.config import ObjectiveConfig
from veneer.serve.studio.bodies import RowChoices
from veneer.serve.studio.objective import objectives_for
from veneer.training.config import RunConfig
from veneer.wording import cut

RECORDS_FOR_COLUMNS = 200
SHOWN_ROWS = 3
MOST_ROWS = 500_000
MOST_MESSAGE = 2000
"""Characters shown of a message."""
MOST_CELL = 80
"""Characters shown of a column's first value."""
LEAST_SHARE, MOST_SHARE, LEAST_HELD_OUT = 0.05, 0.2, 10
SHOWN_EXAMPLES = 3
MOST_TOKENS = 600
"""Tokens shown of an example."""
MOST_LINES = 200
"""Line numbers listed of a finding."""
SHOWN_EXCERPTS = 5
"""Rows shown of a finding."""
MOST_EXCERPT = 400
"""Characters shown of a row of a finding."""

OPTIONAL: dict[Format, tuple[str, ...]] = {
    "prompt_completion": ("system",),
    "alpaca": ("input", "system"),
    "chat": ("tools",),
    "pairs": ("prompt",),
}
"""Columns that a layout reads if the file has them."""

OF_BASE = frozenset(("D201", "D202", "D207", "D214", "D217", "D218", "D219"))
"""Faults of rows that another base may not have, with its template, tokens and positions."""


def count_records(file: RowFile) -> int:
    """Counts the records of a file. DataError: there are more than MOST_ROWS."""
    count = 0
    for _ in iterate_records(file):
        count += 1
        if count > MOST_ROWS:
            raise DataError(
                f"{file.name} has more than {MOST_ROWS:,} rows",
                next_step="Train on it with the command line: veneer train --data FILE.",
            )
    return count


def describe_columns(file: RowFile, choices: RowChoices) -> dict[str, Any]:
    """Returns the columns with an example of each, the layout, and the first rows as they will be
    trained on."""
    records = list(islice(_records_of(file), RECORDS_FOR_COLUMNS))
    columns: dict[str, str] = {}
    for _, record in records:
        for name, value in record.items():
            if value not in (None, ""):
                columns.setdefault(name, cut(_text(value), MOST_CELL))
    present = frozenset(columns)
    layout, reason = _layout([record for _, record in records], choices)
    likely_layout = layout or "prompt_completion"
    return {
        "columns": [{"name": name, "example": example} for name, example in columns.items()],
        "layout": layout,
        "reason": reason,
        "objectives": objectives_for(layout),
        "needed": list(NEEDS.get(likely_layout, ())),
        "optional": list(OPTIONAL.get(likely_layout, ())),
        "likely": _likely(present, likely_layout),
        "records": [
            {
                "line": line,
                "cells": [cut(_text(record.get(name, "")), MOST_CELL) for name in columns],
            }
            for line, record in records[:SHOWN_ROWS]
        ],
        "rows": [
            _as_trained(file.name, line, record, choices, columns, layout)
            for line, record in records[:SHOWN_ROWS]
        ],
    }


def first_choices(file: RowFile, records: int) -> RowChoices:
    """Returns choices for new rows. If no layout fits, columns are chosen for question and answer.

    A small set holds out ten rows, but at most a fifth.
    """
    share = round(min(max(LEAST_SHARE, LEAST_HELD_OUT / max(records, 1)), MOST_SHARE), 2)
    first = _first_records(file)
    columns = frozenset(name for record in first for name in record)
    if (marked := _marked_layout(first, columns)) is not None:
        return RowChoices(layout=marked, validation_share=share)
    if _layout(first, RowChoices())[0] is not None or not columns:
        return RowChoices(validation_share=share)
    return RowChoices(
        layout="prompt_completion",
        columns=_likely(columns, "prompt_completion"),
        validation_share=share,
    )


def layout_of(file: RowFile, choices: RowChoices) -> Format | None:
    """Returns the layout that is chosen, or that the first records fit."""
    return _layout(_first_records(file), choices)[0]


def _layout(records: Sequence[dict[str, Any]], choices: RowChoices) -> tuple[Format | None, str]:
    """Returns the layout, or None and why none is recognised."""
    if choices.layout != "auto":
        return choices.layout, ""
    try:
        names = dict.fromkeys(name for record in records for name in record)
        renames = ColumnRenames(column_map(list(names), choices.columns))
        rows = [renames.rename(record) for record in records]
        columns = frozenset(
            name for row in rows for name, value in row.items() if value not in (None, "")
        )
        return _marked_layout(rows, columns) or _detect(rows, columns), ""
    except RowFault as fault:
        return None, fault.message


def _detect(rows: Sequence[dict[str, Any]], columns: frozenset[str]) -> Format:
    """Recognises the layout of rows by all their columns; the first one's, if they have several
    that become the same rows. Raises RowFault."""
    try:
        return detect(columns, "any")
    except RowFault:
        layouts = [
            detect(frozenset(name for name in row if row[name] not in (None, "")), "any")
            for row in rows
        ]
        if not layouts or not same_rows(layouts):
            raise
        return layouts[0]


def _marked_layout(rows: Sequence[dict[str, Any]], columns: frozenset[str]) -> Format | None:
    """Returns the layout of texts with labels or of rated answers; None for other rows.

    Rows whose ratings are all good are answers.
    """
    if columns >= set(NEEDS["ratings"]):
        labels = KtoLabels()
        for line, row in enumerate(rows):
            labels.add(row.get("label"), RowRef("", line))
        return "ratings" if labels.mark_bad_answers else None
    return "labels" if columns >= set(NEEDS["labels"]) else None


def _likely(columns: frozenset[str], layout: Format) -> dict[str, str]:
    """Returns a column for each name of the layout, as far as the columns' names tell."""
    names = (*NEEDS[layout], *OPTIONAL.get(layout, ()))
    likely = {name: name for name in names if name in columns}
    if layout in ("prompt_completion", "alpaca"):
        for name, column in zip(NEEDS[layout], likely_columns(columns), strict=True):
            if column is not None and column not in likely.values():
                likely.setdefault(name, column)
    return likely


def column_map(columns: Sequence[str], chosen: Mapping[str, str]) -> dict[str, str | None]:
    """Returns renames of columns. chosen: for names of a layout, the columns that hold them.

    A column that has the name of a layout and was not chosen for it is dropped.
    """
    renames: dict[str, str | None] = {column: name for name, column in chosen.items()}
    for name, column in chosen.items():
        if column != name and name in columns:
            renames.setdefault(name, None)
    return {column: name for column, name in renames.items() if column != name}


def _as_trained(
    file: str,
    line: int,
    record: dict[str, Any],
    choices: RowChoices,
    columns: Mapping[str, str],
    layout: Format | None,
) -> dict[str, Any]:
    """Returns a row's messages as the model will see them, or its fault."""
    try:
        renames = ColumnRenames(column_map(list(columns), choices.columns))
        values = renames.rename(record)
        present = frozenset(name for name, value in values.items() if value is not None)
        if layout is None or (choices.layout == "auto" and layout not in ("ratings", "labels")):
            layout = detect(present, "any")  # rows of a file may differ
        row = make_row(values, RowRef(file, line), layout)
    except RowFault as fault:
        return {
            "line": line,
            "fault": f"{fault.code} {fault.message}",
            "next_step": fault.next_step,
        }
    return {"line": line, "messages": _messages(row)}


def _messages(row: Row) -> list[dict[str, str]]:
    if row.text is not None:
        label = [] if row.label is None else [{"role": "label", "content": _text(row.label)}]
        return [{"role": "text", "content": cut(row.text, MOST_MESSAGE)}, *label]
    messages = [_message(message) for message in row.messages]
    if row.liked is not None:
        messages.append({"role": "rated", "content": "good" if row.liked else "bad"})
    for answers in row.others:
        messages.append({**_message(answers[-1]), "role": "rejected"})
    return messages


def _message(message: Mapping[str, Any]) -> dict[str, str]:
    calls = message.get("tool_calls")
    text = "\n".join(filter(None, (str(message.get("content") or ""), calls and _text(calls))))
    return {"role": str(message["role"]), "content": cut(text, MOST_MESSAGE)}


def data_settings(file: RowFile, choices: RowChoices) -> dict[str, Any]:
    """Returns the `data` settings of a run that trains on the rows."""
    return {
        "train": str(file.path),
        "format": choices.layout,
        "map": column_map(column_names(file), choices.columns),
        "validation_share": choices.validation_share,
        "train_on": choices.train_on,
        "long_rows": choices.long_rows,
    }


def column_names(file: RowFile) -> list[str]:
    """Returns the names of the columns that the first records have."""
    return list(dict.fromkeys(name for record in _first_records(file) for name in record))


def _first_records(file: RowFile) -> list[dict[str, Any]]:
    return [record for _, record in islice(_records_of(file), RECORDS_FOR_COLUMNS)]


def examine(
    file: RowFile,
    choices: RowChoices,
    objective: ObjectiveConfig,
    *,
    tokenizer: Any,
    capacity: Capacity,
) -> DataSet:
    """Reads and encodes the rows as a run would, and reports what is wrong with them."""
    settings = DataConfig.of(data_settings(file, choices))
    rules = RowRules(choices.length, capacity, kind=objective.rows, head=objective.head)
    return examine_closely(settings, rules, tokenizer)


def examine_job(run_file: Path, *, tokenizer: Any, capacity: Capacity) -> DataSet:
    """Reads and encodes the rows of a job as its run does."""
    config = RunConfig.of(read_yaml(run_file))
    objective = config.objective
    rules = RowRules(config.length, capacity, kind=objective.rows, head=objective.head)
    return examine_data(config.data, rules, tokenizer)


def describe_check(file: RowFile, data_set: DataSet, tokenizer: Any) -> dict[str, Any]:
    """Returns the report of `veneer data check`, each finding with some of its rows, and the first
    examples token by token."""
    report = data_set.report
    fatal = [problem for problem in report.problems if problem.fatal]
    wanted = {line for problem in report.problems for line in problem.lines[:SHOWN_EXCERPTS]}
    excerpts = _excerpts(file, wanted)
    plain = report.to_dict()
    plain["of_base"] = bool(fatal) and all(p.code in OF_BASE for p in fatal)
    plain["histogram"] = [{"up_to": longest, "rows": rows} for longest, rows in report.histogram]
    plain["problems"] = [_problem(file, problem, excerpts) for problem in report.problems]
    examples = list(islice(data_set.train, SHOWN_EXAMPLES))
    plain["samples"] = [
        {
            "line": example.ref.line,
            "kind": example.kind,
            "tokens": list(token_pieces(tokenizer, example)),
            "more": max(len(example.ids) - MOST_TOKENS, 0),
        }
        for example in examples
    ]
    return plain


def _problem(file: RowFile, problem: Problem, excerpts: Mapping[int, str]) -> dict[str, Any]:
    path = str(file.path)
    plain = problem.to_dict()
    return {
        **{
            name: value.replace(path, file.name) if isinstance(value, str) else value
            for name, value in plain.items()
        },
        "lines": list(problem.lines[:MOST_LINES]),
        "count": len(problem.lines),
        "rows": [
            {"line": line, "text": excerpts[line]}
            for line in problem.lines[:SHOWN_EXCERPTS]
            if line in excerpts
        ],
    }


def _excerpts(file: RowFile, lines: set[int]) -> dict[int, str]:
    """Returns the beginnings of the records on these lines."""
    if not lines:
        return {}
    last, excerpts = max(lines), {}
    for line, record in _records_of(file):
        if line > last:
            break
        if line in lines:
            excerpts[line] = cut(_text(record), MOST_EXCERPT)
    return excerpts


def token_pieces(tokenizer: Any, example: Example) -> Iterator[tuple[str, bool]]:
    """Yields each token's text and whether it is trained.

    Tokens that are a part of a character are joined with the next ones.
    """
    ids = example.ids[:MOST_TOKENS].tolist()
    trained = np.asarray(example.trained)
    done = start = 0
    for end in range(1, len(ids) + 1):
        # Decode from the start each time: some tokenizers drop the space before a piece.
        text = tokenizer.decode(
            ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            continue
        yield text[done:], bool(trained[start:end].any())
        done, start = len(text), end


def _records_of(file: RowFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the records that can be read."""
    return (record for record in iterate_records(file) if not isinstance(record, Problem))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
