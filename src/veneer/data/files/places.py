"""From what a set is called to files on this machine: a file, a folder, a pattern, an address, a
data set of the hub.

    rows.jsonl   rows/   rows/*.jsonl.gz            here
    s3://bucket/rows/*.parquet                      any address that fsspec knows
    org/name   org/name:split   hf://datasets/...   the hub's: plain Parquet, by the same way

Remote files are downloaded into the cache folder (downloads.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from veneer.data.files.downloads import downloaded, unreachable
from veneer.errors import DataError
from veneer.files.addresses import file_system
from veneer.files.home import expanded
from veneer.files.nesting import is_text

KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
PACKED = (".gz", ".zst")
MOST_FILES = 100_000
_ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+(/[\w.-]+)?)?")
_T = TypeVar("_T")
_CONVERTED = "@refs/convert/parquet"
"""The branch on which the hub keeps every data set as plain Parquet."""


@dataclass(frozen=True)
class Place:
    """A file of rows: what it is called, and where it lies here."""

    name: str
    path: Path


@dataclass(frozen=True)
class ResolvedSets:
    """Finds the files of each set of a run once: every pass over the set reads the same files, of
    one version."""

    _places: dict[str, list[Place]] = field(default_factory=dict)

    def places_of(self, named: str) -> list[Place]:
        """Returns what `places_of` finds, once per set. Raises what `places_of` raises."""
        if named not in self._places:
            self._places[named] = places_of(named)
        return self._places[named]


def kind_of(name: str) -> str:
    """The extension that says how a file is read; empty: none of KINDS."""
    bare = Path(name)
    if bare.suffix.lower() in PACKED:
        bare = bare.with_suffix("")
    kind = bare.suffix.lower()
    return kind if kind in KINDS else ""


def places_of(named: str) -> list[Place]:
    """All files of a set, in order. Raises DataError: there are none, or they cannot be brought
    here; ConfigError: no address that is known.

    A single file is taken at its word: whoever opens it says what is wrong.
    """
    if not named.strip() or "\0" in named:
        raise DataError(
            f"no set of rows is called {named!r}",
            next_step="Name a file, a folder, a pattern or an address.",
        )
    if "://" in named:
        return _elsewhere(named)
    try:
        return _here(named, expanded(named))
    except (
        OSError,
        ValueError,
    ) as fault:  # no right to look, a name that none can be, ** beside other letters
        raise unreachable(named, fault) from fault


def refuse_missing(names: Sequence[str]) -> None:
    """DataError with each of these that is the name of a file which is not there; others are looked
    for later."""
    missing = [named for named in names if "://" not in named and _absent(named)]
    if missing:
        faults = [_missing(named, expanded(named)) for named in missing]
        raise DataError(
            "there is no such file" if len(faults) == 1 else "there are no such files",
            [f"D100 {fault}" for fault in faults],
            "A set is a file, a folder, a pattern such as rows/*.jsonl, an address, or a hub's data"
            " set (org/name).",
        )


def absolute(named: str) -> str:
    """What a set is called from any folder."""
    if "://" in named:
        return named
    path = expanded(named)
    here = path.exists() or any(mark in named for mark in "*?[") or kind_of(named)
    return str(path.absolute()) if here else named


def _absent(named: str) -> bool:
    if not is_text(named):  # told as what it is, elsewhere
        return False
    try:
        path = expanded(named)
        there = path.exists() or any(mark in named for mark in "*?[")
        return bool(named.strip()) and not there and not _may_be_the_hubs(named, path)
    except (OSError, ValueError):  # told where it is opened
        return False


def _may_be_the_hubs(named: str, path: Path) -> bool:
    return bool(_ON_THE_HUB.fullmatch(named)) and not kind_of(named) and not path.parent.is_dir()


def _missing(named: str, path: Path) -> str:
    """The file, and what is spelt like it; or that its folder is not there either."""
    if not path.parent.is_dir():
        return f"{named}  its folder {path.parent} does not exist either"
    near = get_close_matches(path.name, [each.name for each in path.parent.iterdir()], n=1)
    return f"{named}" + (f"  did you mean {path.parent / near[0]}?" if near else "")


def _here(named: str, path: Path) -> list[Place]:
    if path.is_dir():
        found = sorted(each for each in path.rglob("*") if each.is_file() and kind_of(each.name))
        return _some([Place(str(each), each) for each in found], named)
    if path.exists():
        return [Place(named, path)]
    if any(mark in named for mark in "*?["):
        root = Path(path.anchor or ".")
        found = sorted(
            each for each in root.glob(str(path.relative_to(path.anchor))) if each.is_file()
        )
        found = [each for each in found if kind_of(each.name)]
        return _some([Place(str(each), each) for each in found], named)
    if _may_be_the_hubs(named, path):
        return _of_the_hub(named)
    refuse_missing([named])
    return [Place(named, path)]


def _some(places: list[_T], named: str) -> list[_T]:
    if not places:
        raise DataError(
            f"{named}: no file of rows is there",
            next_step=f"Kinds of file: {', '.join(KINDS)}, .gz, .zst.",
        )
    if len(places) > MOST_FILES:
        raise DataError(
            f"{named}: {len(places):,} files, {MOST_FILES:,} are read", next_step="Name fewer."
        )
    return places


def _of_the_hub(named: str) -> list[Place]:
    """org/name, org/name:split, org/name:config/split."""
    name, _, part = named.partition(":")
    address = f"hf://datasets/{name}{_CONVERTED}"
    fs, root = file_system(address)
    found = _listed(fs, f"{root}/**/*.parquet", named)
    parts: dict[tuple[str, str], list[str]] = {}
    for file in found:
        config, _, within = file.removeprefix(root).strip("/").partition("/")
        split, below, _ = within.partition("/")
        if not below:  # no part of it: beside them
            continue
        parts.setdefault((config, split.removeprefix("partial-")), []).append(file)
    configs = sorted({config for config, _ in parts})
    config, _, split = part.rpartition("/")
    config = config or (
        "default" if "default" in configs else configs[0] if len(configs) == 1 else ""
    )
    chosen = parts.get((config, split or "train"))
    if not chosen:
        there = ", ".join(f"{c}/{s}" for c, s in sorted(parts)) or "none"
        raise DataError(
            (
                f"the data set {name} has no {part or 'train'}"
                if config
                else f"the data set {name} has several parts"
            ),
            [f"there is: {there}"],
            f"Name one: {name}:{'/'.join(sorted(parts)[0]) if parts else 'SPLIT'}.",
        )
    return [
        Place(f"hf://{file}", downloaded(fs, file, f"hf://{file}"))
        for file in _some(sorted(chosen), named)
    ]


def _elsewhere(named: str) -> list[Place]:
    scheme = named.partition("://")[0]
    fs, root = file_system(named)
    if any(mark in root for mark in "*?["):
        found = _listed(fs, root, named)
    elif kind_of(root):
        found = [root]
    elif (
        scheme == "hf" and root.startswith("datasets/") and root.count("/") == 2 and "@" not in root
    ):
        return _of_the_hub(root.removeprefix("datasets/"))
    else:
        found = _listed(fs, f"{root.rstrip('/')}/**", named)
    files = _some([file for file in found if kind_of(file)], named)
    names = [file if "://" in file else f"{scheme}://{file}" for file in files]
    return [
        Place(name, downloaded(fs, file, name)) for name, file in zip(names, files, strict=True)
    ]


def _listed(fs: Any, pattern: str, named: str) -> list[str]:
    try:
        return sorted(str(each) for each in fs.glob(pattern))
    except Exception as fault:  # every store raises errors of its own
        raise unreachable(named, fault) from fault
