"""Where an adapter comes from: those that it was continued from, by name as far as the library has
them."""

from __future__ import annotations

from veneer.library.library import Entry, Library

MOST_ANCESTORS = 100


def ancestors(library: Library, parent: str | None) -> list[tuple[str, Entry | None]]:
    """Content of each, the nearest first, and where the library has it. It ends with one that the
    library lacks."""
    if parent is None:
        return []
    known = by_content(library)
    found: list[tuple[str, Entry | None]] = []
    while parent is not None and len(found) < MOST_ANCESTORS:
        entry = known.pop(parent, None)
        found.append((parent, entry))
        parent = entry.version.facts.parent if entry else None
    return found


def by_content(library: Library) -> dict[str, Entry]:
    return {
        entry.version.facts.content_hash: entry for entry in library.entries(every_version=True)
    }
