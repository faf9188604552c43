"""Pushes and pulls versions: to a folder, an fsspec address, or a repository of the hub.

    /folder, file://...          another library, under its own locks (library/remote/remote.py)
    s3://, gcs://, ssh://, ...   the same layout at that address; http(s):// for reading
                                 (library/remote/fsspec_place.py)
    hf://org/name[@revision]     one adapter, in the repository's root, as PEFT reads it
                                 (library/remote/hub.py)

The facts in a remote record are not trusted: they are read from the object.
"""

from collections.abc import Callable
from pathlib import Path

from veneer.errors import ConfigError, SourceError
from veneer.library.entry import Entry, chosen_version
from veneer.library.library import Library
from veneer.library.names import Reference, check_name, parse_reference
from veneer.library.records import Version
from veneer.library.remote.remote import FolderRemote, Remote, Transfer, fetch_object

CardOf = Callable[[Entry, Path], str | None]


def remote_at(address: str) -> Remote:
    """Returns the library at an address. ConfigError: unknown kind of address."""
    scheme, separator, rest = address.partition("://")
    if not separator or scheme == "file":
        return FolderRemote(Library(rest if separator else address))
    from veneer.library.remote.fsspec_place import FsspecRemote

    return FsspecRemote(address)


def push(library: Library, reference: str, address: str, card: CardOf | None = None) -> Transfer:
    """Copies a version to another library under its own name; bytes that are there are not sent.

    card: writes the README.md of a hub repository; libraries have none.
    """
    entry = library.get(reference)
    folder = library.whole(entry.reference)
    if address.startswith("hf://"):
        from veneer.library.remote.hub import push_to_hub

        return push_to_hub(entry, folder, address, None if card is None else card(entry, folder))
    remote = remote_at(address)
    record = remote.record(entry.name)
    skipped = record is not None and any(v.object == entry.version.object for v in record.versions)
    remote_reference = remote.publish(entry.name, entry.version, folder)
    return Transfer(remote_reference, address, entry.version.facts.bytes, skipped)


def pull(
    library: Library, address: str, reference: str | None = None, *, name: str | None = None
) -> Entry:
    """Fetches a version and makes it the newest of `name` (default: its name there)."""
    if address.startswith("hf://"):
        from veneer.library.remote.hub import pull_from_hub

        return pull_from_hub(library, address, name=name)
    if reference is None:
        raise ConfigError("no adapter was named", [], "Name it: NAME, NAME@2 or NAME@tag.")
    parsed, remote = parse_reference(reference), remote_at(address)
    version = _find_version(remote, parsed)
    check_name(name or parsed.name)
    with library.receiving():
        fetch_object(library, remote, version.object)
        from veneer.formats.adapter import read_adapter  # loads torch
        from veneer.library.examination import facts_of

        facts = facts_of(read_adapter(library.objects / version.object))
        return library.point(
            name or parsed.name, version.object, facts, tags=version.tags, note=version.note
        )


def _find_version(remote: Remote, parsed: Reference) -> Version:
    record = remote.record(parsed.name)
    if record is None:
        names = remote.names()
        listed = "" if names is None else f"There is: {', '.join(names[:12]) or 'nothing'}."
        raise SourceError(f"no adapter {parsed.name!r} at {remote.address}", [], listed)
    return chosen_version(parsed, record)
