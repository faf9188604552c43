"""The lineage of an adapter: the adapters that its training was continued from."""

from veneer.library.entry import Entry
from veneer.library.library import Library

MOST_ANCESTORS = 100


def ancestors(library: Library, parent: str | None) -> list[tuple[str, Entry | None]]:
    """Returns (content hash, library entry or None) of each ancestor, nearest first.

    Ends with the first ancestor that the library does not have.
    """
    if parent is None:
        return []
    entries = by_content(library)
    lineage: list[tuple[str, Entry | None]] = []
    while parent is not None and len(lineage) < MOST_ANCESTORS:
        entry = entries.pop(parent, None)
        lineage.append((parent, entry))
        parent = entry.version.facts.parent if entry else None
    return lineage


def by_content(library: Library) -> dict[str, Entry]:
    return {
        entry.version.facts.content_hash: entry for entry in library.entries(every_version=True)
    }
