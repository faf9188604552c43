"""Remembers which names of the library hold adapters of a store's jobs.

    published.json    the object of the newest version that a job published, by name

Whoever may train may add versions to these names, and not replace an adapter that an operator has
added by hand. An object identifies an adapter's files, so a name whose newest version is of another
hand is not such a name any more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from veneer.files.atomic import write_text
from veneer.files.lock import locked
from veneer.files.strict_json import json_text, read_json
from veneer.library.entry import Entry
from veneer.library.library import Library

PUBLISHED = "published.json"
LOCK_SECONDS = 5.0


def note_published(store_folder: Path, entry: Entry) -> None:
    """Remembers that a job published this version."""
    with locked(store_folder / ".published.lock", wait_seconds=LOCK_SECONDS):
        objects = {**_objects(store_folder), entry.name: entry.version.object}
        write_text(store_folder / PUBLISHED, json_text(objects), replace=True)


def may_publish(store_folder: Path, library: Library, name: str) -> bool:
    """Returns whether the library has no adapter of this name, or a job published its newest
    version."""
    if not library.has(name):
        return True
    return _objects(store_folder).get(name) == library.get(name).version.object


def _objects(store_folder: Path) -> dict[str, Any]:
    file = store_folder / PUBLISHED
    return read_json(file) if file.is_file() else {}
