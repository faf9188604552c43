"""Keeps the tokens of large data sets in files, which are built once and reused.

<cache>/tokens/<name>/    train/ and validation/ (files/on_disk.py), set.json: the report, the
                          sets, a few held-out rows, MANIFEST.json: size and hash of each file,
                          checked whenever the set is loaded

The name is a hash over the content of the row files, the tokenizer, the chat template with its
variables, and the settings that decide what is read, held out and trained on. Examples, their order
and the fingerprint equal those of the same rows in memory (load.py). Building holds about 30 bytes
a row in memory; a run holds a few bytes a row for the plan of an epoch.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from veneer.adapters.preamble import Preamble
from veneer.data.checks.check import CheckReport, refuse
from veneer.data.checks.tally import Tally
from veneer.data.collector import ExampleCollector, SetSize
from veneer.data.config import DataConfig
from veneer.data.encoder import RowRules
from veneer.data.examples import Example, Problem, Row, RowRef
from veneer.data.files.on_disk import ExampleWriter, StoredExamples
from veneer.data.files.places import ResolvedSets
from veneer.data.files.unused import DESCRIPTION, lock_of, use
from veneer.data.load import DataSet, load_data, read_data
from veneer.data.mixture import Mixture
from veneer.data.template.template import ChatTemplate
from veneer.errors import ConfigError, DataError, VeneerError
from veneer.files.atomic import atomic_folder, verify_manifest, write_manifest
from veneer.files.cache import cache_folder
from veneer.files.hashes import file_hash
from veneer.files.lock import locked
from veneer.files.strict_json import read_json
from veneer.wording import size

LARGE_BYTES = 64 * 2**20
"""Size of row files from which `tokens: auto` keeps tokens in files. In memory they take about ten
times as much."""
ROWS_KEPT = 64
"""Held-out rows that are also stored as rows: evaluations generate an answer to one of them."""
EVERY_SECONDS = 15.0
_FORMAT = 4
_WAIT_SECONDS = 24 * 3600.0
"""How long to wait for another process that builds the same set."""
_IRRELEVANT_SETTINGS = {"tokens", "train", "validation"}

Say = Callable[[str], None]


def training_data(
    data: DataConfig,
    rules: RowRules,
    tokenizer: Any,
    *,
    today: date | None = None,
    resumes: bool = False,
    say: Say = lambda line: None,
) -> DataSet:
    """Loads a run's data like load_data; tokens of large sets of answers are kept in files.

    `data.tokens` can force either. say: receives lines for the screen.
    """
    can_be_stored = rules.kind == "answers" and rules.teacher is None
    if not can_be_stored and data.tokens == "files":
        rows = rules.kind if rules.teacher is None else "a teacher"
        raise ConfigError(
            f"tokens of {rows} cannot be kept in files", next_step="Set data.tokens to memory."
        )
    if not can_be_stored or not _uses_files(data, rules.sets):
        return load_data(data, rules, tokenizer, today=today, resumes=resumes)
    template = ChatTemplate(tokenizer, today=today, variables=rules.preamble.variables)
    folder = tokens_folder() / _set_name(data, rules, template)
    use(folder)  # protects it from removal while it is checked
    data_set = _load_if_valid(folder)
    if data_set is None:
        data_set = _load_or_build(folder, data, rules, template, say)
    else:
        say(f"tokens found in {folder}")
    refuse(data_set.report, data.called, resumes=resumes)
    return data_set


def tokens_folder() -> Path:
    """Returns the folder that holds tokens of large sets."""
    return cache_folder() / "tokens"


def _uses_files(data: DataConfig, sets: ResolvedSets) -> bool:
    if data.tokens != "auto":
        return data.tokens == "files"
    total = 0
    for data_set in (*data.train_sets, *data.validation_sets):
        for row_file in sets.find_files(data_set.path):
            with suppress(OSError):  # opening it reports the error
                total += row_file.path.stat().st_size
    return total >= LARGE_BYTES


def _set_name(data: DataConfig, rules: RowRules, template: ChatTemplate) -> str:
    """Hashes everything that the tokens depend on."""
    files = [
        [
            data_set.model_dump(),
            [
                [row_file.name, file_hash(row_file.path)]
                for row_file in rules.sets.find_files(data_set.path)
                if row_file.path.is_file()
            ],
        ]
        for data_set in (*data.train_sets, None, *data.validation_sets)
        if data_set is not None
    ]
    tokenizer = template.tokenizer
    made_of = {
        "format": _FORMAT,
        "versions": [version(name) for name in ("veneer", "transformers", "tokenizers")],
        "sets": files,
        "held out": len(data.validation_sets),
        "held out by": rules.held_out_by,
        "settings": data.model_dump(mode="json", exclude=_IRRELEVANT_SETTINGS),
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": template.source,
        "told": [rules.preamble.system, dict(rules.preamble.variables)],
        "day": template.today.isoformat() if template.writes_date else None,
        "length": rules.length,
        "capacity": asdict(rules.capacity),
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]


@dataclass
class _FileCollector(ExampleCollector):
    """Collects examples in files; `rows` holds only the first few."""

    writer: ExampleWriter = field(kw_only=True)
    folder: Path = field(kw_only=True)

    @classmethod
    def into(cls, folder: Path, template: ChatTemplate) -> Self:
        folder.mkdir()
        return cls(Tally(frozenset(template.stop_ids)), writer=ExampleWriter(folder), folder=folder)

    def keep(self, parts: Sequence[tuple[Row, Example]]) -> None:
        self.writer.add([example for _, example in parts])
        if len(self.rows) < ROWS_KEPT:
            self.rows += [row for row, _ in parts]

    def close(self) -> Sequence[Example]:
        self.writer.close()
        return StoredExamples(self.folder)


def _load_or_build(
    folder: Path, data: DataConfig, rules: RowRules, template: ChatTemplate, say: Say
) -> DataSet:
    """Builds the set, unless another process builds it first."""
    started = time.monotonic()
    with locked(lock_of(folder), wait_seconds=_WAIT_SECONDS):
        if (data_set := _load_if_valid(folder)) is not None:
            say(f"tokens found in {folder}")
            return data_set
        if folder.exists():
            say(f"tokens in {folder} are damaged")
        say(f"tokens of a large set are put into files once, in {folder}")
        _build(folder, data, rules, template, say)
        data_set = _load_if_valid(folder)
        assert data_set is not None
        say(f"built in {time.monotonic() - started:.0f} s")
        return data_set


def _build(
    folder: Path, data: DataConfig, rules: RowRules, template: ChatTemplate, say: Say
) -> None:
    started = last_message = time.monotonic()

    def progress(rows: int) -> None:
        nonlocal last_message
        if (now := time.monotonic()) - last_message >= EVERY_SECONDS:
            last_message = now
            say(f"{rows:,} rows so far, {rows / (now - started):,.0f} a second")

    with atomic_folder(folder, replace=True) as partial:
        training, validation = (
            _FileCollector.into(partial / name, template) for name in ("train", "validation")
        )
        data_set = read_data(data, rules, template, training, validation, say=progress)
        (partial / DESCRIPTION).write_text(json.dumps(_as_json(data_set)), encoding="utf-8")
        if _set_name(data, rules, template) != folder.name:
            raise DataError(
                f"the rows of {data.called} changed while they were read",
                next_step="Start again when nothing writes to them.",
            )
        write_manifest(partial)


def _as_json(data_set: DataSet) -> dict[str, Any]:
    report = {
        **vars(data_set.report),
        "problems": [asdict(problem) for problem in data_set.report.problems],
    }
    return {
        "report": report,
        "fingerprint": data_set.fingerprint,
        "preamble": [data_set.preamble.system, dict(data_set.preamble.variables)],
        "mixture": None
        if data_set.mixture is None
        else [data_set.mixture.sizes, data_set.mixture.draws],
        "sets": [asdict(set_size) for set_size in data_set.sets],
        "held": [asdict(set_size) for set_size in data_set.held],
        "rows": [asdict(row) for row in data_set.validation_rows],
    }


def _load_if_valid(folder: Path) -> DataSet | None:
    """Loads the set in this folder. Returns None if there is none or a file is damaged."""
    try:
        return None if verify_manifest(folder) else _read(folder)
    except (VeneerError, OSError, LookupError, TypeError, ValueError):
        return None


def _read(folder: Path) -> DataSet:
    """Loads the set in this folder. Python's own errors report files with unexpected content."""
    description = read_json(folder / DESCRIPTION, max_bytes=2**32)
    train, validation = (StoredExamples(folder / name) for name in ("train", "validation"))
    report = description["report"]
    problems = [
        Problem(**{**problem, "lines": tuple(problem["lines"])}) for problem in report["problems"]
    ]
    histogram = [tuple(cell) for cell in report["histogram"]]
    mixture = description["mixture"]
    return DataSet(
        train,
        validation,
        [],
        [
            Row(
                **{
                    **row,
                    "ref": RowRef(**row["ref"]),
                    "references": tuple(row["references"]),
                    "others": tuple(row["others"]),
                }
            )
            for row in description["rows"]
        ],
        CheckReport(**{**report, "problems": problems, "histogram": histogram}),
        description["fingerprint"],
        Preamble(description["preamble"][0], description["preamble"][1]),
        None if mixture is None else Mixture(tuple(mixture[0]), tuple(mixture[1])),
        [SetSize(**size) for size in description["sets"]],
        [SetSize(**size) for size in description["held"]],
        in_files=(
            f"tokens in files: {len(train) + len(validation):,} examples, {size(_bytes(folder))}"
        ),
    )


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
