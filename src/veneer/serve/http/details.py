"""Describes an adapter of the library: facts, metrics, lineage, and how much it changes each layer.

Its recipe and its base's name are left out: they may contain paths of the machine that trained it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from veneer.errors import hide_path
from veneer.formats.adapter import read_adapter
from veneer.formats.norms import Angle, angle, by_kind, updates
from veneer.library.entry import Entry
from veneer.library.library import Library
from veneer.library.lineage import ancestors, by_content

SHOWN = ("method", "bytes", "tensors", "parameters", "rank", "base_proof", "metrics", "origin")
"""Facts that are shown under their own names."""


def details(library: Library, entry: Entry) -> dict[str, Any]:
    """Describes an adapter. Raises what reading an adapter raises."""
    version = entry.version
    facts = version.facts
    with _name_in_errors(library, entry):
        picture, parents = _contents(library.path(entry.reference))
    known = by_content(library) if parents else {}
    return {
        "name": entry.name,
        "reference": entry.reference,
        "added": version.added,
        "tags": version.tags,
        "note": version.note,
        "version": facts.content_hash,
        **{name: getattr(facts, name) for name in SHOWN},
        "lineage": [
            {"version": content, **_reference(ancestor)}
            for content, ancestor in ancestors(library, facts.parent)
        ],
        "parents": [
            {"version": content, "weight": weight, **_reference(known.get(content))}
            for content, weight in parents
        ],
        **picture,
    }


def angle_between(library: Library, first: Entry, second: Entry) -> dict[str, Any]:
    """Returns cosines between the updates of two adapters, in total and by layer; null where one
    changes nothing."""
    with _name_in_errors(library, first), _name_in_errors(library, second):
        cosines = _angle(library.path(first.reference), library.path(second.reference))
    return {
        "reference": first.reference,
        "against": second.reference,
        "cosine": cosines.total,
        "by_layer": cosines.by_layer,
        "modules_in_both": cosines.in_both,
    }


@lru_cache(maxsize=256)
def _angle(first_folder: Path, second_folder: Path) -> Angle:
    """Compares two folders, whose names are their content's hashes."""
    first, second = (updates(read_adapter(folder))[0] for folder in (first_folder, second_folder))
    return angle(first, second)


@contextmanager
def _name_in_errors(library: Library, entry: Entry) -> Iterator[None]:
    folder = library.objects / entry.version.object
    with hide_path(library.folder, "the library"), hide_path(folder, entry.reference):
        yield


def _reference(entry: Entry | None) -> dict[str, str | None]:
    return {"reference": None if entry is None else entry.reference}


@lru_cache(maxsize=256)
def _contents(folder: Path) -> tuple[dict[str, Any], tuple[tuple[str, float], ...]]:
    """Returns norms of the updates by kind and layer, and the adapters that it was combined from.

    The folder's name is its content's hash.
    """
    stored = read_adapter(folder)
    changes, rest = updates(stored)
    kinds, alone = by_kind({path: update.norm() for path, update in changes.items()})
    picture = {
        "layers": [
            {"kind": kind, "norms": {str(n): row[n] for n in sorted(row)}}
            for kind, row in kinds.items()
        ],
        "alone": [{"module": path, "norm": norm} for path, norm in alone.items()],
        "others": len(rest),
    }
    parents = () if stored.manifest is None else stored.manifest.parents
    return picture, tuple((parent.content_hash, parent.weight) for parent in parents)
