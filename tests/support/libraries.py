"""Looks into libraries of adapters."""

from veneer.library.library import Library


def references(library: Library, **filters) -> list[str]:
    return [entry.reference for entry in library.entries(**filters)]
