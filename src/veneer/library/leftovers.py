"""Finds what a library no longer needs: old versions, objects without a name, unfinished files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from veneer.files.partial import PREFIX, is_alive
from veneer.library.objects import folder_bytes, stored_ids
from veneer.library.prompts import FOLDER as PROMPTS
from veneer.library.records import Record

REMAINS = (PREFIX, ".broken-", ".replaced-")


@dataclass(frozen=True)
class Leftovers:
    """Lists what a collection removes: old versions, objects without a name, unfinished files."""

    versions: list[str]
    objects: list[str]
    remains: list[str]
    bytes: int


@dataclass(frozen=True)
class Collection:
    """Plans a collection. left: its report; changed: records with fewer versions; doomed: paths to
    remove."""

    left: Leftovers
    changed: dict[str, Record]
    doomed: list[Path]


def find_leftovers(
    library: Path, records: Mapping[str, Record], *, keep: int, alone: bool
) -> Collection:
    """Plans a collection that keeps the newest `keep` versions of every name and all tagged ones.

    alone: no other process writes now, so every unfinished file is abandoned.
    """
    old: list[str] = []
    needed: set[str] = set()
    changed: dict[str, Record] = {}
    for name, record in records.items():
        newest = record.versions[-max(keep, 1) :]
        kept = [version for version in record.versions if version.tags or version in newest]
        needed.update(version.object for version in kept)
        old += [f"{name}@{version.version}" for version in record.versions if version not in kept]
        if len(kept) < len(record.versions):
            changed[name] = record.model_copy(update={"versions": kept})
    objects = library / "objects"
    unneeded = [object_id for object_id in stored_ids(objects) if object_id not in needed]
    remains = [
        path
        for folder in (library, objects, library / "names", library / PROMPTS)
        for path in folder.glob(".*")
        if path.name.startswith(REMAINS) and (alone or not is_alive(path.name))
    ]
    remains += list((library / "incoming").glob("*"))
    prompts = [path for path in (library / PROMPTS).glob("*.json") if path.stem not in needed]
    doomed = [*(objects / object_id for object_id in unneeded), *prompts, *remains]
    freed = sum(folder_bytes(path) if path.is_dir() else path.lstat().st_size for path in doomed)
    return Collection(
        Leftovers(old, unneeded, [path.name for path in remains], freed), changed, doomed
    )
