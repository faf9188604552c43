"""What a library holds that nobody needs: old versions, objects that no name leads to, remains of
dead writers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from veneer.files.partial import PREFIX, lives
from veneer.library.objects import folder_bytes, stored_ids
from veneer.library.records import Record

REMAINS = (PREFIX, ".broken-", ".replaced-")


@dataclass(frozen=True)
class Leftovers:
    """What a collection removes: old versions, objects that no name leads to, and remains of dead
    writers."""

    versions: list[str]
    objects: list[str]
    remains: list[str]
    bytes: int


@dataclass(frozen=True)
class Collection:
    """left: what is told of it; changed: records with fewer versions; doomed: the paths that go."""

    left: Leftovers
    changed: dict[str, Record]
    doomed: list[Path]


def find_leftovers(
    library: Path, records: Mapping[str, Record], *, keep: int, alone: bool
) -> Collection:
    """Of every name the newest `keep` versions stay, and every version that bears a tag.

    alone: nobody else writes now, so that whatever is unfinished belongs to the dead.
    """
    old: list[str] = []
    needed: set[str] = set()
    changed: dict[str, Record] = {}
    for name, record in records.items():
        last = record.versions[-max(keep, 1) :]
        kept = [version for version in record.versions if version.tags or version in last]
        needed.update(version.object for version in kept)
        old += [f"{name}@{version.version}" for version in record.versions if version not in kept]
        if len(kept) < len(record.versions):
            changed[name] = record.model_copy(update={"versions": kept})
    objects = library / "objects"
    unneeded = [each for each in stored_ids(objects) if each not in needed]
    remains = [
        path
        for place in (library, objects, library / "names")
        for path in place.glob(".*")
        if path.name.startswith(REMAINS) and (alone or not lives(path.name))
    ]
    remains += list((library / "incoming").glob("*"))
    doomed = [objects / each for each in unneeded] + remains
    freed = sum(folder_bytes(path) if path.is_dir() else path.lstat().st_size for path in doomed)
    return Collection(
        Leftovers(old, unneeded, [path.name for path in remains], freed), changed, doomed
    )
