"""What the library knows of an adapter: facts, metrics, where it comes from, and how much it
changes which layer.

Neither its recipe nor what it calls its base is told: these may be paths of whoever trained it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from veneer.errors import told_as
from veneer.formats.adapter import read_adapter
from veneer.formats.norms import Angle, angle, by_kind, updates
from veneer.library.library import Entry, Library
from veneer.library.lineage import ancestors, by_content

TOLD = ("method", "bytes", "tensors", "parameters", "rank", "base_proof", "metrics", "origin")
"""Of the facts, under their own names."""


def details(library: Library, entry: Entry) -> dict[str, Any]:
    """Reads files. Raises what reading an adapter raises."""
    version = entry.version
    facts = version.facts
    with _called(library, entry):
        picture, parents = _contents(library.path(entry.reference))
    known = by_content(library) if parents else {}
    return {
        "name": entry.name,
        "reference": entry.reference,
        "added": version.added,
        "tags": version.tags,
        "note": version.note,
        "version": facts.content_hash,
        **{name: getattr(facts, name) for name in TOLD},
        "lineage": [
            {"version": content, **_named(each)}
            for content, each in ancestors(library, facts.parent)
        ],
        "parents": [
            {"version": content, "weight": weight, **_named(known.get(content))}
            for content, weight in parents
        ],
        **picture,
    }


def angle_between(library: Library, one: Entry, other: Entry) -> dict[str, Any]:
    """Cosines between the updates of two adapters, in total and by layer; null where one changes
    nothing."""
    with _called(library, one), _called(library, other):
        found = _angle(library.path(one.reference), library.path(other.reference))
    return {
        "reference": one.reference,
        "against": other.reference,
        "cosine": found.total,
        "by_layer": found.by_layer,
        "modules_in_both": found.in_both,
    }


@lru_cache(maxsize=256)
def _angle(one: Path, other: Path) -> Angle:
    """Of two folders that are called by their content."""
    first, second = (updates(read_adapter(folder))[0] for folder in (one, other))
    return angle(first, second)


@contextmanager
def _called(library: Library, entry: Entry) -> Iterator[None]:
    place = library.objects / entry.version.object
    with told_as(library.folder, "the library"), told_as(place, entry.reference):
        yield


def _named(entry: Entry | None) -> dict[str, str | None]:
    return {"reference": None if entry is None else entry.reference}


@lru_cache(maxsize=256)
def _contents(folder: Path) -> tuple[dict[str, Any], tuple[tuple[str, float], ...]]:
    """Norms of its updates by kind and layer; what it was combined from. Of a folder that is called
    by its content."""
    stored = read_adapter(folder)
    found, rest = updates(stored)
    kinds, alone = by_kind({path: update.norm() for path, update in found.items()})
    picture = {
        "layers": [
            {"kind": kind, "norms": {str(n): row[n] for n in sorted(row)}}
            for kind, row in kinds.items()
        ],
        "alone": [{"module": path, "norm": norm} for path, norm in alone.items()],
        "others": len(rest),
    }
    parents = () if stored.manifest is None else stored.manifest.parents
    return picture, tuple((each.content_hash, each.weight) for each in parents)
