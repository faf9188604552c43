"""Divides rows into three parts by content: to train on, to search with, and to judge with.

Rows with the same prompt, and rows whose prompts are nearly the same, stay in one part. So does a
conversation with rows that are its beginning. So no part is easier because the model has seen its
prompts. The division depends on the rows' content alone.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from veneer.data.checks.closer import LIKE, prompt_text
from veneer.data.checks.near import COMMON, DisjointSets, similar_groups, words_of
from veneer.data.examples import Row, prompt_key
from veneer.data.files.writing import record_of
from veneer.data.split import part_of, parts_of_shares
from veneer.errors import DataError
from veneer.files.atomic import write_text

SHARE = 0.15
"""Share of the rows to search with, and of those to judge with."""
LEAST_PART = 8
MOST_SEARCH, MOST_JUDGE = 100, 300
"""Most rows of these parts: more would take time, and narrow an interval little."""
LEAST_ROWS = 40
LARGEST_GROUP = 0.2
"""Largest share of rows in a group of similar prompts. Above it, similarity says nothing here, and
only equal prompts stay together."""


@dataclass(frozen=True)
class RowParts:
    """The parts. by_likeness: similar prompts stay together, not only equal ones. judge_groups:
    number of groups of rows that stay together, in the part to judge with. judge_prompts: number
    of different prompts there."""

    train: list[Row]
    search: list[Row]
    judge: list[Row]
    by_likeness: bool
    judge_groups: int
    judge_prompts: int

    def line(self, problems: int) -> str:
        """Describes the parts. problems: number of notes of the check"""
        total = len(self.train) + len(self.search) + len(self.judge)
        notes = f" · {problems} note{'' if problems == 1 else 's'}: veneer data check"
        alike = "" if self.by_likeness else " · many prompts are alike, and may be in several parts"
        return (
            f"{total:,} rows, {len(self.train):,} to train on, {len(self.search):,} to search"
            f" with, {len(self.judge):,} to judge with{alike}{notes if problems else ''}"
        )


@dataclass(frozen=True)
class PartFiles:
    train: Path
    search: Path
    judge: Path


def divide(rows: Sequence[Row], name: str) -> RowParts:
    """Divides the rows of a set. name: of the set, for errors. Raises DataError for few rows."""
    if len(rows) < LEAST_ROWS:
        raise _too_small(name, f"it has {len(rows)} rows, and {LEAST_ROWS} are needed")
    keys, by_likeness = _group_keys(rows)
    shares = [_share(len(rows), most) for most in (MOST_JUDGE, MOST_SEARCH)]
    groups = parts_of_shares(keys, shares)
    parts: list[list[Row]] = [[], [], []]
    for row, key in zip(rows, keys, strict=True):
        parts[part_of(key, groups)].append(row)
    if min(map(len, parts)) < LEAST_PART:
        raise _too_small(
            name,
            f"it has {len(rows)} rows of {len(set(keys))} different prompts, and each part needs"
            f" {LEAST_PART} rows",
        )
    train, judge, search = parts
    judge_groups = len({key for key in keys if part_of(key, groups) == 1})
    judge_prompts = len(set(map(prompt_key, judge)))
    return RowParts(train, search, judge, by_likeness, judge_groups, judge_prompts)


def _share(rows: int, most: int) -> float:
    return min(max(SHARE, LEAST_PART / rows), most / rows)


def _too_small(name: str, fault: str) -> DataError:
    return DataError(
        f"{name} is too small to train, search and judge on different rows",
        [fault],
        "Collect more rows. Or train one adapter and judge it yourself: veneer train.",
    )


def _group_keys(rows: Sequence[Row]) -> tuple[list[int], bool]:
    """Returns a key for each row, equal within a group, and whether groups join similar prompts.

    The key is the smallest prompt key of the group, so the order of the rows does not matter.
    """
    prompts = {prompt_key(row): row for row in rows}
    keys = sorted(prompts)
    numbers = similar_groups([prompt_text(prompts[key]) for key in keys], least=LIKE)
    numbers = _join_by_turns([prompts[key] for key in keys], numbers)
    smallest = {key: keys[number] for key, number in zip(keys, numbers, strict=True)}
    own = [prompt_key(row) for row in rows]
    grouped = [smallest[key] for key in own]
    largest = max(Counter(grouped).values())
    if largest > max(LARGEST_GROUP * len(rows), max(Counter(own).values())):
        return own, False
    return grouped, True


def _join_by_turns(rows: Sequence[Row], groups: Sequence[int]) -> list[int]:
    """Joins groups of rows that answer the same words in any turn.

    Turns of more than COMMON of the rows, such as a greeting, do not count. groups: for each row
    the number of the first row of its group, as in the result.
    """
    joined = DisjointSets(groups)
    rows_by_turn: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        for turn in set(_turns(row)):
            rows_by_turn.setdefault(turn, []).append(number)
    for numbers in rows_by_turn.values():
        if len(numbers) <= max(2.0, COMMON * len(rows)):
            joined.join(numbers)
    return joined.names()


def _turns(row: Row) -> list[int]:
    """Returns a hash of all words before each answer of a row, or of a plain text."""
    if row.text is not None:
        words = words_of(row.text)
        return [hash(tuple(words))] if words else []
    turns, turn, has_words = list[int](), 0, False
    for message in row.messages:
        if message["role"] == "assistant" and has_words:
            turns.append(turn)
        words = words_of(str(message.get("content") or ""))
        has_words = has_words or bool(words)
        turn = hash((turn, message["role"], *words))
    return turns


def write_parts(folder: Path, parts: RowParts) -> PartFiles:
    """Writes train.jsonl, search.jsonl and judge.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    files = PartFiles(*(folder / f"{name}.jsonl" for name in ("train", "search", "judge")))
    for file, rows in (
        (files.train, parts.train),
        (files.search, parts.search),
        (files.judge, parts.judge),
    ):
        lines = (json.dumps(record_of(row), ensure_ascii=False) + "\n" for row in rows)
        write_text(file, "".join(lines), replace=True)
    return files
