"""Large sets: their tokens in files that are built once, and found again by what they are made of.

    <cache>/tokens/<name>/    train/ and validation/ (files/on_disk.py), set.json: the report, the
                              sets, a few held-out rows, MANIFEST.json: size and hash of each file,
                              checked whenever the set is found

The name is a hash over the content of the files of rows, the tokenizer, the chat template and what
it is told, and the settings that decide what is read, held out and learnt. Examples, their order
and the fingerprint are those of the same rows in memory (load.py). While it is built some 30 bytes
a row are held; later a few for the plan of an epoch.
"""

from __future__ import annotations

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

from veneer.adapters.preamble import NONE, Preamble
from veneer.data.checks.check import CheckReport, refuse
from veneer.data.checks.tally import Tally
from veneer.data.config import DataConfig
from veneer.data.examples import Capacity, Example, Problem, Row, RowRef
from veneer.data.files.on_disk import ExampleWriter, StoredExamples
from veneer.data.files.places import ResolvedSets
from veneer.data.files.unused import DESCRIPTION, lock_of, use
from veneer.data.load import DataSet, Kept, SetSize, load_data, read_data
from veneer.data.mixture import Mixture
from veneer.data.split import BY_COUNT
from veneer.data.template.template import ChatTemplate
from veneer.errors import DataError, VeneerError
from veneer.files.atomic import atomic_folder, verify_manifest, write_manifest
from veneer.files.cache import cache_folder
from veneer.files.hashes import file_hash
from veneer.files.lock import locked
from veneer.files.strict_json import read_json
from veneer.wording import size

LARGE_BYTES = 64 * 2**20
"""Of files of rows: what `tokens: auto` keeps in files from there on. In memory they take some ten
times as much."""
ROWS_KEPT = 64
"""Held-out rows that are kept as rows: one of them is answered at evaluations."""
EVERY_SECONDS = 15.0
_FORMAT = 4
_WAIT_SECONDS = 24 * 3600.0
"""For another process that builds the same."""
_NO_MATTER = {"tokens", "train", "validation"}

Say = Callable[[str], None]


def training_data(
    data: DataConfig,
    *,
    length: int,
    capacity: Capacity,
    tokenizer: Any,
    today: date | None = None,
    preamble: Preamble = NONE,
    held_out_by: str = BY_COUNT,
    resumes: bool = False,
    say: Say = lambda line: None,
) -> DataSet:
    """As load_data, the tokens in files where the set is large or `data.tokens` says so. say: gets
    lines for the screen."""
    asked: dict[str, Any] = {"length": length, "capacity": capacity, "preamble": preamble}
    asked |= {"held_out_by": held_out_by, "sets": ResolvedSets()}
    if not _in_files(data, asked["sets"]):
        return load_data(data, tokenizer=tokenizer, today=today, resumes=resumes, **asked)
    template = ChatTemplate(tokenizer, today=today, variables=preamble.variables)
    folder = tokens_folder() / _name(data, template, **asked)
    use(folder)  # so that nobody removes it while it is checked
    found = _found(folder)
    if found is None:
        found = _built(folder, data, template, say, **asked)
    else:
        say(f"tokens found in {folder}")
    refuse(found.report, data.called, resumes=resumes)
    return found


def tokens_folder() -> Path:
    """Where they are kept."""
    return cache_folder() / "tokens"


def _in_files(data: DataConfig, sets: ResolvedSets) -> bool:
    if data.tokens != "auto":
        return data.tokens == "files"
    total = 0
    for one in (*data.train_sets, *data.validation_sets):
        for place in sets.places_of(one.path):
            with suppress(OSError):  # whoever opens it says so
                total += place.path.stat().st_size
    return total >= LARGE_BYTES


def _name(
    data: DataConfig,
    template: ChatTemplate,
    *,
    length: int,
    capacity: Capacity,
    preamble: Preamble,
    held_out_by: str,
    sets: ResolvedSets,
) -> str:
    """What the tokens depend on, as a hash."""
    files = [
        [
            one.model_dump(),
            [
                [place.name, file_hash(place.path)]
                for place in sets.places_of(one.path)
                if place.path.is_file()
            ],
        ]
        for one in (*data.train_sets, None, *data.validation_sets)
        if one is not None
    ]
    tokenizer = template.tokenizer
    made_of = {
        "format": _FORMAT,
        "versions": [version(name) for name in ("veneer", "transformers", "tokenizers")],
        "sets": files,
        "held out": len(data.validation_sets),
        "held out by": held_out_by,
        "settings": data.model_dump(mode="json", exclude=_NO_MATTER),
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": template.source,
        "told": [preamble.system, dict(preamble.variables)],
        "day": template.today.isoformat() if template.writes_date else None,
        "length": length,
        "capacity": asdict(capacity),
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]


@dataclass
class _InFiles(Kept):
    """rows: the first few alone."""

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


def _built(
    folder: Path, data: DataConfig, template: ChatTemplate, say: Say, **asked: Any
) -> DataSet:
    """Builds the set, unless another process builds it first."""
    begun = time.monotonic()
    with locked(lock_of(folder), wait_seconds=_WAIT_SECONDS):
        if (found := _found(folder)) is not None:
            say(f"tokens found in {folder}")
            return found
        if folder.exists():
            say(f"tokens in {folder} are damaged")
        say(f"tokens of a large set are put into files once, in {folder}")
        _build(folder, data, template, say, **asked)
        found = _found(folder)
        assert found is not None
        say(f"built in {time.monotonic() - begun:.0f} s")
        return found


def _build(folder: Path, data: DataConfig, template: ChatTemplate, say: Say, **asked: Any) -> None:
    begun = told = time.monotonic()

    def progress(rows: int) -> None:
        nonlocal told
        if (now := time.monotonic()) - told >= EVERY_SECONDS:
            told = now
            say(f"{rows:,} rows so far, {rows / (now - begun):,.0f} a second")

    with atomic_folder(folder, replace=True) as partial:
        kept, held = (_InFiles.into(partial / name, template) for name in ("train", "validation"))
        made = read_data(data, template, kept, held, say=progress, **asked)
        (partial / DESCRIPTION).write_text(json.dumps(_as_json(made)), encoding="utf-8")
        if _name(data, template, **asked) != folder.name:
            raise DataError(
                f"the rows of {data.called} changed while they were read",
                next_step="Start again when nothing writes to them.",
            )
        write_manifest(partial)


def _as_json(made: DataSet) -> dict[str, Any]:
    report = {
        **vars(made.report),
        "problems": [asdict(problem) for problem in made.report.problems],
    }
    return {
        "report": report,
        "fingerprint": made.fingerprint,
        "preamble": [made.preamble.system, dict(made.preamble.variables)],
        "mixture": None if made.mixture is None else [made.mixture.sizes, made.mixture.draws],
        "sets": [asdict(each) for each in made.sets],
        "held": [asdict(each) for each in made.held],
        "rows": [asdict(row) for row in made.validation_rows],
    }


def _found(folder: Path) -> DataSet | None:
    """The set that was built there. Returns None if there is none, or if any of its files is
    damaged."""
    try:
        return None if verify_manifest(folder) else _read(folder)
    except (VeneerError, OSError, LookupError, TypeError, ValueError):
        return None


def _read(folder: Path) -> DataSet:
    """The set in this folder. A file that does not hold what its name says raises an error of
    Python's own."""
    kept = read_json(folder / DESCRIPTION, max_bytes=2**32)
    train, validation = (StoredExamples(folder / name) for name in ("train", "validation"))
    report = kept["report"]
    problems = [Problem(**{**each, "lines": tuple(each["lines"])}) for each in report["problems"]]
    histogram = [tuple(each) for each in report["histogram"]]
    mixture = kept["mixture"]
    return DataSet(
        train,
        validation,
        [],
        [
            Row(**{**row, "ref": RowRef(**row["ref"]), "references": tuple(row["references"])})
            for row in kept["rows"]
        ],
        CheckReport(**{**report, "problems": problems, "histogram": histogram}),
        kept["fingerprint"],
        Preamble(kept["preamble"][0], kept["preamble"][1]),
        None if mixture is None else Mixture(tuple(mixture[0]), tuple(mixture[1])),
        [SetSize(**each) for each in kept["sets"]],
        [SetSize(**each) for each in kept["held"]],
        in_files=(
            f"tokens in files: {len(train) + len(validation):,} examples, {size(_bytes(folder))}"
        ),
    )


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
