"""Recognises the layout of rows by their columns, and suggests renames where none fits."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import get_args

from veneer.data.examples import Format, Problem, Row, RowFault, RowKind
from veneer.errors import DataError
from veneer.wording import first_names

FORMATS: tuple[Format, ...] = get_args(Format)
NEEDS: dict[Format, tuple[str, ...]] = {
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
    "pairs": ("chosen", "rejected"),
    "openai_pairs": ("input", "preferred_output", "non_preferred_output"),
    "ranked": ("prompt", "ranked"),
    "ratings": ("prompt", "completion", "label"),
    "labels": ("text", "label"),
    "relevance": ("query", "document", "label"),
}
_ANSWERS: tuple[Format, ...] = ("chat", "sharegpt", "prompt_completion", "alpaca", "text")
_PAIRS: tuple[Format, ...] = ("pairs", "openai_pairs", "ranked")
FORMATS_OF: dict[RowKind, tuple[Format, ...]] = {
    "answers": _ANSWERS,
    "pairs": _PAIRS,
    "ratings": (*_PAIRS, "ratings"),
    "labels": ("labels", "relevance"),
    "any": (*_ANSWERS, *_PAIRS),
}
"""The layouts of each kind of rows."""
_SAME_ROWS: dict[Format, Format] = {
    "sharegpt": "chat",
    "prompt_completion": "chat",
    "alpaca": "chat",
    "openai_pairs": "pairs",
    "ranked": "pairs",
}
"""Layouts whose rows become the same as those of another."""
# Beside `text`, these columns describe its origin. Any other column may be what the user wants to
# train on (a label, an answer), and plain text would silently leave it out.
_METADATA = frozenset(
    """
    id uuid idx index source src url meta metadata title timestamp date created added dump
    file_path path author language lang language_score token_count num_tokens tokens score
    license split dataset subset unfinished
    """.split()
)
_PROMPT_LIKE = (
    "question",
    "query",
    "input",
    "instruction",
    "context",
    "sentence",
    "source",
    "user",
    "text",
)
_ANSWER_LIKE = (
    "answer",
    "response",
    "output",
    "target",
    "label",
    "category",
    "intent",
    "class",
    "summary",
    "ref",
)
LAYOUTS = "; ".join(f"{name} ({', '.join(NEEDS[name])})" for name in _ANSWERS)


@lru_cache(maxsize=4096)
def detect(columns: frozenset[str], kind: RowKind = "answers") -> Format:
    """Recognises the layout by a row's columns. Raises RowFault if none or more than one fits.

    kind: of the rows that are wanted. Pairs often hold other columns that look like answers.
    A text column loses to any other layout (tables often carry the rendered text along), and alone
    it counts only if every other column is known to describe the text's origin.
    """
    fitting = _fitting(columns, kind)
    shown = first_names(sorted(columns))
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise RowFault(
            "D107",
            f"columns {shown} fit {' and '.join(fitting)}",
            "Say which layout is meant: format: " + fitting[0],
        )
    if kind == "labels":
        raise _no_label(columns, shown)
    if "text" in columns:
        others = sorted(columns - _METADATA - {"text"})
        if not others:
            return "text"
        raise RowFault(
            "D107",
            f"columns {shown}: plain text would leave out {first_names(others)}",
            f"{_suggest_renames(columns)}, or train on the text alone with format: text"
            + (", or learn the labels with --objective classify" if "label" in columns else ""),
        )
    if kind in ("pairs", "ratings"):
        raise _no_preference(columns, kind, shown)
    if _fitting(columns, "pairs"):
        raise RowFault(
            "D117",
            f"columns {shown} are pairs of a good and a bad answer",
            _explain_preferences(columns),
        )
    if (partial := [name for name in _ANSWERS if not columns.isdisjoint(NEEDS[name])]) and len(
        partial
    ) == 1:
        missing = ", ".join(name for name in NEEDS[partial[0]] if name not in columns)
        renames = columns - set(NEEDS[partial[0]]) - _METADATA
        raise RowFault(
            "D107",
            f"columns {shown}: format {partial[0]} also needs {missing}, which is missing or empty"
            " in the row",
            (
                f"{_suggest_renames(columns)}. Layouts: {LAYOUTS}"
                if renames
                else "Fill it in, or leave such rows out."
            ),
        )
    raise RowFault(
        "D107",
        (
            f"columns {shown} are not recognised"
            if columns
            else "the row has no columns with values"
        ),
        f"{_suggest_renames(columns)}. Layouts: {LAYOUTS}",
    )


def _fitting(columns: frozenset[str], kind: RowKind) -> Sequence[Format]:
    """Returns the layouts that the columns fit, without plain text."""
    fitting = [
        name for name in FORMATS_OF[kind] if name != "text" and columns.issuperset(NEEDS[name])
    ]
    pairs = [name for name in fitting if name in _PAIRS]
    return pairs or fitting


def format_of(name: str, kind: RowKind) -> Format | None:
    """Returns the layout of this name, None for auto. Raises DataError if it is not of the kind."""
    if name == "auto":
        return None
    formats = FORMATS if kind == "any" else FORMATS_OF[kind]
    for format_name in formats:
        if format_name == name:
            return format_name
    known = f"format {name} does not hold {kind}" if name in FORMATS else f"unknown format '{name}'"
    raise DataError(known, next_step=f"Formats: auto, {', '.join(formats)}.")


def _no_preference(columns: frozenset[str], kind: RowKind, shown: str) -> RowFault:
    """Returns the fault of a row that an objective of preferences cannot learn from."""
    layouts = "; ".join(f"{name} ({', '.join(NEEDS[name])})" for name in FORMATS_OF[kind])
    answers = _fitting(columns, "answers")
    step = f"Layouts: {layouts}"
    if kind == "pairs" and columns.issuperset(NEEDS["ratings"]):
        step = "Rated answers train with --objective kto. " + step
    elif answers:
        step = "Train on answers with --objective answers. " + step
    named = f"are answers ({answers[0]}), and" if answers else "are not recognised:"
    wanted = "pairs of answers" if kind == "pairs" else "pairs or rated answers"
    return RowFault("D117", f"columns {shown} {named} the objective learns from {wanted}", step)


def _no_label(columns: frozenset[str], shown: str) -> RowFault:
    """Returns the fault of a row that an objective of labels cannot learn from."""
    layouts = "; ".join(f"{name} ({', '.join(NEEDS[name])})" for name in FORMATS_OF["labels"])
    label = next((name for name in ("label", *_ANSWER_LIKE) if name in columns), "COLUMN")
    text = next((n for n in ("text", *_PROMPT_LIKE) if n in columns and n != label), "COLUMN")
    pairs = [(text, "text"), (label, "label")]
    renames = " ".join(f"--map {old}={new}" for old, new in pairs if old != new)
    return RowFault(
        "D119",
        f"columns {shown}: the objective learns from texts with labels",
        f"Layouts: {layouts}" + (f". Rename columns: {renames}" if renames else ""),
    )


def _explain_preferences(columns: frozenset[str]) -> str:
    """Says how to train on preference pairs, or on their good answers alone."""
    pairs = "Train on both with --objective dpo (or ipo, orpo, kto)"
    if not columns.issuperset(NEEDS["pairs"]):
        return f"{pairs}."
    name = "completion" if "prompt" in columns else "messages"
    return f"{pairs}, or on the good answers only: --map chosen={name} --map rejected=null"


def _suggest_renames(columns: frozenset[str]) -> str:
    """Suggests which columns could be prompt and completion."""
    prompt, answer = likely_columns(columns)
    pairs = [(prompt, "prompt"), (answer, "completion")]
    steps = [
        f"'{old}' to 'prompt'" if new == "prompt" else f"'{old}' to 'completion'"
        for old, new in pairs
        if old
    ]
    if len(steps) < 2:
        instruction = (
            "Name the column with the question 'prompt' and the one with the answer 'completion'"
        )
        first, second = sorted(columns) if len(columns) == 2 else ("COLUMN", "COLUMN")
        return (
            f"{instruction}: in the file, or for instance by --map {first}=prompt"
            f" --map {second}=completion"
        )
    renamed = [step for step, (old, new) in zip(steps, pairs, strict=True) if old != new]
    return "To train on answers, rename column " + " and ".join(renamed)


def likely_columns(columns: frozenset[str]) -> tuple[str | None, str | None]:
    """Returns the columns that are probably the prompt and the completion, by their names."""
    answer = next((name for name in ("completion", *_ANSWER_LIKE) if name in columns), None)
    prompt = next(
        (name for name in ("prompt", *_PROMPT_LIKE) if name in columns and name != answer), None
    )
    if answer is not None and prompt is None and len(columns) == 2:
        (prompt,) = columns - {answer}
    return prompt, answer


class RowLayouts:
    """Counts the layouts of a set's rows and keeps their lines, eight bytes a row."""

    def __init__(self) -> None:
        self._lines: dict[Format, array[int]] = {}
        self._file = ""

    def add(self, row: Row) -> None:
        self._file = row.ref.file
        self._lines.setdefault(row.format, array("q")).append(row.ref.line)

    @property
    def counts(self) -> dict[str, int]:
        return {name: len(lines) for name, lines in self._lines.items()}

    def problems(self) -> list[Problem]:
        """Reports each layout if rows of several kinds are mixed, such as pairs and plain texts."""
        if same_rows(self._lines):
            return []
        step = "Put each layout into a file of its own."
        return [
            Problem("D108", self._file, f"{len(lines):,} rows are {name}", tuple(lines), step)
            for name, lines in self._lines.items()
        ]


def same_rows(layouts: Iterable[Format]) -> bool:
    """Says whether rows of these layouts become rows of one kind: conversations, pairs, rated
    answers, texts, labels or relevance."""
    return len({_SAME_ROWS.get(layout, layout) for layout in layouts}) <= 1
