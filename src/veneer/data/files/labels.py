"""Rows of texts with labels, and of queries and documents with their relevance.

labels     text, label: a name or a whole number; a list of them (several labels, possibly none); a
           number (regression)
relevance  query, document, label: 0 or 1, true or false, or a number between (rerank)

A text is tokenised as it is, without a chat template. A query and its document become one text in
PAIR_TEXT, the query first, so that the documents of a query share its tokens. What a label means
depends on the head that is trained (adapters/labels.py). Knows nothing of tokens or losses.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from decimal import Decimal
from typing import Any

from veneer.adapters.labels import MOST_LABELS, HeadSettings
from veneer.data.examples import Format, Problem, Row, RowFault, RowRef
from veneer.data.files import preferences
from veneer.data.files.formats import check_values, require_columns, to_row
from veneer.data.files.json_text import whole_value

PAIR_TEXT = "Query: {query}\nDocument: {document}"
_BOOLEANS = {"true": 1.0, "false": 0.0}
_SHOWN = 40


def make_row(record: dict[str, Any], ref: RowRef, format: Format) -> Row:
    """Converts the record of any layout to a Row. Raises RowFault with the first fault in it."""
    if format not in ("labels", "relevance"):
        return preferences.make_row(record, ref, format)
    require_columns(record, format)
    text, query = (record["text"], None) if format == "labels" else (None, record["query"])
    if format == "relevance":
        for name in ("query", "document"):
            if not isinstance(record[name], str):
                raise RowFault("D109", f"'{name}' is not a string")
        text = pair_text(record["query"], record["document"])
    row = to_row({**record, "text": text}, ref, "text")
    label = float(record["label"]) if isinstance(record["label"], Decimal) else record["label"]
    check_values(label)
    return replace(row, format=format, label=label, query=query, unfinished=False)


def pair_text(query: str, document: str) -> str:
    """Returns the text that a head reads for a query and one of its documents."""
    return PAIR_TEXT.format(query=query, document=document)


def label_reader(head: HeadSettings) -> Callable[[Any], tuple[float, ...]]:
    """Returns a function that turns a row's label into the targets of the head's outputs.

    One label: its number; several labels: 1 or 0 for each; else the number itself. The function
    raises RowFault for a label that the head does not have.
    """
    numbers = {name: number for number, name in enumerate(head.labels)}

    def number_of(label: Any) -> int:
        name = label_name(label)
        if name not in numbers:
            raise RowFault(
                "D119",
                f"label {name[:_SHOWN]!r} is not one of the {len(numbers):,} labels",
                "Correct the row, or list all labels: objective.labels.",
            )
        return numbers[name]

    def read(label: Any) -> tuple[float, ...]:
        match head.kind:
            case "label":
                return (float(number_of(label)),)
            case "labels":
                own = {number_of(name) for name in label_list(label)}
                return tuple(float(number in own) for number in range(len(numbers)))
            case "regression":
                return (_number(label, "a finite number", -math.inf, math.inf),)
            case _:
                return (_number(label, "a number from 0 to 1", 0.0, 1.0),)

    return read


def label_name(label: Any) -> str:
    """Returns the name of a label. Raises RowFault if it is neither a text nor a whole number."""
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, int):
        return str(label)
    if isinstance(label, str) and label.strip():
        return label.strip()
    raise RowFault(
        "D119",
        f"'label' is {str(label)[:_SHOWN]!r}, and kind label learns names or whole numbers",
        "Lists train with kind labels, other numbers with kind regression.",
    )


def label_list(label: Any) -> list[Any]:
    """Returns the labels of a row. A .csv holds the list as JSON. Raises RowFault if it is none."""
    value = label
    if isinstance(label, str):
        with suppress(RowFault):
            value = whole_value(label)
    if isinstance(value, list):
        return value
    raise RowFault(
        "D119",
        f"'label' is {str(label)[:_SHOWN]!r}, and kind labels learns lists of names",
        'A single label per row trains with kind label; write a list otherwise: ["a", "b"].',
    )


def _number(label: Any, wanted: str, least: float, most: float) -> float:
    value = _BOOLEANS.get(label.strip().lower(), label) if isinstance(label, str) else label
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and least <= number <= most):
        raise RowFault("D119", f"'label' is {str(label)[:_SHOWN]!r}, not {wanted}")
    return number


def with_labels(head: HeadSettings, rows: Iterable[Row]) -> HeadSettings:
    """Returns the head with the labels of the rows, sorted: whole numbers by value, else by name.

    Labels that are set stay. Rows with an unusable label are skipped: encoding them reports the
    fault. At most MOST_LABELS + 1 labels are collected.
    """
    if head.labels or not head.names_outputs:
        return head
    names: set[str] = set()
    for row in rows:
        with suppress(RowFault):
            own = label_list(row.label) if head.kind == "labels" else [row.label]
            names |= {label_name(label) for label in own}
        if len(names) > MOST_LABELS:
            break
    whole = all(name.removeprefix("-").isdecimal() for name in names)
    ordered = sorted(names)  # a fixed order of names with the same value, such as 1 and 01
    if whole:
        ordered.sort(key=int)
    return replace(head, labels=tuple(ordered))


def label_problems(head: HeadSettings | None, file: str) -> list[Problem]:
    """Reports too few or too many labels. file: name of the whole set"""
    if head is None or not head.names_outputs:
        return []
    least = 2 if head.kind == "label" else 1
    if least <= len(head.labels) <= MOST_LABELS:
        return []
    count = f"more than {MOST_LABELS:,}" if head.labels[MOST_LABELS:] else f"{len(head.labels)}"
    message = f"the rows have {count} labels: at least {least}, at most {MOST_LABELS:,}"
    step = "Name the column that holds the labels: --map COLUMN=label."
    return [Problem("D119", file, message, next_step=step)]
